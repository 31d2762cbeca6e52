"""What an inference engine can fuse: plain data, read by the placement *and* by the lint.

Operator kinds carry their ONNX names (``Conv``, ``Gemm``, ``MaxPool`` ...) on both sides, so that
the pass which places a quantizer and the rule which checks the exported file can never disagree
about what an operator is.
"""

from __future__ import annotations

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
        unsigned_int8: whether uint8 codes, and with them asymmetric activations, are accepted (P3).
        zero_point: whether a zero point other than 0 is accepted (P2).
        axis_of_weight: the quantized axis of a per-channel weight by operator, ``None`` for
            per-tensor (F2, F2b).
        activations: pointwise operators that fuse into the weighted operator in front of them (F4).
        smooth_activations: pointwise operators that stay float up to the next quantizer (F11).
        joins: operators on two tensors that run in INT8 only with INT8 on both sides (F7, F11).
        float_inputs: operators whose input stays float (F12).
        code_types: types of the codes in lower-case ONNX names, besides uint8 (P3).
        min_channels: INT8 kernels want at least so many channels, rows or columns (F14, F15).
        attention_head_sizes: head sizes of the INT8 attention fusion (F13).
        max_attention_length: longest sequence of the INT8 attention fusion (F13).

    Source: NVIDIA TensorRT documentation, "Explicit quantization"; the open onnx-tensorrt parser.
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
    min_channels: int = 16
    attention_head_sizes: frozenset[int] = frozenset({16, 32, 64})
    max_attention_length: int = 512


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

BACKENDS: Mapping[str, Backend] = MappingProxyType({TENSORRT.name: TENSORRT})


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
