"""Match the graph of a block, node by node, with what a `Capture` saw happen inside the block."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qatkit.graph.capture import Call, Value
from qatkit.graph.kinds import function_name
from qatkit.graph.level import LevelError, signature, trace_level
from qatkit.graph.structure import Template, flatten, unflatten
from qatkit.graph.tracer import Returns, of_form, returned_form


@dataclass(frozen=True, eq=False)
class Level:
    """A traced block whose nodes are matched with a recorded call.

    Attributes:
        graph: the graph of the block's forward in eval mode.
        template: the form of its arguments.
        numbers: whether integers are leaves of the template.
        returns: what its children return.
        values: what each node that stands for tensors held in the recorded run.
        calls: the recorded call of each node that is one.
    """

    graph: fx.Graph
    template: Template
    numbers: bool
    returns: Returns
    values: dict[fx.Node, Any]
    calls: dict[fx.Node, Call]


def match(block: nn.Module, calls: list[Call]) -> tuple[Level, ...]:
    """Trace ``block`` and match the nodes with each of the recorded ``calls`` of it.

    Integers among the arguments stay open if the forward can be traced so.

    Raises:
        LevelError: the graph is not what the recorded run did, the calls have different forms, or
            training does something else than eval.
    """
    if _form_of(calls[0], numbers=True)[0] != calls[0].template:
        with contextlib.suppress(LevelError):
            return _match(block, calls, numbers=True)
    return _match(block, calls, numbers=False)


def _match(block: nn.Module, calls: list[Call], *, numbers: bool) -> tuple[Level, ...]:
    template, returns = _form_of(calls[0], numbers=numbers)[0], _returns(calls[0])
    for call in calls:
        if _form_of(call, numbers=numbers)[0] != template or _returns(call) != returns:
            raise LevelError("it is called with arguments of several forms")
    graph = trace_level(block, template, training=False, returns=returns).graph
    training = trace_level(block, template, training=True, returns=returns).graph
    if signature(graph) != signature(training):
        raise LevelError("its forward does other operations in training than in eval")
    levels = []
    for call in calls:
        values, calls_of = _Matcher(graph, call).run(_form_of(call, numbers=numbers)[1])
        levels.append(Level(graph, template, numbers, returns, values, calls_of))
    return tuple(levels)


def _form_of(call: Call, *, numbers: bool) -> tuple[Template, list[Any]]:
    """Return the form of a recorded call, and the values and integers that it was given."""
    given = unflatten(call.template, iter(call.inputs))
    return flatten(given, Value, numbers=numbers)


def _returns(call: Call) -> Returns:
    """Return the containers that the children of a recorded call returned."""
    times: Counter[str] = Counter()
    found = []
    for child in call.children:
        path = child.name.removeprefix(f"{call.name}." if call.name else "")
        form = None if child.module is None else returned_form(child.outputs, Value)
        if form is not None:
            found.append((path, times[path], form))
        times[path] += child.module is not None
    return tuple(found)


class _Matcher:
    """Walks the nodes and the recorded calls side by side."""

    def __init__(self, graph: fx.Graph, call: Call) -> None:
        self._graph = graph
        self._root = call
        self._pending = list(call.children)
        self._values: dict[fx.Node, Any] = {}
        self._calls: dict[fx.Node, Call] = {}
        self._items: dict[Value, list[Value]] = {}

    def run(self, given: list[Any]) -> tuple[dict[fx.Node, Any], dict[fx.Node, Call]]:
        inputs = iter(given)
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(inputs)
            elif node.op == "call_module":
                self._take(node, self._module_call(node))
            elif node.op in ("call_function", "call_method"):
                self._function(node)
            elif node.op == "output":
                self._check_output(node)
        if any(not _constant(call) for call in self._pending):
            raise LevelError(f"torch.fx did not see its operation {self._pending[0].name!r}")
        return self._values, self._calls

    def _module_call(self, node: fx.Node) -> Call:
        assert self._root.module is not None
        module = self._root.module.get_submodule(str(node.target))
        while self._pending:
            call = self._pending.pop(0)
            if call.module is module:
                if not self._reads(node, call):
                    raise LevelError(f"its module {node.target!r} reads what was written in place")
                return call
            if not _constant(call):
                break
        raise LevelError(f"torch.fx and the recorded run disagree at its module {node.target!r}")

    def _function(self, node: fx.Node) -> None:
        attribute = node.target is getattr
        name = str(node.args[1]) if attribute else function_name(node.target)
        source: Any = node.args[0] if node.args else None
        if node.target is of_form:
            self._values[node] = self._values[source]
            return
        if node.target is OrderedDict:
            items: Any = fx.node.map_arg(node.args[0], lambda arg: self._values.get(arg))
            self._values[node] = OrderedDict((key, value) for key, value in items)
            return
        if name == "getitem" and isinstance(self._values.get(source), tuple | list | dict):
            self._values[node] = self._values[source][node.args[1]]
            return
        if name == "getitem" and self._take_item(node, source):
            return
        for skipped, call in enumerate(self._pending):
            if call.module is None and call.name == name and self._reads(node, call):
                del self._pending[: skipped + 1]
                self._take(node, call)
                return
            if not _constant(call):
                return

    def _take_item(self, node: fx.Node, source: Any) -> bool:
        """Match one item of ``a, b, c = tensor``: the recorded run unbinds the tensor at once."""
        value = self._values.get(source)
        if type(node.args[1]) is not int or not isinstance(value, Value):
            return False
        pending = next((call for call in self._pending if not _constant(call)), None)
        if pending is not None and pending.name == "unbind" and pending.inputs[0] is value:
            del self._pending[: self._pending.index(pending) + 1]
            self._items[value] = pending.results
        if value not in self._items:
            return False
        self._values[node] = self._items[value][node.args[1]]
        return True

    def _reads(self, node: fx.Node, call: Call) -> bool:
        """Tell whether the node reads the values that the call read.

        The graph knows nothing of writing in place (``x += y`` shows as ``x + y``): a node may hold
        what another name of the same tensor has overwritten since.
        """
        held = [self._values[arg] for arg in node.all_input_nodes if arg in self._values]
        known = {id(value) for value in flatten(held, Value)[1]}
        read = {id(value) for value in call.inputs}
        return known <= read and all(
            id(value) in known for value in call.inputs if not value.constant
        )

    def _take(self, node: fx.Node, call: Call) -> None:
        self._calls[node] = call
        self._values[node] = call.outputs
        prefix = f"{self._root.name}." if self._root.name else ""
        named = {value.name: value for value in call.inputs if value.name}
        for argument in node.all_input_nodes:
            name = f"{prefix}{argument.target}"
            if argument.op == "get_attr" and name in named:
                self._values[argument] = named[name]

    def _check_output(self, node: fx.Node) -> None:
        returned = fx.node.map_arg(node.args[0], lambda arg: self._values.get(arg))
        expected = self._root.results
        if [id(value) for value in flatten(returned, Value)[1]] != [
            id(value) for value in expected
        ]:
            raise LevelError("torch.fx and the recorded run disagree about what it returns")
        if _form(self._root.outputs) != _form(_plain(returned)):
            raise LevelError("it returns an object that is not a tensor, tuple, list or dict")


def _plain(value: Any) -> Any:
    """Return ``value`` as a compiled graph returns it: no subclass of list or dict outlives it."""
    if isinstance(value, dict):
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((key, _plain(item)) for key, item in value.items())
    if isinstance(value, tuple):
        return getattr(type(value), "_make", tuple)(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _form(value: Any) -> Any:
    """Return the nested classes of the containers in ``value``, the keys, and the constants."""
    if isinstance(value, Value):
        return Value
    if isinstance(value, dict):
        return type(value), *((key, _form(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), *(_form(item) for item in value)
    return value if flatten(value, Value)[0][0] == "const" else type(value)


def _constant(call: Call) -> bool:
    return call.module is None and all(value.constant for value in call.inputs)
