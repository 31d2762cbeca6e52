"""Which batch norm is folded into which layer (rule F5)."""

from __future__ import annotations

from collections import Counter

from torch.nn.modules.batchnorm import _BatchNorm

from qatkit.graph.capture import Call, Capture, Value

_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")


def find_folds(capture: Capture) -> dict[str, str]:
    """Return the path of the batch norm behind each layer that has one of its own.

    A layer called twice, or whose output has a second reader, cannot absorb it. Neither can a
    linear layer behind which the batch norm does not run over the output features: with more than
    two dimensions it runs over axis 1.
    """
    times = Counter(call.name for call in capture.operators if call.module is not None)
    returned = set(capture.root.results)
    folds: dict[str, str] = {}
    for call in capture.operators:
        if call.kind not in _FOLDABLE or call.module is None or times[call.name] != 1:
            continue
        norm = _only_consumer(call.results[0], returned)
        if norm is None or norm.kind != "BatchNormalization" or times[norm.name] > 1:
            continue
        owner = _owner(norm)
        if owner is None or getattr(owner.module, "running_var", None) is None:
            continue
        if call.kind == "Gemm" and len(call.results[0].shape) != 2:
            continue
        assert owner.module is not None
        if (
            call.module._forward_hooks
            or owner.module._forward_hooks
            or owner.module._forward_pre_hooks
        ):
            continue  # they see or change what stands between the two
        folds[call.name] = owner.name
    return folds


def _owner(norm: Call) -> Call | None:
    """Return the call of the module that a normalization belongs to.

    That is the layer itself, or a subclass of a batch norm whose own forward calls the function
    with its own statistics.
    """
    if norm.module is not None:
        return norm
    owner = norm.parent
    if owner is None or not isinstance(owner.module, _BatchNorm):
        return None
    once = sum(child.kind == "BatchNormalization" for child in owner.children) == 1
    own = all(value.name.startswith(f"{owner.name}.") for value in norm.inputs[1:])
    whole = len(norm.inputs) in (3, 5) and owner.inputs[:1] == norm.inputs[:1]
    return owner if once and own and whole else None


def _only_consumer(value: Value, returned: set[Value]) -> Call | None:
    return value.consumers[0] if len(value.consumers) == 1 and value not in returned else None
