# Sourced by the other scripts: `source _setup.sh EXTRAS` leaves the shell in the repository root with
# an up-to-date .venv whose programs come first on PATH. PYTHON names the interpreter to build it with.
# Does nothing when .venv already holds these extras and setup.py and pyproject.toml have not changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
venv="$PWD/.venv"
stamp="$venv/installed-$extras"
python=${PYTHON:-python3}

fail() {
    echo "qatkit: $*" >&2
    exit 1
}

fingerprint() { # what the installed packages depend on: the requirements, and where the source lies
    cat setup.py pyproject.toml && pwd && "$venv/bin/python" -VV
}

make_venv() {
    command -v "$python" >/dev/null || fail "$python not found: install Python 3.10 or newer," \
        "or name one, as in PYTHON=python3.12 bash $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is" \
        "$("$python" --version 2>&1), qatkit needs 3.10 or newer: name one," \
        "as in PYTHON=python3.12 bash $0"
    "$venv/bin/python" -c "" 2>/dev/null || rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment:" \
        "install its venv package (Debian: apt install python3-venv)"
}

install() { # on a terminal, one line that says what pip is at; pip's messages only if it fails
    local log="$venv/pip.log"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-compile)
    if [ -t 1 ]; then
        "${pip[@]}" --editable ".[$extras]" 2>"$log" |
            awk '/^ *(Collecting|Downloading|Using|Building|Installing)/ {
                     sub(/^ */, ""); printf "\r\033[K  %.70s", $0; fflush()
                 }
                 END { printf "\r\033[K" }'
    else
        "${pip[@]}" --quiet --editable ".[$extras]" 2>"$log"
    fi || { cat "$log" >&2 && return 1; }
}

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
if [ "$(fingerprint)" != "$(cat "$stamp" 2>/dev/null)" ]; then
    echo "Installing qatkit[$extras] into .venv (once, a minute or two) ..."
    started=$SECONDS
    rm -f "$stamp"
    install || fail "pip could not install qatkit[$extras]: see above, then run bash $0 again"
    fingerprint >"$stamp"
    echo "Installed in $((SECONDS - started)) s."
fi
export PATH="$venv/bin:$PATH"
