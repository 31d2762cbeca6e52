"""Which batch norm is folded into which layer (rule F5)."""

from __future__ import annotations

from collections import Counter

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
        if (
            norm is None
            or norm.kind != "BatchNormalization"
            or norm.module is None
            or times[norm.name] != 1
        ):
            continue
        if call.kind == "Gemm" and len(call.results[0].shape) != 2:
            continue
        if getattr(norm.module, "running_var", None) is None:
            continue
        if (
            call.module._forward_hooks
            or norm.module._forward_hooks
            or norm.module._forward_pre_hooks
        ):
            continue  # they see or change what stands between the two
        folds[call.name] = norm.name
    return folds


def _only_consumer(value: Value, returned: set[Value]) -> Call | None:
    return value.consumers[0] if len(value.consumers) == 1 and value not in returned else None
