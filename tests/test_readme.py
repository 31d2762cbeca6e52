"""The examples of README.md run as they stand, one after the other in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    namespace: dict[str, object] = {}
    for match in BLOCK.finditer(text):
        line = text[: match.start(1)].count("\n")
        code = compile("\n" * line + match.group(1), str(README), "exec")
        exec(code, namespace)
    assert namespace, "no example found"


def test_every_file_it_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:scripts|recipes|qatkit|tests)/[\w./]*\w", text)
    assert names
    for name in names:
        assert (README.parent / name).exists(), name
