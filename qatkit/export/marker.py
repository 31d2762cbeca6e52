"""One operator, ``qatkit::fake_quantize``, takes every quantizer through the ONNX exporter.

The exporters' own fake-quantize conversions refuse narrow grids, and functions with a ``symbolic``
are lost silently in the newer exporter; an operator of our own survives both as one node, which
`qatkit.export.qdq` turns into Q and DQ.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatkit.functional import fake_quantize
from qatkit.kernels.portable import along

DOMAIN = "qatkit.marker"
OPERATOR = "FakeQuantize"
_SYMBOL = "qatkit::fake_quantize"
_ATTENTION = "aten::scaled_dot_product_attention"
_FIRST_SDPA_OPSET = 14


class Codes(NamedTuple):
    """The codes of a quantizer as a file stores them.

    Attributes:
        quant_min: lowest code.
        quant_max: highest code.
        zero_point: the code of 0.0, 0 per-channel.
        unsigned: whether their type is uint8, else int8.
    """

    quant_min: int
    quant_max: int
    zero_point: int = 0
    unsigned: bool = False

    @property
    def fill_type(self) -> bool:
        """Whether every number of the type is a code, so that nothing else needs to clip."""
        return self[:2] == ((0, 255) if self.unsigned else (-128, 127))


class Marker(nn.Module):
    """Stands for one quantizer in a model that is being exported.

    Args:
        name: path of the quantizer.
        scale: () or (C,) float32.
        codes: how the file stores the codes.
        axis: axis of ``scale``, ``None`` for per-tensor.
        stored: int8, the codes of a weight, which take the place of what the quantizer reads: a
            quarter of the memory, all the way through the exporter.
    """

    step: Tensor
    stored: Tensor | None

    def __init__(
        self,
        name: str,
        scale: Tensor,
        codes: Codes,
        axis: int | None,
        stored: Tensor | None = None,
    ) -> None:
        """Keep what the operator needs."""
        super().__init__()
        self.name = name
        self.codes = codes
        self.axis = axis
        self.register_buffer("step", scale.detach().clone())
        self.register_buffer("stored", stored)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` by the marking operator, or return the weight of the codes."""
        axis = -1 if self.axis is None else self.axis % x.dim()
        source = x if self.stored is None else self.stored
        marked: Tensor = marking_operator()(source, self.step, *self.codes, axis, self.name)
        return marked


@functools.cache
def marking_operator() -> Callable[..., Any]:
    """Return the operator; it is registered with PyTorch at the first use.

    It fake-quantizes floats, and makes floats of int8 codes.
    """
    library: Any = torch.library.Library("qatkit", "DEF")  # type: ignore[no-untyped-call]
    library.define(
        "fake_quantize(Tensor x, Tensor scale, int quant_min, int quant_max, int zero_point,"
        " bool unsigned, int axis, str name) -> Tensor"
    )
    library.impl("fake_quantize", _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(_SYMBOL, _shape, lib=library)
    operator: Any = torch.ops.qatkit.fake_quantize
    operator.library = library
    function: Callable[..., Any] = operator
    return function


def _compute(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    zero_point: int,
    unsigned: bool,
    axis: int,
    name: str,
) -> Tensor:
    per_channel = None if axis < 0 else axis
    if x.dtype == torch.int8:
        return (x.to(scale.dtype) - zero_point).mul_(along(scale, x, per_channel))
    zeros = torch.full(scale.shape, zero_point, dtype=torch.int32, device=scale.device)
    return fake_quantize(x, scale, zeros, quant_min, quant_max, per_channel).clone()


def _shape(x: Tensor, scale: Tensor, *_: Any) -> Tensor:
    """Return what the operator makes of a tensor without values."""
    return torch.empty_like(x, dtype=scale.dtype if x.dtype == torch.int8 else x.dtype)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Trace without gradients, warnings and fused attention; leave every global as it was."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def exportable(opset: int) -> Iterator[None]:
    """Teach the legacy exporter the marker, and make it forget it afterwards.

    Args:
        opset: the opset of the export; attention needs a conversion of our own below 14.
    """
    symbols: list[tuple[str, Any]] = [(_SYMBOL, _marker_symbol)]
    if opset < _FIRST_SDPA_OPSET and not _is_known(_ATTENTION, opset):
        symbols.append((_ATTENTION, _attention_symbol))
    registered: list[str] = []
    try:
        for name, symbol in symbols:
            torch.onnx.register_custom_op_symbolic(name, symbol, opset)  # type: ignore[attr-defined]
            registered.append(name)
        yield
    finally:
        for name in registered:
            torch.onnx.unregister_custom_op_symbolic(name, opset)  # type: ignore[attr-defined]


def _is_known(name: str, opset: int) -> bool:
    """Tell whether the exporter can convert an operator: below 14, the user has taught it."""
    from torch.onnx import utils

    registration: Any = utils.registration  # type: ignore[attr-defined]
    return bool(registration.registry.is_registered_op(name, opset))


def _marker_symbol(
    g: Any,
    x: Any,
    scale: Any,
    quant_min: Any,
    quant_max: Any,
    zero_point: Any,
    unsigned: Any,
    axis: Any,
    name: Any,
) -> Any:
    node = g.op(
        f"{DOMAIN}::{OPERATOR}",
        x,
        scale,
        quant_min_i=_constant(quant_min, "i", "quant_min"),
        quant_max_i=_constant(quant_max, "i", "quant_max"),
        zero_point_i=_constant(zero_point, "i", "zero_point"),
        unsigned_i=int(_constant(unsigned, "b", "unsigned")),
        axis_i=_constant(axis, "i", "axis"),
        name_s=_constant(name, "s", "name"),
    )
    node.setType(x.type().with_dtype(torch.float32))
    return node


def _attention_symbol(
    g: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: Any = 0.0,
    causal: Any = False,
    scale: Any = None,
    grouped: Any = False,
) -> Any:
    r"""Write ``softmax(scale * Q K^T + mask) V`` with operators of opset 13."""
    from torch.onnx.symbolic_helper import _get_tensor_rank, _is_none

    if _constant(causal, "b", "is_causal") or _constant(grouped, "b", "enable_gqa"):
        raise torch.onnx.errors.UnsupportedOperatorError(
            "aten::scaled_dot_product_attention (causal or grouped)", 13, _FIRST_SDPA_OPSET
        )
    if scale is None or _is_none(scale):
        last = g.op("Constant", value_t=torch.tensor([-1]))
        length = g.op("Cast", g.op("Gather", g.op("Shape", query), last), to_i=1)
        factor = g.op("Reciprocal", g.op("Sqrt", length))
    else:
        factor = g.op("Constant", value_t=torch.tensor(_constant(scale, "f", "scale")))
    rank = _get_tensor_rank(query) or 4
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = g.op("MatMul", g.op("Mul", query, factor), g.op("Transpose", key, perm_i=swapped))
    if mask is not None and not _is_none(mask):
        if mask.type().scalarType() == "Bool":
            low = g.op("Constant", value_t=torch.tensor(float("-inf")))
            zero = g.op("Constant", value_t=torch.tensor(0.0))
            mask = g.op("Where", mask, zero, low)
        scores = g.op("Add", scores, mask)
    return g.op("MatMul", g.op("Softmax", scores, axis_i=-1), value)


def _constant(value: Any, kind: str, name: str) -> Any:
    """Return the Python value of a constant argument ``name``, an ``i``, ``f``, ``b`` or ``s``."""
    from torch.onnx.symbolic_helper import _get_const

    return _get_const(value, kind, name)  # type: ignore[no-untyped-call]
