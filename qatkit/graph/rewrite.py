"""Give a block a forward that calls quantizers inside.

It is the same object with the same attributes, still an instance of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qatkit.errors import QatkitError
from qatkit.graph.adapt import adapt
from qatkit.graph.block_plan import BlockPlan
from qatkit.graph.call_form import CallForm
from qatkit.graph.level import Trace, float_class, signature, trace_level
from qatkit.graph.linking import link_activations
from qatkit.graph.planned_block import PlannedBlock, planned_class
from qatkit.graph.structure import flatten


class RewrittenBlock(PlannedBlock):
    """Base of the classes that `rewrite` makes, one for each block."""

    block_plan: ClassVar[BlockPlan]


def rewrite(block: nn.Module, plan: BlockPlan) -> None:
    """Change the class of ``block`` to one whose forward calls the quantizers of ``plan``.

    The quantizers must be in place. Without them quantizing, the forward computes what it did
    before.

    Raises:
        QatkitError: the block's code is not the one that was planned for.
    """
    block.__class__ = _class(float_class(type(block)), plan, _body(block, plan))


@dataclass(frozen=True, eq=False)
class _Body:
    """The forward for calls of one form, and the settings of the block that it was made with."""

    form: CallForm
    evaluation: Callable[..., Any]
    training: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]


def _body(block: nn.Module, plan: BlockPlan) -> _Body:
    traces = [_trace(block, plan, training=training) for training in (False, True)]
    sources = [str(trace.graph.python_code("self").src) for trace in traces]
    evaluation = _compile(traces[0].graph)
    return _Body(
        CallForm(float_class(type(block)), plan.template, numbers=plan.numbers),
        evaluation,
        evaluation if sources[0] == sources[1] else _compile(traces[1].graph),
        tuple({**traces[0].settings, **traces[1].settings}.items()),
    )


def _trace(block: nn.Module, plan: BlockPlan, *, training: bool) -> Trace:
    """Trace the block and put the quantizer calls in."""
    trace = trace_level(block, plan.template, training=training, returns=plan.returns)
    graph = trace.graph
    if signature(graph) != plan.signature:
        where = plan.path or type(block).__name__
        raise QatkitError(
            f"{where}: its forward is not the one that was planned for; "
            "call qatkit.prepare(model, example_inputs) on the model as it is now"
        )
    nodes = list(graph.nodes)
    for site in plan.sites:
        source = nodes[site.source]
        first = min(use for use, _ in site.uses)
        with graph.inserting_before(nodes[first]):
            quantized = graph.create_node("call_module", site.quantizer, (source,))
        for use, argument in site.uses:
            nodes[use].replace_input_with(nodes[argument], quantized)
    for replaced in plan.replacements:
        node = nodes[replaced.node]
        with graph.inserting_before(node):
            module = graph.create_node("call_module", replaced.module, node.args, node.kwargs)
        node.replace_all_uses_with(module)
        graph.erase_node(node)
    link_activations(graph, block)
    return trace


def _class(kind: type, plan: BlockPlan, first: _Body) -> type:
    bodies = [first]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(self.__dict__.get(name) != value for name, value in first.settings):
            rewrite(self, plan)  # a dropout rate or a switch has changed
            return type(self).forward(self, *args, **kwargs)
        for body in bodies:
            leaves = body.form.leaves(args, kwargs)
            if leaves is not None:
                if plan.numbers and torch._C._get_tracing_state() is not None:
                    leaves = [_as_number(leaf) for leaf in leaves]
                return (body.training if self.training else body.evaluation)(self, *leaves)
        bodies.append(_body_for(self, plan, args, kwargs))
        return type(self).forward(self, *args, **kwargs)

    return planned_class(RewrittenBlock, kind, plan, forward, rewrite)


def _as_number(leaf: Any) -> Any:
    """Return the number that a size is: the ONNX exporter of PyTorch makes tensors of sizes."""
    size = isinstance(leaf, Tensor) and leaf.dim() == 0 and not leaf.is_floating_point()
    return int(leaf) if size else leaf


def _body_for(
    block: nn.Module, plan: BlockPlan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Body:
    """Return the forward for calls of a form that was not planned for."""
    adapted = adapt(plan, block, flatten((args, kwargs), numbers=plan.numbers)[0])
    if adapted is None:
        raise QatkitError(
            f"{plan.path or float_class(type(block)).__name__}: called with arguments of another "
            "form than in example_inputs, with which its forward does other operations; "
            "give prepare example_inputs in the form that the model is used with"
        )
    return _body(block, adapted)


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """Turn a graph into a function of (block, *tensors)."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<qatkit block>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function
