from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest

from qatkit.export.lint import Finding, lint_onnx
from qatkit.export.lint.command import main
from tests.export.lint.qdq_builder import Graph, resnet_block


@pytest.fixture
def files(tmp_path):
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 8, 8, 8), zero=1), 8, 8, name="few")
    y = g.conv(x, 8, 8, name="float", float_weight=True)
    onnx.save(g.model(y), tmp_path / "bad.onnx")
    onnx.save(resnet_block(), tmp_path / "good.onnx")
    return tmp_path


def test_clean_file(files, capsys):
    assert main([str(files / "good.onnx")]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings, 0 infos\n"


def test_errors_give_1(files, capsys):
    assert main([str(files / "bad.onnx")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["level", "rule", "node", "finding"]
    assert lines[-1].startswith("2 errors, 1 warning, ")


def test_warnings_give_0(files, capsys):
    assert main([str(files / "good.onnx"), "--trt", "11"]) == 0
    assert "P10" in capsys.readouterr().out


def test_json(files, capsys):
    assert main([str(files / "bad.onnx"), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [Finding(**one) for one in findings] == lint_onnx(files / "bad.onnx")
    fields = {"rule", "level", "node", "message", "source", "remedy"}
    assert all(set(one) == fields and all(map(str.strip, one.values())) for one in findings)


def test_json_of_a_clean_file(files, capsys):
    assert main([str(files / "good.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("level", "kept"), [("INFO", {"ERROR", "WARN", "INFO"}), ("WARN", {"ERROR", "WARN"})]
)
def test_level(files, capsys, level, kept):
    assert main([str(files / "bad.onnx"), "--json", "--level", level]) == 1
    assert {one["level"] for one in json.loads(capsys.readouterr().out)} == kept


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx", "."])
def test_file_that_cannot_be_read_gives_2(files, capsys, name):
    (files / "text.onnx").write_text("hello")
    assert main([str(files / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"qatkit lint: {files / name}: ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "--trt", "9"], ["a", "--level", "x"], ["a", "--backend", "x"]],
)
def test_wrong_usage_gives_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_as_a_module(files):
    command = [sys.executable, "-m", "qatkit.export.lint", str(files / "bad.onnx"), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["rule"] == "P2"
