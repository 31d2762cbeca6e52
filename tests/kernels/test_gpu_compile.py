"""The Triton kernels compiled for a GPU that need not be there: what the machine code contains."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
    pytest.skip("triton < 3.3 compiles through another interface", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qatkit.kernels.gpu import grid, ranges, weights  # noqa: E402
from qatkit.kernels.gpu.arithmetic import EXACT  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
X = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "zero_ptr": "*i32"}
SIZES = {"count": "i64", "inner": "i64", "channels": "i32", "low": "i32", "high": "i32"}
ROWS = {"length": "i64", "blocks": "i32"}
STATE = {"min_ptr": "*fp32", "max_ptr": "*fp32"}
PARTS = {"parts_ptr": "*fp32", "finite_ptr": "*i64", "counts_ptr": "*i64"}
FINISH = {"range_ptr": "*fp32", **STATE, "seen_ptr": "*i64", "share": "i64"}
TAIL = {"least": "fp32", "most": "fp32", "rows": "i32"}
BINS = {"x_ptr": "*bf16", "parts_ptr": "*fp32", "counts_ptr": "*i64"}
WEIGHT = {"w_ptr": "*fp32", "y_ptr": "*fp32", **STATE, "length": "i32", "quant_max": "fp32"}
PLAIN = {"ZERO": False, "AXIS": False, "SIZE": 4096}
FLAGS = {"TRIM": True, "WIDE": False, "WHOLE": 10**10, "JOIN": True, "RULE": 0, "COUNT": True}
CASES = {
    "forward": (grid._forward, X | {"y_ptr": "*bf16"} | SIZES, PLAIN | {"CLIP": True}),
    "per channel": (
        grid._forward,
        X | {"y_ptr": "*bf16"} | SIZES,
        PLAIN | {"CLIP": True, "AXIS": True, "ZERO": True},
    ),
    "backward": (grid._backward, X | {"grad_ptr": "*bf16", "passed_ptr": "*bf16"} | SIZES, PLAIN),
    "extremes": (
        ranges._extremes,
        {"x_ptr": "*bf16"} | PARTS | ROWS,
        {"PARTS": 1024, "SIZE": 4096},
    ),
    "histogram": (ranges._histogram, BINS | ROWS, {"PARTS": 1024, "SIZE": 4096}),
    "finish": (ranges._finish, PARTS | FINISH | TAIL, FLAGS | {"PARTS": 1024}),
    "weight": (weights._quantize_rows, WEIGHT, {"KEEP": True, "SIZE": 16384}),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_fused_multiply_add(case):
    kernel, types, constants = CASES[case]
    signature = types | dict.fromkeys(constants, "constexpr")
    # As at a launch: pointers and sizes that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types.get(name, "")[:1] in "*i" and name in types
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    text = triton.compile(source, target=HOPPER, options=EXACT).asm["ptx"]
    assert not re.findall(r"\bfma\.", text)
    assert not re.findall(r"\bdiv\.(?:full|approx)|\brcp\.", text)
    if case in ("forward", "backward", "extremes", "histogram"):
        assert "ld.global.v4.b32" in text  # 16 bytes for each thread
