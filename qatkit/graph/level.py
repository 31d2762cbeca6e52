"""The forward of one block as a graph of its child modules and its own operations.

The child modules are opaque. ``torch.fx`` traces the block alone, on a stand-in object, so that
tracing can damage nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qatkit.errors import QatkitError, shorten
from qatkit.graph.guards import PLAIN, Unfaithful, check_constants, faithful
from qatkit.graph.kinds import function_name
from qatkit.graph.plain_forwards import plain_forward
from qatkit.graph.structure import Template, rebuildable, unflatten
from qatkit.graph.tracer import LevelTracer, Returns
from qatkit.modes import training_flags
from qatkit.nn.functions import FUNCTIONS
from qatkit.quantizer import TensorQuantizer

_ADDED = (TensorQuantizer, *FUNCTIONS.values())
"""What `prepare` puts into blocks."""


class LevelError(QatkitError):
    """A block's forward cannot be rewritten; the message says why."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The forward of a block as a graph.

    Attributes:
        graph: its module targets are paths relative to the block.
        settings: the numbers, strings and switches among the block's attributes that it has read.
    """

    graph: fx.Graph
    settings: dict[str, Any]


def trace_level(
    block: nn.Module, template: Template, *, training: bool, returns: Returns = ()
) -> Trace:
    """Trace the forward of ``block`` for a call of the form ``template``.

    Args:
        block: a module; it is not changed.
        template: the form of ``(args, kwargs)``, see `qatkit.graph.structure`; its tensors are the
            placeholders.
        training: the mode to trace.
        returns: the containers that child modules return.

    Returns:
        the graph, and the settings it was made with.

    Raises:
        LevelError: the call or the forward cannot be expressed as a graph.
    """
    if "forward" in block.__dict__:
        raise LevelError("its forward was replaced on the object")
    if not rebuildable(template):
        raise LevelError(
            "it is called with arguments that are not tensors, numbers, tuples, lists or dicts"
        )
    twin = _stand_in(block, training)
    settings: dict[str, Any] = {}
    twin.__class__ = _flat_class(float_class(type(block)), template, settings)
    try:
        with faithful(twin), training_flags(list(block.modules())[1:], training):
            graph = LevelTracer(returns).trace(twin)
        check_constants(graph, block)
        return Trace(graph, settings)
    except Unfaithful as error:
        raise LevelError(str(error)) from None
    except Exception as error:
        raise LevelError(
            f"torch.fx cannot trace its forward ({shorten(str(error), 120)})"
        ) from None


def signature(graph: fx.Graph) -> tuple[str, ...]:
    """Return what a graph does, one line for each node, without the constants.

    A line is ``op target <- indices of the inputs``.
    """
    index = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        name = str(node.target) if node.op != "call_function" else function_name(node.target)
        reads = ",".join(str(index[arg]) for arg in node.all_input_nodes)
        lines.append(f"{node.op} {name} <- {reads}")
    return tuple(lines)


def float_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class whose forward a block has: ``kind`` itself unless it was rewritten."""
    return getattr(kind, "float_class", kind)


def _stand_in(block: nn.Module, training: bool) -> nn.Module:
    """Return an object with the state of ``block``: own containers, same children and tensors."""
    twin = nn.Module()
    for name, state in block.__dict__.items():
        if name == "_modules":  # a forward that walks over the children knows no quantizers
            own = {key: child for key, child in state.items() if not isinstance(child, _ADDED)}
            twin.__dict__[name] = own
        elif name in ("_parameters", "_buffers"):
            twin.__dict__[name] = dict(state)
        elif name.endswith("_hooks") or name.startswith("_qatkit"):
            continue
        else:
            twin.__dict__[name] = _own_copy(state)
    twin.__dict__["training"] = training
    return twin


def _own_copy(state: Any) -> Any:
    """Copy lists, dicts and sets, which a forward may write to; share everything else."""
    return copy.copy(state) if isinstance(state, list | dict | set) else state


def _flat_class(
    kind: type[nn.Module], template: Template, settings: dict[str, Any]
) -> type[nn.Module]:
    """Return a subclass of ``kind`` whose forward takes the tensors of the call one by one.

    The plain attributes that are read on the way are put into ``settings``.
    """
    count = _count_tensors(template)
    names = "".join(f", x{i}" for i in range(count))
    forward = plain_forward(kind)

    def call(self: nn.Module, *leaves: Any) -> Any:
        args, kwargs = unflatten(template, iter(leaves))
        return forward(self, *args, **kwargs)

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        public = name != "training" and not name.startswith("_")
        if public and name in object.__getattribute__(self, "__dict__") and _is_plain(value):
            settings[name] = copy.deepcopy(value)
        return value

    scope: dict[str, Any] = {"call": call}
    exec(f"def forward(self{names}):\n    return call(self{names})", scope)
    members = {"forward": scope["forward"], "__getattribute__": read}
    return type(kind.__name__, (kind,), members)


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a number, string or switch, or a list, tuple or dict of them."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in PLAIN


def _count_tensors(template: Template) -> int:
    if template[0] == "tensor":
        return 1
    if template[0] == "dict":
        return sum(_count_tensors(item) for _, item in template[1:])
    return (
        sum(_count_tensors(item) for item in template[1:])
        if template[0] in ("tuple", "list")
        else 0
    )
