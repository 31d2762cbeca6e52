"""Turn a recorded run into a `Plan`: pure analysis, nothing is changed."""

from __future__ import annotations

from qatkit.config import QuantConfig
from qatkit.errors import QatkitError
from qatkit.graph.capture import Capture
from qatkit.graph.folds import find_folds
from qatkit.graph.joins import read_gates, read_joins, read_pools
from qatkit.graph.layers import name_unreached, read_layers
from qatkit.graph.levels import Levels
from qatkit.graph.nonnegative import nonnegative_values, with_unsigned
from qatkit.graph.plan import LayerPlan, Plan, QuantizerPlan, join_path
from qatkit.graph.products import read_products
from qatkit.graph.readers import Reading
from qatkit.graph.results import read_operands, read_results
from qatkit.graph.scale_groups import find_groups
from qatkit.graph.sharing import Sharing, share


def place(capture: Capture, config: QuantConfig) -> Plan:
    """Decide where every quantizer goes.

    Raises:
        QatkitError: a rule of ``config`` matches nothing, or there is nothing to quantize.
    """
    reading = Reading(capture, config, Levels(capture))
    read_layers(reading)
    read_products(reading)
    read_joins(reading)
    read_results(reading)
    read_gates(reading)
    read_pools(reading)
    read_operands(reading)
    name_unreached(reading)
    config.check_patterns(_paths(reading))
    sharing = share(reading)
    quantizers = _in_order(reading, sharing)
    if not quantizers:
        kind = type(capture.copy).__name__
        raise QatkitError(
            f"{kind}: nothing to quantize; it has no enabled convolution or linear layer"
        )
    groups = find_groups(
        capture, sharing.values, reading.backend, share_concat=config.share_concat_scales
    )
    groups = _same_grid(groups, quantizers)
    if config.unsigned_activations:
        nonnegative = nonnegative_values(capture)
        quantizers = with_unsigned(quantizers, sharing.values, groups, nonnegative, reading.backend)
    return Plan(
        config,
        _layers(reading, sharing, find_folds(capture)),
        quantizers,
        tuple(sharing.blocks),
        groups,
        (*reading.skipped, *sharing.skipped),
        len(capture.root.template[1]) - 1,
        tuple(sharing.interceptions),
    )


def _paths(reading: Reading) -> list[str]:
    """Return every path that a rule can name."""
    paths = [path for path, _ in reading.capture.copy.named_modules() if path]
    weights = [join_path(path, "weight_quantizer") for path in ["", *paths]]
    inputs = [join_path(path, "input_quantizer") for path in ["", *paths]]
    skipped = [skip.path for skip in reading.skipped]
    operands = sorted(reading.asked | reading.operand_names())
    return [*paths, *weights, *inputs, *operands, *skipped]


def _layers(reading: Reading, sharing: Sharing, folds: dict[str, str]) -> tuple[LayerPlan, ...]:
    """Return the layers to swap in order of execution."""
    first = {path: calls[0].index for path, calls in reading.levels.calls.items()}
    order = sorted(reading.layers, key=lambda path: first.get(path, first.get(_parent(path), 0)))
    return tuple(
        LayerPlan(path, reading.layers[path], folds.get(path), path in sharing.relieved)
        for path in order
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _in_order(reading: Reading, sharing: Sharing) -> tuple[QuantizerPlan, ...]:
    """Return all quantizers in order of execution, those of a layer after its inputs."""
    plan_of = {path: plan for plan in sharing.quantizers for path in (plan.path, *plan.aliases)}
    found = [
        (reader.calls[0].index, 0, plan_of[reader.quantizer])
        for reader in reading.readers
        if reader.quantizer in plan_of
    ]
    first = {path: calls[0].index for path, calls in reading.levels.calls.items()}
    first |= {path: calls[0].index for path, calls in reading.replaced.items()}
    found += [(first[path], 1, plan) for path, owned in reading.owned.items() for plan in owned]
    found.sort(key=lambda entry: entry[:2])
    return tuple({plan.path: plan for _, _, plan in found[::-1]}.values())[::-1]


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
