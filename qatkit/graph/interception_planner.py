"""Decide what is quantized in blocks that no graph can hold (`qatkit.graph.interception`)."""

from __future__ import annotations

from qatkit.graph.block_plan import InterceptionPlan, Operand, Substitution
from qatkit.graph.capture import Call
from qatkit.graph.plan import relative
from qatkit.graph.readers import Reader, Reading, call_number


class InterceptionPlanner:
    """Collects the functions of each block whose operands are quantized.

    Args:
        reading: what is quantized.
    """

    def __init__(self, reading: Reading) -> None:
        """Start with nothing."""
        self._reading = reading
        self._levels = reading.levels
        self._operands: dict[str, list[Operand]] = {}
        self._replacements: dict[str, list[Substitution]] = {}

    def quantize(self, readers: list[Reader], block: Call | None, quantizer: str) -> bool:
        """Let products of ``block`` read one tensor through ``quantizer``, if all readers are such.

        Additions stay float: a forward that branches adds now more, now less, and then nobody can
        tell which is which.

        Returns:
            whether that is possible.
        """
        if block is None or self._levels.functions(block) is None:
            return False
        around, products = self._levels.calls[block.name], self._reading.quantized
        for reader in readers:
            own = all(call.parent in around and call in products for call in reader.calls)
            if reader.is_layer or not own or any(call.module for call in reader.calls):
                return False
        places = [
            Operand(call.name, call_number(call), index, relative(block.name, quantizer))
            for reader in readers
            for call, read in zip(reader.calls, reader.values, strict=True)
            for index, value in enumerate(call.inputs)
            if value is read
        ]
        self._operands.setdefault(block.name, []).extend(dict.fromkeys(places))
        return True

    def replace(self, call: Call, module: str) -> None:
        """Let the module at a path take the place of a function."""
        block = call.parent
        assert block is not None
        place = Substitution(call.name, call_number(call), relative(block.name, module))
        self._replacements.setdefault(block.name, []).append(place)

    def plans(self) -> list[InterceptionPlan]:
        """Return what was collected."""
        return [self._plan(path) for path in dict.fromkeys([*self._operands, *self._replacements])]

    def _plan(self, path: str) -> InterceptionPlan:
        operands = tuple(dict.fromkeys(self._operands.get(path, ())))
        replacements = tuple(self._replacements.get(path, ()))
        calls = self._levels.calls[path]
        module, functions = calls[0].module, self._levels.functions(calls[0])
        assert module is not None
        assert functions is not None
        names = dict.fromkeys(
            [*(each.function for each in operands), *(each.function for each in replacements)]
        )
        called = [
            relative(path, child.name) for call in calls for child in call.children if child.module
        ]
        children = dict.fromkeys([*called, *(name for name, _ in module.named_children())])
        counts = tuple((name, functions[name]) for name in names)
        return InterceptionPlan(path, operands, replacements, counts, tuple(children))
