"""Give a block a forward that calls quantizers inside.

It is the same object with the same attributes, still an instance of its class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import fx, nn

from qatkit.errors import QatkitError
from qatkit.graph.call_form import CallForm
from qatkit.graph.level import Trace, float_class, signature, trace_level
from qatkit.graph.plan import BlockPlan


class RewrittenBlock(nn.Module):
    """Base of the classes that `rewrite` makes, one for each block.

    A pickle holds the float class, the plan and the state; the forward is made anew from them.

    Attributes:
        float_class: the class of the block before.
        block_plan: the quantizer calls in its forward.
    """

    float_class: ClassVar[type]
    block_plan: ClassVar[BlockPlan]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the float class and the plan."""
        return _blank, (self.float_class, self.block_plan), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenBlock:
        """Copy the state; the forward is a pure function of it and is shared."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def rewrite(block: nn.Module, plan: BlockPlan) -> None:
    """Change the class of ``block`` to one whose forward calls the quantizers of ``plan``.

    The quantizers must be in place. Without them quantizing, the forward computes what it did
    before.

    Raises:
        QatkitError: the block's code is not the one that was planned for.
    """
    evaluation = _trace(block, plan, training=False)
    training = _trace(block, plan, training=True)
    block.__class__ = _class(float_class(type(block)), plan, evaluation, training)


def _trace(block: nn.Module, plan: BlockPlan, *, training: bool) -> Trace:
    """Trace the block and put the quantizer calls in."""
    trace = trace_level(block, plan.template, training=training)
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
    return trace


def _class(kind: type, plan: BlockPlan, evaluation: Trace, training: Trace) -> type:
    body = _compile(evaluation.graph)
    training_body = _compile(training.graph)
    sources = [str(trace.graph.python_code("self").src) for trace in (evaluation, training)]
    one = sources[0] == sources[1]
    settings = tuple({**evaluation.settings, **training.settings}.items())
    form = CallForm(kind, plan.template)
    where = plan.path or kind.__name__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(self.__dict__.get(name) != value for name, value in settings):
            rewrite(self, plan)  # a dropout rate or a switch has changed
            return type(self).forward(self, *args, **kwargs)
        leaves = form.tensors(args, kwargs)
        if leaves is None:
            raise QatkitError(
                f"{where}: called with arguments of another form than in example_inputs; "
                "give prepare example_inputs in the form that the model is used with"
            )
        return training_body(self, *leaves) if self.training and not one else body(self, *leaves)

    members = {
        "forward": forward,
        "float_class": kind,
        "block_plan": plan,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (RewrittenBlock, kind), members)


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """Turn a graph into a function of (block, *tensors)."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<qatkit block>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _blank(kind: type, plan: BlockPlan) -> nn.Module:
    """Make an object of the float class that becomes the rewritten block when its state is set."""

    def setstate(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = kind
        self.__dict__.update(state)
        rewrite(self, plan)

    shell: type[nn.Module] = type(kind.__name__, (kind,), {"__setstate__": setstate})
    return shell.__new__(shell)
