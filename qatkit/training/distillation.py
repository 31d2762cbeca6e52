"""`Distiller`: a loss that draws a model to the outputs and features of a teacher."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.config import require_match
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.graph.structure import tensors
from qatkit.modes import require_module, training_flags
from qatkit.spec import suggest
from qatkit.training.wrappers import unwrapped

LogitsLoss = Literal["kl", "mse", "cosine"]
FeatureLoss = Literal["mse", "cosine"]
Select = Callable[[Any], Tensor]


class Distiller:
    """The loss between a student in training and a teacher, mostly the float model from before.

    Call it after each forward of the student with the same input; it runs the teacher, in eval mode
    and without gradient, and returns::

        logits_weight * logits(student, teacher) + feature_weight * mean(features)

    ======== =======================================================================================
    loss     of student s and teacher t, in float32
    ======== =======================================================================================
    kl       ``T ** 2 * mean(sum(softmax(t / T) * (log_softmax(t / T) - log_softmax(s / T))))``, the
             sum over the classes and the mean over the rest
    mse      ``mean((s - t) ** 2)``
    cosine   ``mean(1 - cos(s, t))``, over the classes for logits, over all but the batch for
             features
    ======== =======================================================================================

    Features are outputs of modules. A glob is matched against the paths that both models have, as
    in `qatkit.Rule`; of modules inside each other the outermost is taken, so that ``layer*`` is
    layer1, layer2 ... and not what is in them. For a teacher of another architecture give a dict of
    paths instead.

    The student keeps hooks until `close`, or the end of a ``with``; a copy or a pickle of the
    student has none that does anything. Make it after wrapping in ``DistributedDataParallel`` or
    before, with either model. Under autocast call it inside or outside.

    Args:
        student: the model in training.
        teacher: the model to learn from: ``copy.deepcopy(model)`` before `prepare`, which works in
            place; of a prepared model the copy with `disable_quantization` applied to it.
        logits: the loss of the outputs, ``None`` for features alone.
        temperature: T, what logits are divided by.
        logits_weight: weight of the loss of the outputs.
        features: globs, or a dict from paths in the student to paths in the teacher.
        feature_loss: the loss of the features.
        feature_weight: weight of the mean of the losses of all features.
        class_axis: the axis of the classes in the logits: 1 for (N, C) and (N, C, H, W), -1 for
            (N, L, C).
        select: takes the logits out of what the models return; by default the only tensor of floats
            in there.

    Raises:
        QatkitError: student and teacher are one model or share a parameter, a glob matches nothing,
            or a setting is out of its range.

    Source: Hinton et al. 2015 (arXiv:1503.02531); Polino et al. 2018 (arXiv:1802.05668) for
        quantized students.

    >>> import copy
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> teacher = copy.deepcopy(net)
    >>> x = torch.randn(2, 4)
    >>> with Distiller(net, teacher, features=("0",)) as distill:
    ...     output = net(x)
    ...     loss = distill(x, output)  # + criterion(output, target)
    >>> loss.item() < 1e-6, loss.requires_grad
    (True, True)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        logits: LogitsLoss | None = "kl",
        temperature: float = 4.0,
        logits_weight: float = 1.0,
        features: Iterable[str] | Mapping[str, str] = (),
        feature_loss: FeatureLoss = "mse",
        feature_weight: float = 1.0,
        class_axis: int = 1,
        select: Select | None = None,
    ) -> None:
        """Attach the hooks."""
        require_module(student, "Distiller")
        require_module(teacher, "Distiller")
        _check_apart(student, teacher)
        _check_choice(logits, "logits", (None, *get_args(LogitsLoss)))
        _check_choice(feature_loss, "feature_loss", get_args(FeatureLoss))
        _check_positive(temperature, "temperature", above=0.0)
        _check_positive(logits_weight, "logits_weight")
        _check_positive(feature_weight, "feature_weight")
        self.student, self.teacher = student, teacher
        self._logits, self._temperature, self._axis = logits, temperature, class_axis
        self._weights = logits_weight, feature_weight
        self._feature_loss, self._select = feature_loss, select
        self._pairs = _pairs(unwrapped(student), unwrapped(teacher), features)
        if logits is None and not self._pairs:
            raise QatkitError(
                "Distiller(logits=None, features=()): nothing to learn; give features, or "
                "logits='kl'"
            )
        self._versions = self._teacher_versions()
        self._attach()

    def __call__(self, inputs: Any, student_output: Any) -> Tensor:
        """Return the loss between the last forward of the student and the teacher.

        Args:
            inputs: what the student ran on: a tensor, a tuple of positional or a dict of keyword
                arguments.
            student_output: what it returned.

        Returns:
            () float32, with a gradient for the student alone.

        Raises:
            QatkitError: the shapes differ, the student was not run since the last call, or there is
                more than one tensor to take as logits.
        """
        self._warn_if_teacher_trains()
        expected = self._run_teacher(inputs)
        total = torch.zeros((), device=_device_of(student_output))
        logits_weight, feature_weight = self._weights
        if self._logits is not None:
            ours, theirs = self._pick(student_output), self._pick(expected)
            _check_shapes(ours, theirs, "the logits")
            total = total + logits_weight * self._logits_loss(ours.float(), theirs.float())
        terms = [self._loss_of_feature(*pair) for pair in self._pairs]
        self._taps_of_student.clear()
        self._taps_of_teacher.clear()
        if terms:
            total = total + feature_weight * torch.stack(terms).mean()
        return total

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """The paths of the features: pairs (in the student, in the teacher)."""
        return self._pairs

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taps_of_student.clear()
        self._taps_of_teacher.clear()

    def __enter__(self) -> Distiller:
        """Return the distiller."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return both models and the settings; hooks are attached anew."""
        left_out = ("_handles", "_taps_of_student", "_taps_of_teacher", "_versions")
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return {**kept, "_open": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state and attach the hooks, unless it was closed."""
        attached = state.pop("_open")
        self.__dict__.update(state)
        self._versions = self._teacher_versions()
        self._attach()
        if not attached:
            self.close()

    def _attach(self) -> None:
        """Record features while a whole forward of the model runs: not when a checkpoint redoes it.

        Without features there is nothing to hook.
        """
        self._taps_of_student = _Taps()
        self._taps_of_teacher = _Taps()
        self._handles: list[Any] = []
        for index, model in enumerate((unwrapped(self.student), unwrapped(self.teacher))):
            taps = (self._taps_of_student, self._taps_of_teacher)[index]
            modules = dict(model.named_modules())
            for path in {pair[index]: None for pair in self._pairs}:
                handle = modules[path].register_forward_hook(_Tap(taps, path))
                self._handles.append(handle)
            if self._pairs:
                self._handles.append(model.register_forward_pre_hook(_Start(taps)))
                self._handles.append(model.register_forward_hook(_Stop(taps), always_call=True))

    def _run_teacher(self, inputs: Any) -> Any:
        with torch.no_grad(), training_flags(self.teacher.modules(), False):
            if isinstance(inputs, Mapping):
                return self.teacher(**inputs)
            return self.teacher(*inputs) if isinstance(inputs, tuple) else self.teacher(inputs)

    def _pick(self, output: Any) -> Tensor:
        if self._select is not None:
            return self._select(output)
        found = [x for x in tensors(output) if x.is_floating_point()]
        if len(found) != 1:
            raise QatkitError(
                f"Distiller: the models return {len(found)} tensors of floats in a "
                f"{type(output).__name__}; give select=, a function that takes out the logits"
            )
        return found[0]

    def _logits_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        axis = self._axis
        if not -ours.dim() <= axis < ours.dim():
            raise QatkitError(
                f"Distiller(class_axis={axis}): the logits have shape {tuple(ours.shape)}; "
                "give the axis of the classes"
            )
        if self._logits == "mse":
            return F.mse_loss(ours, theirs)
        if self._logits == "cosine":
            return (1 - F.cosine_similarity(ours, theirs, dim=axis)).mean()
        ours = F.log_softmax(ours / self._temperature, dim=axis)
        theirs = F.log_softmax(theirs / self._temperature, dim=axis)
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(axis)
        return divergence.mean() * self._temperature**2

    def _loss_of_feature(self, ours: str, theirs: str) -> Tensor:
        found, wanted = self._taps_of_student.of(ours), self._taps_of_teacher.of(theirs)
        for path, outputs, who in ((ours, found, "student"), (theirs, wanted, "teacher")):
            if not outputs:
                raise QatkitError(
                    f"Distiller: {path!r} gave no tensor in the last forward of the {who}; run the "
                    "student before each call, and choose modules that its forward calls"
                )
        if len(found) != len(wanted):
            raise QatkitError(
                f"Distiller: {ours!r} gave {len(found)} tensors in the student and {theirs!r} "
                f"{len(wanted)} in the teacher; choose features that both give alike"
            )
        for a, b in zip(found, wanted, strict=True):
            _check_shapes(a, b, f"the feature {ours!r}")
        losses = [self._one(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(losses).mean()

    def _one(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self._feature_loss == "mse":
            return F.mse_loss(ours, theirs)
        flat = [x.flatten(1) if x.dim() > 1 else x[None] for x in (ours, theirs)]
        return (1 - F.cosine_similarity(flat[0], flat[1], dim=1)).mean()

    def _teacher_versions(self) -> list[int]:
        return [parameter._version for parameter in self.teacher.parameters()]

    def _warn_if_teacher_trains(self) -> None:
        """Warn once if the weights of the teacher have changed since the last call."""
        if torch.compiler.is_compiling():
            return
        now = self._teacher_versions()
        if now != self._versions:
            self._versions = now
            warnings.warn(
                "Distiller: the weights of the teacher have changed since it was made; give the "
                "optimizer the parameters of the student alone",
                stacklevel=3,
            )


class _Taps:
    """The outputs of some modules in the last forward of a model, by path."""

    def __init__(self) -> None:
        self.recording = False
        self._outputs: dict[str, list[Tensor]] = {}

    def add(self, path: str, output: Any) -> None:
        floats = [x for x in tensors(output) if x.is_floating_point()]
        self._outputs.setdefault(path, []).extend(floats)

    def of(self, path: str) -> list[Tensor]:
        return self._outputs.get(path, [])

    def clear(self) -> None:
        self._outputs.clear()


class _Hook:
    """A hook that records; copies and pickles of the model it is on get one that does not."""

    def __init__(self, taps: _Taps | None = None, path: str = "") -> None:
        self._taps, self._path = taps, path

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _Start(_Hook):
    def __call__(self, _: nn.Module, __: Any) -> None:
        if self._taps is not None:
            self._taps.clear()
            self._taps.recording = True


class _Stop(_Hook):
    def __call__(self, _: nn.Module, __: Any, ___: Any) -> None:
        if self._taps is not None:
            self._taps.recording = False


class _Tap(_Hook):
    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._taps is not None and self._taps.recording:
            self._taps.add(self._path, output)


def _pairs(
    student: nn.Module, teacher: nn.Module, features: Iterable[str] | Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """Return the paths of the features in both models."""
    ours, theirs = (dict(model.named_modules()) for model in (student, teacher))
    if isinstance(features, Mapping):
        for path, known, who in (
            *((path, ours, student) for path in features),
            *((path, theirs, teacher) for path in features.values()),
        ):
            if path not in known:
                raise QatkitError(
                    f"Distiller: {type(who).__name__} has no module {path!r}; "
                    f"{suggest(path, tuple(known)[1:9])}"
                )
        return tuple(features.items())
    if isinstance(features, str) or not all(isinstance(each, str) for each in features):
        raise QatkitTypeError(
            f"Distiller(features={features!r}): give a tuple of globs, or a dict of paths"
        )
    common = [path for path in theirs if path and path in ours]
    chosen: dict[str, None] = {}
    for pattern in features:
        require_match(pattern, common, f"Distiller(features={pattern!r})")
        hits = [path for path in common if fnmatch.fnmatchcase(path, pattern)]
        inner = {path for path in hits if any(path.startswith(f"{each}.") for each in hits)}
        chosen |= dict.fromkeys(path for path in hits if path not in inner)
    return tuple((path, path) for path in chosen)


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    if unwrapped(student) is unwrapped(teacher):
        raise QatkitError(
            "Distiller: student and teacher are the same object; prepare works in place, so make "
            "the teacher before it: teacher = copy.deepcopy(model)"
        )
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise QatkitError(
            f"Distiller: student and teacher share the parameter {shared[0]!r}; make the teacher "
            "with copy.deepcopy(model) before prepare"
        )


def _check_choice(value: object, name: str, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        words = tuple(each for each in choices if each is not None)
        raise QatkitError(f"Distiller({name}={value!r}): {suggest(str(value), words)}")


def _check_positive(value: object, name: str, above: float = -1.0) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not max(0.0, above) <= value < math.inf or value == above:  # type: ignore[operator]
        kind = "a positive number" if above == 0 else "0 or more"
        raise QatkitError(f"Distiller({name}={value!r}): give {kind}")


def _check_shapes(ours: Tensor, theirs: Tensor, what: str) -> None:
    if ours.shape != theirs.shape:
        raise QatkitError(
            f"Distiller: {what} has shape {tuple(ours.shape)} in the student and "
            f"{tuple(theirs.shape)} in the teacher; run both on the same input, "
            "or choose features of one shape"
        )


def _device_of(output: Any) -> torch.device | None:
    found = tensors(output)
    return found[0].device if found else None
