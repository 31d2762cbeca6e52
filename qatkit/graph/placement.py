"""Turn a recorded run into a `Plan`: pure analysis, nothing is changed."""

from __future__ import annotations

from torch import nn

from qatkit.backend import get_backend
from qatkit.config import QuantConfig
from qatkit.errors import QatkitError
from qatkit.graph.capture import Call, Capture
from qatkit.graph.folds import find_folds
from qatkit.graph.plan import LayerPlan, Plan, QuantizerPlan, join_path
from qatkit.graph.readers import Reader, Reading, find_readers
from qatkit.graph.scale_groups import find_groups
from qatkit.graph.sharing import Sharing, share


def place(capture: Capture, config: QuantConfig) -> Plan:
    """Decide where every quantizer goes.

    Raises:
        QatkitError: a rule of ``config`` matches nothing, or there is nothing to quantize.
    """
    reading = find_readers(capture, config)
    config.check_patterns(_paths(capture.copy, reading))
    sharing = share(reading.readers, _calls_of_blocks(capture.root))
    layers = _layers(reading, sharing, find_folds(capture))
    quantizers = _in_order(reading, sharing)
    if not quantizers:
        kind = type(capture.copy).__name__
        raise QatkitError(
            f"{kind}: nothing to quantize; it has no enabled convolution or linear layer"
        )
    backend = get_backend(config.backend)
    groups = find_groups(capture, sharing.values, backend, share_concat=config.share_concat_scales)
    skipped = (*reading.skipped, *sharing.skipped)
    return Plan(
        config, layers, quantizers, tuple(sharing.blocks), _same_grid(groups, quantizers), skipped
    )


def _paths(model: nn.Module, reading: Reading) -> list[str]:
    """Return every path that a rule can name."""
    paths = [path for path, _ in model.named_modules() if path]
    weights = [join_path(path, "weight_quantizer") for path in ["", *paths]]
    inputs = [join_path(path, "input_quantizer") for path in ["", *paths]]
    blocks = [reader.quantizer for reader in reading.readers]
    skipped = [skip.path for skip in reading.skipped]
    return [*paths, *weights, *inputs, *blocks, *skipped]


def _calls_of_blocks(root: Call) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {}
    todo = [root]
    while todo:
        call = todo.pop()
        if call.module is not None:
            calls.setdefault(call.name, []).append(call)
        todo.extend(call.children)
    return calls


def _layers(reading: Reading, sharing: Sharing, folds: dict[str, str]) -> tuple[LayerPlan, ...]:
    def plan(reader: Reader) -> LayerPlan:
        kind = type(reader.calls[0].module).__name__
        return LayerPlan(reader.path, kind, folds.get(reader.path), reader.path in sharing.relieved)

    return tuple(plan(reader) for reader in reading.readers if reader.is_layer)


def _in_order(reading: Reading, sharing: Sharing) -> tuple[QuantizerPlan, ...]:
    """Return all quantizers: each tensor's where it is first read, then its readers' weights."""
    owned = {path: plan for plan in sharing.quantizers for path in (plan.path, *plan.aliases)}
    ordered: dict[str, QuantizerPlan] = {}
    for reader in reading.readers:
        if reader.quantizer in owned:
            plan = owned[reader.quantizer]
            ordered.setdefault(plan.path, plan)
        if reader.path in reading.weights and reader.is_layer:
            spec, reason = reading.weights[reader.path]
            path = join_path(reader.path, "weight_quantizer")
            ordered[path] = QuantizerPlan(path, (), "weight", spec, reason)
    return tuple(ordered.values())


def _same_grid(
    groups: tuple[tuple[str, ...], ...], quantizers: tuple[QuantizerPlan, ...]
) -> tuple[tuple[str, ...], ...]:
    """Split each group by grid: only quantizers with the same codes can have the same scale.

    A fixed range stays as it was fixed.
    """
    spec = {plan.path: plan.spec for plan in quantizers}
    result = []
    for group in groups:
        by_grid: dict[object, list[str]] = {}
        for path in group:
            if spec[path].observer != "fixed":
                by_grid.setdefault(spec[path].grid, []).append(path)
        result += [tuple(paths) for paths in by_grid.values() if len(paths) > 1]
    return tuple(result)
