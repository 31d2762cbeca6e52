"""A block whose class was exchanged for one with another forward: how it is copied and pickled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from qatkit.graph.block_plan import BlockPlan, InterceptionPlan


class PlannedBlock(nn.Module):
    """Base of the classes that are made for one block each, from its class and a plan.

    A pickle holds the float class, the plan and the state; the class is made anew from them.

    Attributes:
        float_class: the class of the block before.
        block_plan: what was done to its forward.
        become: makes the class: called with a float block and the plan.
    """

    float_class: ClassVar[type]
    block_plan: ClassVar[BlockPlan | InterceptionPlan]
    become: ClassVar[Callable[[nn.Module, Any], None]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the float class and the plan."""
        kind = type(self)
        return _blank, (kind.float_class, kind.block_plan, kind.become), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedBlock:
        """Copy the state; the forward is a pure function of it and is shared."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def planned_class(
    base: type[PlannedBlock],
    kind: type,
    plan: BlockPlan | InterceptionPlan,
    forward: Callable[..., Any],
    become: Callable[[nn.Module, Any], None],
) -> type:
    """Return a subclass of ``kind`` and ``base`` with another forward."""
    members = {
        "forward": forward,
        "float_class": kind,
        "block_plan": plan,
        "become": staticmethod(become),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (base, kind), members)


def _blank(kind: type, plan: Any, become: Callable[[nn.Module, Any], None]) -> nn.Module:
    """Make an object of the float class that becomes the block when its state is set."""

    def setstate(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = kind
        self.__dict__.update(state)
        become(self, plan)

    shell: type[nn.Module] = type(kind.__name__, (kind,), {"__setstate__": setstate})
    return shell.__new__(shell)
