"""Whether a tensor gets to a QuantizeLinear: whether INT8 is near."""

from __future__ import annotations

from qatkit.backend import Backend
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.walks import is_copy

_PASSED = (
    "Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Erf Sigmoid HardSigmoid HardSwish Swish Tanh "
    "Softplus Softsign Mish ThresholdedRelu Abs Exp Pow Sqrt Reciprocal BatchNormalization "
    "InstanceNormalization LayerNormalization GroupNormalization RMSNormalization LRN "
    "LpNormalization MeanVarianceNormalization AveragePool GlobalAveragePool GlobalMaxPool LpPool "
    "ReduceMean ReduceSum ReduceL2 Pad Resize Upsample"
)
"""Operators whose result is still an activation of the same place."""

_COMBINES = ("Add", "Sub", "Mul", "Div")


def reaches_quantizer(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Tell whether a QuantizeLinear reads what becomes of ``tensor``.

    Followed are copies, activations, norms, pools, and arithmetic on nothing else than ``tensor``
    and constants. A difference to a constant is another quantity and not followed.
    """
    seen, todo = {tensor}, [tensor]
    while todo:
        current = todo.pop()
        for node in view.consumers(current):
            if node.is_q:
                return True
            if _passes(view, node, current, seen, backend):
                fresh = [name for name in node.outputs if name and name not in seen]
                seen.update(fresh)
                todo += fresh
    return False


def _passes(view: GraphView, node: Node, tensor: str, seen: set[str], backend: Backend) -> bool:
    if node.domain:
        return False
    if node.op in _COMBINES:
        others = [name for name in node.inputs if name not in seen]
        computed = node.op != "Sub" or (not others and len(set(node.inputs)) == 2)
        return computed and all(view.is_constant(name) for name in others)
    if node.op != "Concat" and node.input(0) != tensor:
        return False  # indices, shapes
    return node.op in _PASSED.split() or is_copy(view, node, backend)
