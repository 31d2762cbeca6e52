"""`scripts/bench.py`: what it says is what it measured; the times themselves are not tested."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qatkit.functional.exact_ti import exact_shrink_range

SCRIPTS = Path(__file__).parents[2] / "scripts"
PARTS = ("ops", "step", "compiled", "calibrate", "export", "deploy", "imports")
OTHERS = ("measuring", "machine", "tables", "peers", "percentile_range", "published_range")


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The script and its modules, imported as it imports them."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        loaded = {name: importlib.import_module(f"benchmarks.{name}") for name in (*PARTS, *OTHERS)}
        return SimpleNamespace(main=importlib.import_module("bench"), **loaded)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(bench, *arguments):
    return bench.main.parse(list(arguments))


def test_every_part_has_options_and_says_what_it_is(bench):
    assert tuple(bench.main.BENCHMARKS) == PARTS
    for name in PARTS:
        args = options(bench, name, "--json", "a.json")
        assert args.benchmark is getattr(bench, name)
        assert args.json == Path("a.json")
        assert args.benchmark.__doc__
        assert isinstance(args.benchmark.KEEPS_MEMORY, bool)


@pytest.mark.parametrize("arguments", [[], ["speed"], ["step", "--peers", "another"]])
def test_illegal_arguments(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main.parse(arguments)
    assert "usage" in capsys.readouterr().err


def test_the_command_that_is_printed_lacks_only_the_files(bench):
    given = ["step", "--json", "a", "--model", "x", "--markdown=b", "--steps", "3"]
    assert bench.main._without_files(given) == ["step", "--model", "x", "--steps", "3"]


def test_tables_go_to_their_place_in_a_page(bench):
    put = bench.main.put_in_place
    page = (
        "# Speed\n<!-- bench step -->\nold\n<!-- end step -->\n<!-- bench ops --><!-- end ops -->"
    )
    once = put(page, "step", "new\n")
    assert once.startswith("# Speed\n<!-- bench step -->\n\nnew\n")
    assert "old" not in once
    assert put(once, "step", "new\n") == once
    assert "other" in put(once, "ops", "other")
    assert "new" in put(once, "ops", "other")
    assert put("a page of something else", "step", "new") == "new"


def test_variants_take_turns(bench):
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = bench.measuring.take_turns(runs, 2, warm_up=1, in_a_row=2, rest=1)
    assert "".join(order) == "aaabbb" * 3
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert all(value >= 0 for values in seconds.values() for value in values)
    assert bench.measuring.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
    assert bench.measuring.quartiles([1.0]) == (1.0, 1.0)


def test_memory_is_kept_by_a_new_start_only(bench, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    for name in bench.measuring.MALLOC:
        monkeypatch.delenv(name, raising=False)
    bench.measuring.restart_with_memory_kept()
    program, arguments, environment = started.pop()
    assert program == sys.executable
    assert arguments[1:] == sys.argv
    for name, value in bench.measuring.MALLOC.items():
        assert environment[name] == value
        monkeypatch.setenv(name, value)
    bench.measuring.restart_with_memory_kept()
    assert not started
    assert not bench.measuring.MALLOC.keys() & bench.measuring.default_allocator().keys()


def test_result_as_markdown_and_json(bench):
    tables = bench.tables
    table = tables.Table("speed", "two runs", ("variant", "ns"), (("a", 1.5), ("b", None)))
    bars = (tables.Bar("a", 1.5, 1.2), tables.Bar("b", 5.0, 4.0, at_most=False, unit="s"))
    result = tables.Result((table,), bars, ("c is not installed",))
    about = bench.machine.machine()
    text = result.markdown("python x", about)
    assert "| a | 1.500 |" in text
    assert "| b |  |" in text
    assert "| a | <= 1.200 x | 1.500 x | **no** |" in text
    assert "| b | >= 4.000 s | 5.000 s | yes |" in text
    assert "- c is not installed" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    found = json.loads(result.json("python x", about))
    assert [bar["met"] for bar in found["bars"]] == [False, True]
    assert found["tables"][0]["rows"] == [["a", 1.5], ["b", None]]
    assert found["machine"]["date"] in text


def test_peers_that_are_missing_or_fail_are_left_out_with_the_reason(bench, monkeypatch):
    def fails(model, x):
        raise RuntimeError("no kernel\nfor it")

    def dies(model, x):
        raise SystemExit(3)

    peers = {
        "absent": ("qatkit-no-such-package", fails),
        "broken": ("torch", fails),
        "exits": ("torch", dies),
        "wrong": ("torch", lambda model, x: nn.Linear(9, 9)),
        "fine": ("torch", lambda model, x: model.eval()),
    }
    monkeypatch.setattr(bench.peers, "PEERS", peers)
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    models, reasons = bench.peers.build(model, x, peers, lambda each: each(x))
    assert list(models) == ["fine"]
    assert models["fine"] is not model
    assert models["fine"].training
    assert reasons["absent"] == "qatkit-no-such-package is not installed"
    assert reasons["broken"] == "torch fails: RuntimeError: no kernel for it"
    assert "SystemExit" in reasons["exits"]
    assert "wrong" in reasons


@pytest.mark.parametrize("percentile", [0.01, 0.5, 1.0, 10.0, 40.0])
@pytest.mark.parametrize("kind", ["gaussian", "relu"])
def test_the_published_loop_is_the_published_loop(bench, kind, percentile):
    torch.manual_seed(3)
    x = bench.percentile_range.data(kind, 3000)
    wanted = exact_shrink_range(x, percentile)
    assert bench.published_range.published_range(x, percentile) == tuple(map(float, wanted))


def test_cases_of_the_percentile_range(bench):
    args = argparse.Namespace(percentiles=[0.15, 5.05], rounds=1)
    found = bench.percentile_range.cases(1000, args)
    assert [(one["data"], one["percentile"]) for one in found] == [
        (kind, percentile) for kind in ("gaussian", "relu") for percentile in (0.15, 5.05)
    ]
    assert all(one["bins apart"] < 0.01 for one in found)
    bars = bench.ops._range_bars(found, kept=True)
    assert bars[0].value == min(one["faster"] for one in found)
    assert not bars[0].at_most


def test_equality_with_native_is_really_checked(bench):
    x = torch.randn(200, 100)
    scale, zero = torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)

    def native(t):
        return torch.fake_quantize_per_tensor_affine(t, scale, zero, -128, 127)

    class Straight(torch.autograd.Function):  # the same values, another gradient
        @staticmethod
        def forward(ctx, t):
            return native(t)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    assert bench.ops._equal(native, native, x)
    assert not bench.ops._equal(Straight.apply, native, x)
    assert not bench.ops._equal(lambda t: t * 1.0, native, x)


def test_bytes_that_are_saved(bench):
    x = torch.randn(10, 100)
    of = bench.ops._saved_bytes
    assert of(lambda t: t + 1, x) == (0, 0)
    assert of(torch.relu, x) == (4000, 0)  # its own result
    assert of(lambda t: t * t, x) == (4000, 0)  # its input
    assert of(lambda t: t.exp().square(), x) == (4000, 4000)


@pytest.mark.usefixtures("one_thread")
def test_step(bench):
    given = ["--model", "resnet18", "--batch", "2", "--size", "32", "--steps", "2", "--peers"]
    result = bench.step.run(options(bench, "step", *given))
    labels = [row[0] for row in result.tables[0].rows]
    assert labels[:4] == ["float", "float again (control)", bench.step.QAT, bench.step.FROZEN]
    assert [bar.bound for bar in result.bars] == [1.12, 1.08]
    assert all(row[3] > 0 for row in result.tables[0].rows)


@pytest.mark.usefixtures("one_thread")
def test_calibrate(bench):
    given = ["--size", "32", "--batch", "1", "--batches", "1", "--rounds", "1"]
    args = options(bench, "calibrate", *given, "--method", "shrink", "entropy", "max")
    result = bench.calibrate.run(args)
    assert [row[0] for row in result.tables[0].rows][2:] == ["shrink", "entropy", "max"]
    assert {row[0] for row in result.tables[1].rows} == {"entropy", "max"}
    assert [bar.bound for bar in result.bars] == [0.8, 0.6, 0.6]
    assert all(math.isfinite(bar.value) for bar in result.bars)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ops(bench):
    given = ["--size", "2000", "--rounds", "2", "--range-sizes", "2000", "--range-rounds", "1"]
    result = bench.ops.run(options(bench, "ops", *given))
    equal = {row[0]: row[3] for row in result.tables[0].rows if row[0].startswith("qatkit")}
    assert set(equal.values()) == {"yes"}
    assert len(result.tables) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_export(bench):
    given = ["--model", "mobilenet_v2", "--front-end", "legacy"]
    result = bench.export.run(options(bench, "export", *given))
    row = dict(zip(result.tables[0].columns, result.tables[0].rows[0], strict=True))
    assert row["verified"] == "yes"
    assert row["peak MB"] >= row["idle MB"]
    assert [bar.bound for bar in result.bars] == [3.0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_deploy(bench):
    given = ["--model", "resnet18", "--size", "64", "--rounds", "1", "--preset"]
    args = options(bench, "deploy", *given, "onnxruntime-uint8", "--engine", "onnxruntime")
    result = bench.deploy.run(args)
    assert [row[2] for row in result.tables[0].rows] == [
        "float32",
        "onnxruntime-uint8",
        "float32 again (control)",
    ]
    assert result.notes == ()


@pytest.mark.usefixtures("one_thread")
def test_compiled(bench, monkeypatch):
    monkeypatch.setattr(bench.compiled, "_build", lambda name, size: torch.nn.Conv2d(3, 4, 3))
    args = options(bench, "compiled", "--model", "tiny", "--batch", "2", "--size", "8", "--eval")
    args.steps = 2
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)
    monkeypatch.setattr(bench.compiled, "_difference_in_eval", lambda model, x: 0.0)
    result = bench.compiled.run(args)
    ((name, dynamo, inductor, of_float, graphs, again, ratio, over_float, difference),) = (
        result.tables[0].rows
    )
    assert (name, graphs, again, difference) == ("tiny", 1, 0, 0.0)
    assert min(dynamo, inductor, of_float, ratio, over_float) > 0
    assert [bar.bound for bar in result.bars] == [1.05]
