"""How the forward of one block gets its quantizers, as frozen values: rewritten, or intercepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qatkit.graph.structure import Template, from_json


@dataclass(frozen=True)
class Site:
    """One quantizer call inside a block.

    Attributes:
        quantizer: its path relative to the block.
        source: index of the node whose value it quantizes.
        uses: pairs (index of a node that reads the value, index of the node it reads it from).
    """

    quantizer: str
    source: int
    uses: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Replacement:
    """One function call inside a block whose place a quantized module takes.

    Attributes:
        node: index of the node.
        module: path of the module relative to the block.
        function: name of the function.
    """

    node: int
    module: str
    function: str


@dataclass(frozen=True)
class BlockPlan:
    """One block whose forward gets quantizer calls.

    Attributes:
        path: path of the module, empty for the model itself.
        template: the form of its arguments (`qatkit.graph.structure`).
        signature: what its forward does (`qatkit.graph.level.signature`), checked when the plan is
            applied.
        sites: the quantizer calls.
        replacements: functions that become modules.
        returns: the containers that its children return (`qatkit.graph.tracer.Returns`).
        numbers: the template has a leaf for each integer too, which may then differ.
    """

    path: str
    template: Template
    signature: tuple[str, ...]
    sites: tuple[Site, ...]
    replacements: tuple[Replacement, ...] = ()
    returns: tuple[tuple[str, int, Template], ...] = ()
    numbers: bool = False


@dataclass(frozen=True)
class Operand:
    """One operand of a function that a block calls, and its quantizer.

    Attributes:
        function: canonical name of the function.
        number: which call of it in the block's own forward, from 0.
        argument: which of the tensors among its arguments.
        quantizer: path relative to the block.
    """

    function: str
    number: int
    argument: int
    quantizer: str


@dataclass(frozen=True)
class Substitution:
    """One function call of a block whose place a quantized module takes.

    Attributes:
        function: canonical name of the function.
        number: which call of it in the block's own forward, from 0.
        module: path of the module relative to the block.
    """

    function: str
    number: int
    module: str


@dataclass(frozen=True)
class InterceptionPlan:
    """One block whose forward no graph can hold: it runs as it is, its operands are quantized.

    Attributes:
        path: path of the module, empty for the model itself.
        operands: what is quantized.
        replacements: functions that become modules.
        counts: how often the forward calls each of these functions.
        children: paths of the modules that it calls, relative to the block.
    """

    path: str
    operands: tuple[Operand, ...]
    replacements: tuple[Substitution, ...]
    counts: tuple[tuple[str, int], ...]
    children: tuple[str, ...]


def block_from_dict(fields: Mapping[str, Any]) -> BlockPlan:
    """Rebuild a plan from its fields, also after a trip through JSON."""
    sites = tuple(
        Site(site["quantizer"], site["source"], tuple((use, arg) for use, arg in site["uses"]))
        for site in fields["sites"]
    )
    template = from_json(list(fields["template"]))
    replaced = tuple(Replacement(**entry) for entry in fields.get("replacements", ()))
    signature = tuple(fields["signature"])
    returns = from_json(list(fields.get("returns", ())))
    numbers = bool(fields.get("numbers", False))
    return BlockPlan(fields["path"], template, signature, sites, replaced, returns, numbers)


def interception_from_dict(fields: Mapping[str, Any]) -> InterceptionPlan:
    """Rebuild a plan from its fields, also after a trip through JSON."""
    return InterceptionPlan(
        fields["path"],
        tuple(Operand(**entry) for entry in fields["operands"]),
        tuple(Substitution(**entry) for entry in fields["replacements"]),
        tuple((name, int(count)) for name, count in fields["counts"]),
        tuple(fields["children"]),
    )
