"""Run a model in other states than its own, and leave it exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.batches import device_of
from qatkit.errors import QatkitError
from qatkit.graph.structure import map_tensors, tensors
from qatkit.modes import quantizers, training_flags
from qatkit.nn.weights import weights_of
from qatkit.quantizer import TensorQuantizer
from qatkit.running import check_data, require_batches, run_over, uncompiled
from qatkit.spec import QuantSpec
from qatkit.training.bit_widths import set_num_bits

Restore = Callable[[], None]


class Probe:
    """A prepared model in eval mode whose quantizers can be switched; see `probing`.

    Every run starts with the same random numbers, so that two runs differ by the switches alone.

    Attributes:
        model: the model.
        batches: what the data yielded.
        on: the quantizers that were on at the start, by path.
        samples: how many samples the last run saw.
    """

    samples = 0

    def __init__(self, model: nn.Module, batches: list[Any], where: str) -> None:
        """Remember the state of the random numbers."""
        self.model, self.batches = model, batches
        self.on = {path: each for path, each in quantizers(model) if each.quantize}
        self._where = where
        self._same_numbers = _random_numbers(device_of(model))

    @contextmanager
    def only(self, paths: Iterable[str]) -> Iterator[None]:
        """Quantize nothing but what these quantizers read."""
        wanted = set(paths)
        before = [(each, each.quantize) for each in self.on.values()]
        try:
            for path, each in self.on.items():
                each.quantize = path in wanted
            yield
        finally:
            for each, state in before:
                each.quantize = state

    @contextmanager
    def at_width(self, paths: Iterable[str], num_bits: int) -> Iterator[None]:
        """Give these quantizers another width; their ranges stay."""
        chosen = [self.on[path] for path in paths]
        specs = [(each, each.spec) for each in chosen]
        with ExitStack() as stack:
            for each in chosen:
                change = set_num_bits(each, num_bits)
                if change is not None:
                    stack.callback(change.undo)
            stack.callback(_respecify, specs)
            yield

    def outputs(self) -> list[list[Tensor]]:
        """Return the floating-point tensors that the model returns for each batch.

        Raises:
            QatkitError: the model does not run on the data, or returns no such tensor.
        """
        found: list[list[Tensor]] = []

        def keep(_: nn.Module, __: Any, result: Any) -> None:
            found.append([each for each in tensors(result) if each.is_floating_point()])

        handle = self.model.register_forward_hook(keep)
        self._same_numbers()
        try:
            _, self.samples = run_over(self.model, self.batches, None, self._where, progress=False)
        finally:
            handle.remove()
        if not all(found):
            raise QatkitError(
                f"{self._where}: {type(self.model).__name__} returns no floating-point tensor for "
                f"batch {found.index([])}; give metric=a function of (model, batches)"
            )
        return found

    def score(self, metric: Callable[[nn.Module, list[Any]], float]) -> float:
        """Return what a function of the user says about the model as it is.

        Raises:
            QatkitError: it returns no number.
        """
        self._same_numbers()
        with torch.no_grad():
            value = metric(self.model, self.batches)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise QatkitError(
                f"{self._where}: metric returned {value!r}; return one number, "
                "the higher the better"
            ) from None


@contextmanager
def probing(
    model: nn.Module, data: Iterable[Any], batches: int | None, where: str
) -> Iterator[Probe]:
    """Hold a model in eval mode, with ranges that do not move, and the batches of the data.

    On leaving, also by an exception, switches, widths, training flags and random numbers are as
    before.

    Args:
        model: a prepared and calibrated model.
        data: yields batches, see `qatkit.batches.BatchReader`.
        batches: use only so many; ``None`` for all.
        where: who asks, for messages.

    Raises:
        QatkitError: a quantizer has no range, or there is no data.
    """
    check_data(data, batches, where)
    _require_ranges(model, where)
    states = [(each, each.quantize, each.observe) for _, each in quantizers(model)]
    same_numbers = _random_numbers(device_of(model))
    with ExitStack() as stack:
        stack.callback(same_numbers)
        stack.callback(_restore, states)
        stack.enter_context(training_flags(model.modules(), False))
        stack.enter_context(uncompiled())
        for each, _, observe in states:
            each.observe = "training" if observe == "always" else observe
        # A loader may hand out one buffer again and again.
        kept = [map_tensors(batch, torch.clone) for batch in islice(data, batches)]
        require_batches(len(kept), where)
        yield Probe(model, kept, where)


def _restore(states: list[tuple[TensorQuantizer, bool, Any]]) -> None:
    for quantizer, quantize, observe in states:
        quantizer.quantize, quantizer.observe = quantize, observe


def _respecify(specs: list[tuple[TensorQuantizer, QuantSpec]]) -> None:
    for quantizer, spec in specs:
        quantizer.spec = spec


def _require_ranges(model: nn.Module, where: str) -> None:
    follows = {id(weight.quantizer) for weight in weights_of(model)}
    for path, each in quantizers(model):
        latest = each.spec.memory == "latest" and each.observe != "never"
        if each.quantize and not each.has_range and not latest and id(each) not in follows:
            raise QatkitError(
                f"{where}: {path!r} has no range; run qatkit.calibrate(model, data) first, "
                f"or qatkit.disable_quantization(model, {path!r}).apply()"
            )


def _random_numbers(device: torch.device | None) -> Restore:
    """Return what brings all generators of random numbers back to where they are now."""
    state, plain, array = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_device: Mapping[torch.device, Tensor] = {}
    if device is not None and device.type == "cuda":
        on_device = {device: torch.cuda.get_rng_state(device)}

    def restore() -> None:
        torch.set_rng_state(state)
        random.setstate(plain)
        np.random.set_state(array)
        for each, numbers in on_device.items():
            torch.cuda.set_rng_state(numbers, each)

    return restore
