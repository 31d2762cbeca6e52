"""What `prepare` is going to do, as a frozen value: printable, comparable and writable as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qatkit.config import QuantConfig
from qatkit.graph.block_plan import (
    BlockPlan,
    InterceptionPlan,
    block_from_dict,
    interception_from_dict,
)
from qatkit.spec import QuantSpec


def join_path(parent: str, name: str) -> str:
    """Return the path of a child; the model itself has the empty path.

    >>> join_path("layer1", "conv"), join_path("", "conv")
    ('layer1.conv', 'conv')
    """
    return f"{parent}.{name}" if parent else name


def relative(parent: str, path: str) -> str:
    """Return a path relative to a block around it.

    >>> relative("layer1", "layer1.0.conv"), relative("", "conv")
    ('0.conv', 'conv')
    """
    return path.removeprefix(f"{parent}." if parent else "")


@dataclass(frozen=True)
class QuantizerPlan:
    """One quantizer.

    Attributes:
        path: where it is registered.
        aliases: other paths under which the same quantizer stands, one for each further layer that
            reads the tensor.
        role: ``"weight"`` or ``"activation"``.
        spec: how it quantizes.
        reason: the rule that asks for it.
        channels: length of ``spec.axis`` in a tensor that a forward computes from parameters;
            ``None`` for a parameter, which knows it.
    """

    path: str
    aliases: tuple[str, ...]
    role: str
    spec: QuantSpec
    reason: str
    channels: int | None = None


@dataclass(frozen=True)
class LayerPlan:
    """One layer that is swapped in place.

    Attributes:
        path: path of the module.
        kind: name of its float class.
        batch_norm: path of the batch norm that is folded into the weight, ``None`` for none; while
            training only with `QuantConfig.fold_batch_norm`, in an exported file always.
        input_is_quantized: the block around it runs its input quantizer.
    """

    path: str
    kind: str
    batch_norm: str | None = None
    input_is_quantized: bool = False


@dataclass(frozen=True)
class Skip:
    """Something that stays float, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that `prepare` does to a model.

    Attributes:
        config: what was asked for.
        layers: layers to swap.
        quantizers: quantizers to make.
        blocks: blocks to rewrite.
        interceptions: blocks that run as they are, with quantized operands.
        groups: paths of quantizers that share a scale.
        skipped: what stays float and why.
        arguments: how many positional arguments the example inputs were.
    """

    config: QuantConfig
    layers: tuple[LayerPlan, ...]
    quantizers: tuple[QuantizerPlan, ...]
    blocks: tuple[BlockPlan, ...]
    groups: tuple[tuple[str, ...], ...]
    skipped: tuple[Skip, ...]
    arguments: int = 1
    interceptions: tuple[InterceptionPlan, ...] = ()

    @property
    def changed(self) -> tuple[BlockPlan | InterceptionPlan, ...]:
        """All blocks that get another forward."""
        return (*self.blocks, *self.interceptions)

    def __str__(self) -> str:
        """Return two tables: what is quantized, what is not, each line with its reason."""
        weights = sum(q.role == "weight" for q in self.quantizers)
        head = (
            f"{len(self.layers)} layers, "
            f"{weights} weight and {len(self.quantizers) - weights} activation quantizers, "
            f"{len(self.changed)} rewritten blocks, {len(self.groups)} shared scales, "
            f"{len(self.skipped)} left in float"
        )
        rows = [("quantizer", "bits", "observer", "why"), *(_row(q) for q in self.quantizers)]
        lines = [head, "", *table(rows)]
        if self.groups:
            shared = [("shared scale (F8, F9)",), *((", ".join(group),) for group in self.groups)]
            lines += ["", *table(shared)]
        if self.skipped:
            left = [("left in float", "why"), *((skip.path, skip.reason) for skip in self.skipped)]
            lines += ["", *table(left)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_dict`, also after a trip through JSON."""
        return cls(
            config=QuantConfig.from_dict(fields["config"]),
            layers=tuple(LayerPlan(**layer) for layer in fields["layers"]),
            quantizers=tuple(_quantizer_from_dict(entry) for entry in fields["quantizers"]),
            blocks=tuple(block_from_dict(block) for block in fields["blocks"]),
            groups=tuple(tuple(group) for group in fields["groups"]),
            skipped=tuple(Skip(**skip) for skip in fields["skipped"]),
            arguments=int(fields.get("arguments", 1)),
            interceptions=tuple(map(interception_from_dict, fields.get("interceptions", ()))),
        )


def _row(entry: QuantizerPlan) -> tuple[str, str, str, str]:
    spec = entry.spec
    observer = spec.observer if spec.axis is None else f"{spec.observer}, axis {spec.axis}"
    shared = f"; also {', '.join(entry.aliases)}" if entry.aliases else ""
    bits = f"{spec.num_bits}" if spec.signed else f"{spec.num_bits} unsigned"
    return entry.path, bits, observer, entry.reason + shared


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Align the columns, the last one ragged."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _quantizer_from_dict(fields: Mapping[str, Any]) -> QuantizerPlan:
    known = dict(fields)
    return QuantizerPlan(
        **{**known, "aliases": tuple(known["aliases"]), "spec": QuantSpec.from_dict(known["spec"])}
    )
