"""Quantize what a block multiplies while its forward runs as it is.

For blocks that no graph can hold: they branch on shapes, keep attributes, open contexts. The
functions of the forward are known by name and number.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qatkit.errors import QatkitError
from qatkit.graph.block_plan import InterceptionPlan
from qatkit.graph.kinds import function_name
from qatkit.graph.level import float_class
from qatkit.graph.plan import join_path
from qatkit.graph.planned_block import PlannedBlock, planned_class
from qatkit.graph.structure import flatten, unflatten

_DEPTH = "_qatkit_depth"


class InterceptedBlock(PlannedBlock):
    """Base of the classes that `intercept` makes, one for each block."""

    block_plan: ClassVar[InterceptionPlan]


def intercept(block: nn.Module, plan: InterceptionPlan) -> None:
    """Change ``block`` so that its forward runs under the quantizers of ``plan``.

    The quantizers must be in place. Hooks on the modules that the forward calls tell their
    functions from its own.
    """
    depth = block.__dict__[_DEPTH] = _Depth()
    for path in plan.children:
        child = block.get_submodule(path)
        child.register_forward_pre_hook(_Enter(depth))
        child.register_forward_hook(_Leave(depth), always_call=True)
    become(block, plan)


def become(block: nn.Module, plan: InterceptionPlan) -> None:
    """Change the class of a block whose children have their hooks."""
    kind = float_class(type(block))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        operands = _Operands(self, plan)
        with operands:
            result = kind.forward(self, *args, **kwargs)
        operands.check()
        return result

    block.__class__ = planned_class(InterceptedBlock, kind, plan, forward, become)


class _Depth(threading.local):
    """How many calls of modules are open inside a block, in each thread."""

    def __init__(self) -> None:
        self.value = 0

    def __reduce__(self) -> tuple[type[_Depth], tuple[()]]:
        """Copies and pickles start outside of any call."""
        return type(self), ()


class _Enter:
    """Hook in front of a module that a block calls."""

    def __init__(self, depth: _Depth) -> None:
        self.depth = depth

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.depth.value += 1


class _Leave:
    """Hook behind a module that a block calls."""

    def __init__(self, depth: _Depth) -> None:
        self.depth = depth

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        self.depth.value -= 1


class _Operands(TorchFunctionMode):
    """Quantizes the operands of the functions of one forward."""

    def __init__(self, block: nn.Module, plan: InterceptionPlan) -> None:
        super().__init__()
        self._block = block
        self._plan = plan
        self._depth: _Depth = block.__dict__[_DEPTH]
        self._level = self._depth.value
        self._wanted = dict(plan.counts)
        self._times: Counter[str] = Counter()
        self._quantized: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth.value != self._level:
            return func(*args, **kwargs)
        name = function_name(func)
        if name not in self._wanted:
            return func(*args, **kwargs)
        number = self._times[name]
        self._times[name] += 1
        for one in self._plan.replacements:
            if (one.function, one.number) == (name, number):
                return self._block.get_submodule(one.module)(*args, **kwargs)
        found = [o for o in self._plan.operands if (o.function, o.number) == (name, number)]
        if found:
            template, leaves = flatten((args, kwargs))
            for operand in found:
                leaves[operand.argument] = self._quantize(
                    operand.quantizer, leaves[operand.argument]
                )
            args, kwargs = unflatten(template, iter(leaves))
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise a `QatkitError` if the forward called other functions than planned for.

        Raises:
            QatkitError: the numbers of its functions do not mean what they meant.
        """
        for name, wanted in self._wanted.items():
            if self._times[name] != wanted:
                where = self._plan.path or float_class(type(self._block)).__name__
                raise QatkitError(
                    f"{where}: its forward calls {name} {self._times[name]} times, and on "
                    f"example_inputs {wanted} times, so that its quantizers do not fit; give "
                    "prepare example_inputs like those that the model is used with, or "
                    f"Rule({join_path(self._plan.path, name) + '*'!r}, enabled=False)"
                )

    def _quantize(self, path: str, x: Tensor) -> Tensor:
        """Return ``x`` on the grid; a tensor that two functions read is quantized once."""
        quantizer = self._block.get_submodule(path)
        if torch.compiler.is_compiling() or x.is_inference():  # which cannot tell what was written
            return quantizer(x)  # type: ignore[no-any-return]
        key = path, id(x), x._version
        if key not in self._quantized:
            self._quantized[key] = x, quantizer(x)  # with x, so that no other gets its id
        return self._quantized[key][1]
