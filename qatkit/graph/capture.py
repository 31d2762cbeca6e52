"""Run a model once on a copy and record which operator read which value.

Nothing is traced symbolically: the model runs as it is, on the example inputs, so that
data-dependent control flow (detection models, user code) is no obstacle. The copy shares every
parameter with the model and has its own buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qatkit.copying import deepcopy
from qatkit.errors import QatkitError, shorten
from qatkit.graph.kinds import SHAPED_LIKE, function_name, is_leaf, kind_of, module_name
from qatkit.graph.structure import Template, flatten, map_tensors, tensors


@dataclass(eq=False, repr=False)
class Value:
    """One tensor at one moment: writing in place makes a new value.

    Attributes:
        producer: the operator that made it, ``None`` for inputs and constants.
        constant: a parameter, a buffer, or computed from nothing else.
        shape: its shape on the example inputs.
        name: path of the parameter or buffer that it is, else empty.
        consumers: the operators that read it, in order, each once.
    """

    producer: Call | None
    constant: bool
    shape: tuple[int, ...]
    name: str = ""
    consumers: list[Call] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Call:
    """One call of a module or a function.

    Attributes:
        name: path of the module, or name of the function (`qatkit.graph.kinds.function_name`).
        kind: kind of the operator; ``"Block"`` for a module that calls others.
        module: the module of the copy, ``None`` for a function.
        parent: the module call that it happened in.
        template: the shape of its arguments ``(args, kwargs)``.
        inputs: the values that it read.
        outputs: the values that it returned, as nested as the return value.
        children: the calls inside, in order.
        writes: the inputs that it changed in place.
        index: position among all calls.
    """

    name: str
    kind: str
    module: nn.Module | None
    parent: Call | None
    template: Template
    inputs: list[Value]
    outputs: Any = None
    children: list[Call] = field(default_factory=list)
    writes: list[Value] = field(default_factory=list)
    index: int = 0

    @property
    def results(self) -> list[Value]:
        """The returned values as a flat list."""
        return flatten(self.outputs, Value)[1]

    @property
    def data(self) -> list[Value]:
        """The inputs whose elements it reads: of the others it wants the shape only."""
        return self.inputs[:1] if self.name in SHAPED_LIKE else self.inputs

    def ancestors(self) -> Iterator[Call]:
        """Yield the enclosing calls, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True, eq=False)
