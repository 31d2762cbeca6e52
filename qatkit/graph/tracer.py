"""The ``torch.fx`` tracer of one block: its child modules are opaque, their results are not."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from qatkit.errors import QatkitError
from qatkit.graph.guards import Unfaithful, modes
from qatkit.graph.structure import Template, flatten

Returns = tuple[tuple[str, int, Template], ...]
"""What child modules return: path, number of the call from 0, and the form of the result."""


class LevelTracer(fx.Tracer):
    """Stops at every child module, and where the forward changes the gradient or autocast mode.

    Args:
        returns: children that return tensors in tuples, lists or dicts: the forward gets such a
            container, with a proxy for each tensor, and can iterate over it.
    """

    proxy_buffer_attributes = True

    def __init__(self, returns: Returns = ()) -> None:
        """Remember the modes outside."""
        super().__init__()
        self._modes = modes()
        self._returns = {(path, number): form for path, number, form in returns}
        self._times: Counter[str] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say so of every module."""
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, unless a context is open that it would lose."""
        if modes() != self._modes:
            raise Unfaithful("it runs a part under no_grad or autocast")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Return a proxy, or a container of proxies."""
        path = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        form = self._returns.get((path, self._times[path]))
        self._times[path] += 1
        if form is None:
            return result
        if form[0] != "tuple":  # its length can change
            result = self.create_proxy("call_function", of_form, (result, form), {})
        return _contents(result, form)

    def create_arg(self, a: Any) -> Any:
        """Keep ordered dicts, which ``torch.fx`` makes plain."""
        if type(a) is OrderedDict:
            items = [[key, value] for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        return super().create_arg(a)


def of_form(value: Any, form: Template) -> Any:
    """Return ``value``.

    Raises:
        QatkitError: it has not the form that the block was rewritten for.
    """
    if flatten(value)[0] != form:
        raise QatkitError(
            f"a child module returns {_brief(value)} in another form than on example_inputs; "
            "give prepare example_inputs of the kind that the model is used with"
        )
    return value


def returned_form(outputs: Any, leaf: type) -> Template | None:
    """Return the form of a container of tensors and names, ``None`` for anything else."""
    form, leaves = flatten(outputs, leaf)
    return form if leaves and form[0] in ("tuple", "list", "dict") and _known(form) else None


def _known(form: Template) -> bool:
    """Tell whether nothing in a form depends on the data but the tensors."""
    if form[0] == "const":
        return form[1] is None or isinstance(form[1], str)
    items: Iterable[Template] = (item[1] for item in form[1:]) if form[0] == "dict" else form[1:]
    return form[0] in ("tensor", "tuple", "list", "dict") and all(_known(item) for item in items)


def _contents(result: Any, form: Template) -> Any:
    if form[0] == "tensor":
        return result
    if form[0] == "const":
        return form[1]
    if form[0] == "dict":
        return OrderedDict((key, _contents(result[key], item)) for key, item in form[1:])
    items = [_contents(result[i], item) for i, item in enumerate(form[1:])]
    return tuple(items) if form[0] == "tuple" else items


def _brief(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (list, tuple, Mapping)) else ""
    return f"a {type(value).__name__}{size}"
