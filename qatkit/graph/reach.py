"""Whether a tensor gets to a quantizer: whether INT8 is near.

A sum whose result and operands never meet an INT8 operator again has nothing to fuse for: the pixel
coordinates that a flow network adds up, say, which INT8 would ruin.
"""

from __future__ import annotations

from qatkit.graph.capture import Call, Value
from qatkit.graph.readers import Reading

_KINDS = "Activation BatchNormalization LayerNormalization Pad AveragePool ReduceMean"
_NAMES = (
    "group_norm groupnorm instance_norm instancenorm1d instancenorm2d instancenorm3d rms_norm "
    "rmsnorm local_response_norm localresponsenorm normalize lp_pool2d interpolate upsample "
    "upsamplingnearest2d upsamplingbilinear2d erf exp pow square sqrt rsqrt reciprocal var std "
    "var_mean std_mean clamp clamp_min clamp_max"
)
_COMBINES = ("add", "mul", "div", "sub")


def reaches_quantizer(reading: Reading, value: Value) -> bool:
    """Tell whether a quantizer reads what becomes of ``value``.

    Followed are copies, activations, norms, pools, and arithmetic on nothing else than ``value``
    and constants. A difference to a constant is another quantity and not followed.
    """
    reads, copies = reading.reads, reading.backend.copies
    seen, todo = {value}, [value]
    while todo:
        current = todo.pop()
        for call in current.consumers:
            if (call, current) in reads:
                return True
            if _passes(call, current, seen, copies):
                fresh = [result for result in call.results if result not in seen]
                seen.update(fresh)
                todo.extend(fresh)
    return False


def _passes(call: Call, value: Value, seen: set[Value], copies: frozenset[str]) -> bool:
    if call.name in _COMBINES:
        others = [each for each in call.inputs if each not in seen]
        computed = call.name != "sub" or (len(set(call.inputs)) == 2 and not others)
        return computed and all(each.constant for each in others)
    if value not in call.data:
        return False
    return call.kind in copies or call.kind in _KINDS.split() or call.name in _NAMES.split()
