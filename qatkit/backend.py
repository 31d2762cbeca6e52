"""What an inference engine can fuse: plain data, read by the placement *and* by the lint.

Operator kinds carry their ONNX names (``Conv``, ``Gemm``, ``MaxPool`` ...) on both sides, so that
the pass which places a quantizer and the rule which checks the exported file can never disagree
about what an operator is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qatkit.errors import QatkitError

ResidualPolicy = Literal["skip", "both", "none"]


@dataclass(frozen=True)
class Backend:
    """The quantization rules of one engine.

    Attributes:
        name: how users ask for it.
        weighted: operators with a weight; their input and weight are quantized, never the bias
            (F1).
        copies: operators that only move values; they get no quantizer of their own and share a
            scale (F8).
        needs_quantized_output: operators that run in INT8 only with INT8 on both sides (F7).
        residual: which operand of a join behind a convolution is quantized (F6).
        transformer_residual: the same for a join behind a linear layer (F6c).
        unsigned_int8: whether uint8 codes are accepted (P3).
        zero_point: whether a zero point other than 0, and with it an asymmetric activation, is
            accepted (P2).
        axis_of_weight: the quantized axis of a per-channel weight by operator, ``None`` for
            per-tensor (F2, F2b).
        activations: pointwise operators that fuse into the weighted operator in front of them (F4).
        smooth_activations: pointwise operators that stay float up to the next quantizer (F11).
        joins: operators on two tensors that run in INT8 only with INT8 on both sides (F7, F11).
        float_inputs: operators whose input stays float (F12).
        code_types: types of the codes in lower-case ONNX names, besides uint8 (P3).
        weight_only_types: types of 4-bit codes that activations must not have (F20).
        min_channels: INT8 kernels want at least so many channels, rows or columns (F14, F15); 0 if
            they take all.
        attention_head_sizes: head sizes of the INT8 attention fusion (F13), none without one.
        max_attention_length: longest sequence of the INT8 attention fusion (F13).
        signed_codes: how the file stores the codes of a signed activation: ``"int8"``, or
            ``"uint8"`` with half the range added to codes and zero point.
        quantized_results: operators whose result is quantized for all its readers, at once or
            behind an activation that fuses, so that what copies it runs in INT8 (F20).
        fuses_by_result: whether those operators run in INT8 only then, and with an activation only
            if the quantizer makes it superfluous, as codes from 0 do with a ReLU (F20, F21).
        quantized_operands: operators that run in INT8 only if all operands are quantized, so that
            one of them asks for the others (F11).
        passes_quantizers: copies in front of which the engine moves the quantizers behind them, if
            nothing else reads what they copy.
        bias_apart: operators that run in INT8 only with their bias in an operator of its own, which
            the engine does not merge with them.
        integer_operators: whether operators on integers are accepted (P1).
        float_bias: whether a bias must not come from a DequantizeLinear (P5).
        float_outputs: whether a Q or DQ must not make a graph output (B1).

    Source: of `TENSORRT`: NVIDIA TensorRT documentation, "Explicit quantization"; the open
        onnx-tensorrt parser. Of `ONNXRUNTIME` and `OPENVINO`: the graphs that ONNX Runtime 1.31
        writes after its optimizations on x86, and the execution graphs of OpenVINO 2026.4.
    """

    name: str
    weighted: frozenset[str]
    copies: frozenset[str]
    needs_quantized_output: frozenset[str]
    residual: ResidualPolicy
    transformer_residual: ResidualPolicy
    unsigned_int8: bool
    zero_point: bool
    axis_of_weight: Mapping[str, int | None]
    activations: frozenset[str] = frozenset(
        {"Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Selu", "Celu", "ThresholdedRelu"}
    )
    smooth_activations: frozenset[str] = frozenset(
        {"Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Gelu", "Erf", "Tanh", "Mish", "Softplus"}
    )
    joins: frozenset[str] = frozenset({"Add", "Mul"})
    float_inputs: frozenset[str] = frozenset(
        {"Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"}
    )
    code_types: frozenset[str] = frozenset({"int8", "int4", "float8e4m3fn", "float4e2m1"})
    weight_only_types: frozenset[str] = frozenset({"int4", "uint4"})
    min_channels: int = 16
    attention_head_sizes: frozenset[int] = frozenset({16, 32, 64})
    max_attention_length: int = 512
    signed_codes: Literal["int8", "uint8"] = "int8"
    quantized_results: frozenset[str] = frozenset()
    fuses_by_result: bool = False
    quantized_operands: frozenset[str] = frozenset()
    passes_quantizers: frozenset[str] = frozenset()
    bias_apart: frozenset[str] = frozenset()
    integer_operators: bool = False
    float_bias: bool = True
    float_outputs: bool = True


TENSORRT = Backend(
    name="tensorrt",
    weighted=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
    copies=frozenset(
        {
            "MaxPool",
            "Reshape",
            "Transpose",
            "Flatten",
            "Squeeze",
            "Unsqueeze",
            "Slice",
            "Split",
            "Gather",
            "Concat",
            "Expand",
            "Identity",
        }
    ),
    needs_quantized_output=frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"}),
    residual="skip",
    transformer_residual="skip",
    unsigned_int8=False,
    zero_point=False,
    axis_of_weight=MappingProxyType(
        {"Conv": 0, "ConvTranspose": None, "Gemm": 0, "MatMul": 0, "Embedding": None}
    ),
)

_CODES_OF_CPUS = frozenset({"int8", "int16", "uint16", "int32", "int4", "uint4"})

ONNXRUNTIME = dataclasses.replace(
    TENSORRT,
    name="onnxruntime",
    weighted=frozenset({"Conv", "Gemm", "MatMul"}),
    needs_quantized_output=frozenset({"AveragePool", "GlobalAveragePool"}),
    residual="both",
    transformer_residual="none",
    unsigned_int8=True,
    zero_point=True,
    activations=frozenset({"Relu", "Clip"}),
    code_types=_CODES_OF_CPUS,
    weight_only_types=frozenset(),
    smooth_activations=frozenset(),
    min_channels=0,
    attention_head_sizes=frozenset(),
    signed_codes="uint8",
    quantized_results=frozenset({"Conv", "Concat", "MaxPool"}),
    fuses_by_result=True,
    quantized_operands=frozenset({"Mul"}),
    passes_quantizers=frozenset({"MaxPool"}),
    bias_apart=frozenset({"Gemm", "MatMul"}),
    integer_operators=True,
    float_bias=False,
    float_outputs=False,
)

OPENVINO = dataclasses.replace(
    TENSORRT,
    name="openvino",
    transformer_residual="none",
    residual="both",
    unsigned_int8=True,
    zero_point=True,
    code_types=_CODES_OF_CPUS,
    weight_only_types=frozenset(),
    min_channels=0,
    attention_head_sizes=frozenset(),
    quantized_results=frozenset({"Conv", "Concat", "MaxPool"}),
    quantized_operands=frozenset({"Mul"}),
    integer_operators=True,
    float_bias=False,
    float_outputs=False,
)

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (TENSORRT, ONNXRUNTIME, OPENVINO)}
)


def get_backend(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        QatkitError: no backend has this name.

    >>> get_backend("tensorrt").residual
    'skip'
    """
    if name not in BACKENDS:
        raise QatkitError(f"unknown backend {name!r}: choose one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