class Capture:
    """A recorded run.

    Attributes:
        root: the call of the model itself.
        operators: every leaf module and function call in order of execution.
        outputs: what the model returned.
        copy: the copy that ran.
    """

    root: Call
    operators: tuple[Call, ...]
    outputs: Any
    copy: nn.Module


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the ``(args, kwargs)`` of a model call.

    A tuple is ``*args``, a dict is ``**kwargs``, anything else is one argument.
    """
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (example_inputs,), {}


def shadow(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that shares its parameters and has its own buffers.

    Raises:
        QatkitError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return deepcopy(model, memo)
    except Exception as error:
        kind = type(model).__name__
        raise QatkitError(
            f"{kind}: cannot be copied for analysis ({shorten(str(error))}); "
            "make copy.deepcopy(model) work"
        ) from None


def capture(model: nn.Module, example_inputs: Any) -> Capture:
    """Run a copy of ``model`` in eval mode without gradients and record it.

    Raises:
        QatkitError: the model cannot be copied or does not run on the inputs.
    """
    clone = shadow(model).eval()
    args, kwargs = split_inputs(example_inputs)
    recorder = _Recorder(clone)
    try:
        with torch.no_grad(), _own_random_numbers(model), recorder:
            outputs = clone(*args, **kwargs)
    except QatkitError:
        raise
    except Exception as error:
        kind = type(model).__name__
        raise QatkitError(
            f"{kind}: does not run on example_inputs ({shorten(str(error))}); "
            "pass a tensor, a tuple of positional arguments or a dict of keyword arguments "
            "that model(...) accepts"
        ) from None
    finally:
        recorder.remove_hooks()
    operators = tuple(call for call in recorder.calls if call.kind != "Block")
    return Capture(recorder.root, operators, outputs, clone)


def _own_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    """Give back the states of the random generators that the model can draw from."""
    tensors = (*model.parameters(), *model.buffers())
    return torch.random.fork_rng({t.device for t in tensors if t.device.type == "cuda"})


class _Recorder(TorchFunctionMode):
    """Records functions as a torch-function mode and modules by hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._stack: list[Call] = []
        self._given: list[list[tuple[Tensor, int]]] = []
        self._values: dict[int, tuple[Value, int]] = {}
        self._keep: list[Tensor] = []
        self._leaf_depth = 0
        self._handles: list[Any] = []
        named = (*model.named_parameters(), *model.named_buffers())
        self._constants = {id(tensor): name for name, tensor in named}
        for path, module in model.named_modules():
            before, after = self._hooks(path)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    @property
    def root(self) -> Call:
        """The call of the model."""
        return self.calls[0]

    def remove_hooks(self) -> None:
        """Leave the copy as it was."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._leaf_depth or not self._stack:
            return func(*args, **kwargs)
        given = tensors((args, kwargs))
        read = [(tensor, self._value(tensor), tensor._version) for tensor in given]
        result = func(*args, **kwargs)
        if not tensors(result):
            return result
        name = function_name(func)
        template, _ = flatten((args, kwargs))
        call = self._open(name, kind_of(name), None, template, [value for _, value, _ in read])
        untouched = {id(tensor) for tensor, _, version in read if tensor._version == version}
        call.writes = [value for tensor, value, _ in read if id(tensor) not in untouched]
        result = self._as_new(result, untouched)
        self._close(call, result)
        return result

    def _as_new(self, result: Any, given: set[int]) -> Any:
        """Give a tensor that was handed through a new identity, to tell it from the input."""
        self._leaf_depth += 1
        try:
            return map_tensors(result, lambda t: t.view_as(t) if id(t) in given else t)
        finally:
            self._leaf_depth -= 1

    def _hooks(self, path: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaf = is_leaf(module)
            if self._leaf_depth:
                return
            template, given = flatten((args, kwargs))
            kind = kind_of(module_name(module)) if leaf else "Block"
            values = [self._value(tensor) for tensor in given]
            self._stack.append(self._open(path, kind, module, template, values))
            self._given.append([(tensor, tensor._version) for tensor in given])
            self._leaf_depth += leaf

        def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            if self._leaf_depth and not (self._stack and self._stack[-1].module is module):
                return result
            self._leaf_depth -= is_leaf(module)
            call = self._stack.pop()
            given = self._given.pop()  # as it was: a forward may empty the lists it gets
            untouched = {id(tensor) for tensor, version in given if tensor._version == version}
            call.writes = [
                value
                for (tensor, _), value in zip(given, call.inputs, strict=True)
                if id(tensor) not in untouched
            ]
            if call.kind == "Block":
                if not call.children and any(id(t) in untouched for t in tensors(result)):
                    call.kind = "Identity"
                else:
                    call.outputs = map_tensors(result, self._value)
                    return result
            result = self._as_new(result, untouched)
            self._close(call, result)
            return result

        return before, after

    def _open(
        self,
        name: str,
        kind: str,
        module: nn.Module | None,
        template: Template,
        inputs: list[Value],
    ) -> Call:
        parent = self._stack[-1] if self._stack else None
        call = Call(name, kind, module, parent, template, inputs, index=len(self.calls))
        self.calls.append(call)
        if parent is not None:
            parent.children.append(call)
        return call

    def _close(self, call: Call, result: Any) -> None:
        """Give every returned tensor a new value made by ``call``."""
        for value in dict.fromkeys(call.inputs):
            value.consumers.append(call)
        constant = all(value.constant for value in call.inputs)
        for tensor in tensors(result):
            self._keep.append(tensor)
            value = Value(call, constant, tuple(tensor.shape))
            self._values[id(tensor)] = value, tensor._version
        call.outputs = map_tensors(result, self._value)

    def _value(self, tensor: Tensor) -> Value:
        """Return the value that ``tensor`` holds now.

        One never seen before is an input or a constant. One that was written since, through a view
        or by assignment, holds something of which nothing is known.
        """
        known = self._values.get(id(tensor))
        if known is None or known[1] != tensor._version:
            name = self._constants.get(id(tensor), "") if known is None else ""
            self._keep.append(tensor)
            known = Value(None, bool(name), tuple(tensor.shape), name), tensor._version
            self._values[id(tensor)] = known
        return known[0]
