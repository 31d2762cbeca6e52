"""The wheel holds the whole package, says what it needs, and works on its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel offline, from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "qatkit", source / "qatkit", ignore=shutil.ignore_patterns("__pycache__")
    )
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True
    )
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qatkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "qatkit/py.typed" in sources
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources


def requirements(metadata: Message, extra: str | None) -> set[str]:
    """Return the names of the packages that an extra, or the core, brings."""
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"extra == [\"']([\w-]+)[\"']", marker)
        if (wanted.group(1) if wanted else None) == extra:
            found.add(re.split(r"[^\w.-]", requirement)[0].lower())
    return found


def test_core_needs_torch_numpy_and_numba_only(metadata: Message) -> None:
    assert requirements(metadata, None) == {"torch", "numpy", "numba"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert (metadata["Name"], metadata["Version"]) == ("qatkit", "0.1.0")


def test_extras(metadata: Message) -> None:
    extras = {name: requirements(metadata, name) for name in metadata.get_all("Provides-Extra", [])}
    assert extras["onnx"] == {"onnx", "onnxruntime", "onnxscript"}
    assert extras["pytorch-quantization"] == {"pytorch-quantization"}
    users = ("onnx", "vision", "report", "save")
    assert extras["all"] == set().union(*(extras[name] for name in users))
    assert extras["dev"] > extras["all"]
    assert set(extras) == {*users, "all", "dev", "pytorch-quantization"}


def test_every_extra_that_an_error_names_exists(metadata: Message) -> None:
    extras = metadata.get_all("Provides-Extra", [])
    for path in (ROOT / "qatkit").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"qatkit\[([\w-]+)\]", text)
        named += re.findall(r"MissingExtraError\(\s*\"[\w-]+\",\s*\"([\w-]+)\"", text)
        assert set(named) <= set(extras), path


def test_the_unpacked_wheel_imports(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import qatkit; print(qatkit.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "qatkit" / "__init__.py")
