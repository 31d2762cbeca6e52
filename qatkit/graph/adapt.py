"""The plan of a block for calls of another form: with a mask, say, where there was none."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qatkit.graph.block_plan import BlockPlan
from qatkit.graph.call_form import CallForm
from qatkit.graph.level import LevelError, float_class, signature, trace_level
from qatkit.graph.structure import Template


def adapt(plan: BlockPlan, block: nn.Module, template: Template) -> BlockPlan | None:
    """Return ``plan`` for calls of the form ``template``.

    The forward has to do the same operations in the same order there; only what it is given may
    differ.

    Args:
        plan: made for calls of another form.
        block: the block.
        template: the form of ``(args, kwargs)``, see `qatkit.graph.structure`.

    Returns:
        the plan, ``None`` if the forward does other operations.
    """
    try:
        graph = trace_level(block, template, training=False, returns=plan.returns).graph
    except LevelError:
        return None
    lines = signature(graph)
    if _operations(lines) != _operations(plan.signature):
        return None
    kind = float_class(type(block))
    forms = [CallForm(kind, each, numbers=plan.numbers) for each in (plan.template, template)]
    before, after = (form.paths for form in forms)
    shift = len(after) - len(before)

    def moved(node: int) -> int:
        return node + shift if node >= len(before) else after.index(before[node])

    try:
        sites = tuple(
            replace(
                site,
                source=moved(site.source),
                uses=tuple((moved(use), moved(argument)) for use, argument in site.uses),
            )
            for site in plan.sites
        )
    except ValueError:  # what is quantized is not given
        return None
    replacements = tuple(replace(each, node=moved(each.node)) for each in plan.replacements)
    return replace(plan, template=template, signature=lines, sites=sites, replacements=replacements)


def _operations(lines: tuple[str, ...]) -> list[str]:
    """Return what the nodes behind the placeholders do, without what they read."""
    return [line.partition(" <- ")[0] for line in lines if not line.startswith("placeholder ")]
