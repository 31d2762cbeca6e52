"""`NanGuard`: leave out a batch whose loss is not finite, and name the module where it began."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qatkit.errors import QatkitTypeError
from qatkit.graph.structure import tensors
from qatkit.modes import require_module
from qatkit.quantizer import TensorQuantizer
from qatkit.running import uncompiled
from qatkit.training.wrappers import unwrapped

_KEPT_INPUTS = 4


class NanGuard:
    """Skip what a batch with NaN or Inf would do to a model in training.

    `skip` looks at the loss. Where that is not finite, batch norm statistics and ranges become what
    they were before the forward, a warning names the first module, in the order of the forward,
    whose output is not finite, and the loop goes on with the next batch: no backward, no optimizer
    step. The module is found by a second forward on the same input. A finite loss costs one look at
    it, and each forward in training a copy of the statistics.

    With several forwards for one loss all of them are undone. In a distributed run all processes
    skip if one has to. Gradients that overflow under a ``GradScaler`` are its own business: give
    `skip` the loss before it is scaled. Use it with ``torch.compile(model)``, made of either model.

    Args:
        model: any model, prepared or not; the one that the loop calls.

    Attributes:
        batches: how often `skip` was called.
        skipped: how often it returned True.

    Raises:
        QatkitError: the model is not a ``torch.nn.Module``.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with NanGuard(net) as guard, warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for x in (torch.ones(4, 2), torch.full((4, 2), math.nan)):
    ...         loss = net(x).square().mean()
    ...         if guard.skip(loss):
    ...             continue
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    >>> print(caught[0].message)
    batch 1 skipped, the loss is nan: the input of the model is not finite
    >>> bool(torch.isfinite(net[1].running_mean).all())
    True
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin to watch."""
        require_module(model, "NanGuard")
        self.batches = 0
        self.skipped = 0
        self._model = model
        self._inputs: deque[_Call] = deque(maxlen=_KEPT_INPUTS)
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._judged = True
        self._searching = False
        self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)

    def __enter__(self) -> NanGuard:
        """Return the guard."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Watch no more."""
        self._handle.remove()
        self._inputs.clear()
        self._saved.clear()
        self._stores.clear()

    def skip(self, *values: Tensor | float) -> bool:
        """Tell whether to go on with the next batch, because a value is not finite.

        Args:
            *values: the loss; the norm of the gradients can be given as well, or later in a call of
                its own before the optimizer step.

        Returns:
            whether one of them has a NaN or Inf, here or in another process. What the forward has
            changed is then undone, and a warning was given in each process that has one.

        Raises:
            QatkitError: a value is neither a tensor nor a number.
        """
        self.batches += not self._judged
        self._judged = True
        own = [value for value in values if not _is_finite(value)]
        if not _anywhere(bool(own), self._model):
            return False
        self.skipped += 1
        self._restore()
        cause = self._cause()
        if own:
            numbers = torch.as_tensor(own[0]).detach().flatten()
            bad = numbers[~torch.isfinite(numbers)][0].item()
            warnings.warn(
                f"batch {self.batches - 1} skipped, the loss is {bad}: {cause}", stacklevel=2
            )
        return True

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the statistics, if this is the first forward for a loss, and the input."""
        if self._searching or not self._model.training:
            return
        if self._judged:
            self._inputs.clear()
            self._save()
            self._judged = False
        self._inputs.append(_Call(args, kwargs))

    @torch.no_grad()
    def _save(self) -> None:
        live = [buffer for buffer in _statistics(self._model) if buffer.numel()]
        saved = []
        for buffer in live:
            store = self._stores.get(id(buffer))
            if store is None or store[0] is not buffer or store[1].shape != buffer.shape:
                store = (buffer, torch.empty_like(buffer))
            saved.append(store)
        self._stores = {id(buffer): (buffer, copy) for buffer, copy in saved}
        self._saved = saved
        if saved:
            torch._foreach_copy_([copy for _, copy in saved], live)

    @torch.no_grad()
    def _restore(self) -> None:
        for buffer, copy in self._saved:
            buffer.copy_(copy)
        for module in self._model.modules():
            if isinstance(module, TensorQuantizer) and not bool(module.num_batches > 0):
                module.reset_range()  # also what it knows besides the buffers

    def _cause(self) -> str:
        """Run the forwards again and say where the first NaN or Inf comes from."""
        calls, self._inputs = list(self._inputs), deque(maxlen=_KEPT_INPUTS)
        self._searching = True
        model = unwrapped(self._model)
        try:
            # All of them, whatever is found: other processes may wait for this one in between.
            found = [where for call in calls if (where := call.first_not_finite(model))]
        finally:
            self._searching = False
            self._restore()
        if not calls:
            return "no forward in training was seen since the last batch"
        return found[0] if found else "every output is finite, it begins in the loss or a gradient"


class _Hook:
    """Hands the input of each forward to a guard; a copy of the model has no guard."""

    def __init__(self, guard: NanGuard | None) -> None:
        self._guard = guard

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._guard is not None:
            self._guard._before_forward(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class _Call:
    """One call of the model, with the autocast that it was made under."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        given = tensors((args, kwargs))
        device = given[0].device if given else torch.device("cpu")
        self._device = device.type
        self._random = [] if device.type == "cpu" else [device]
        self._autocast = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type) if self._autocast else None

    def first_not_finite(self, model: nn.Module) -> str:
        """Return where the first output that is not finite comes from, empty if there is none."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(self._random, device_type=self._kind))
            if self._autocast:
                stack.enter_context(torch.autocast(self._device, dtype=self._dtype))
            stack.enter_context(uncompiled())
            found = stack.enter_context(_watching(model))
            model(*self._args, **self._kwargs)
        if not _all_finite((self._args, self._kwargs)):
            return "the input of the model is not finite"
        return found[0] if found else ""

    @property
    def _kind(self) -> str:
        """The kind of device that `_random` is of; what is given for none does not matter."""
        return self._device if self._random else "cuda"


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Collect a sentence for the first module whose output is not finite."""
    found: list[str] = []
    handles = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not _all_finite(output):
                found.append(_sentence(path, module))

        return hook

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(look(path)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _sentence(path: str, module: nn.Module) -> str:
    kind = type(module).__name__
    where = f"{path!r} ({kind})" if path else f"the model itself ({kind})"
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not _all_finite(value):
            return f"the first output that is not finite is that of {where}, whose {name} is not"
    return f"the first output that is not finite is that of {where}"


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """Yield the statistics and ranges that a forward in training may change."""
    for module in model.modules():
        if isinstance(module, TensorQuantizer | _NormBase):
            yield from module.buffers(recurse=False)
        if isinstance(module, TensorQuantizer):
            yield from module.parameters(recurse=False)


def _is_finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value.detach()).all())
    if isinstance(value, int | float):
        return math.isfinite(value)
    raise QatkitTypeError(
        f"NanGuard.skip: got a {type(value).__name__}; give the loss, a tensor or a number"
    )


def _all_finite(value: Any) -> bool:
    floats = (x for x in tensors(value) if x.is_floating_point() or x.is_complex())
    return all(bool(torch.isfinite(x.detach()).all()) for x in floats)


def _anywhere(here: bool, model: nn.Module) -> bool:
    """Tell whether it is so in any process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return here
    if distributed.get_world_size() == 1:
        return here
    device = next((parameter.device for parameter in model.parameters()), None)
    flag = torch.tensor(float(here), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag > 0)
