"""`save` and `load`: a prepared model in one safetensors file, without pickle.

The file holds every tensor of the ``state_dict`` once, and in its metadata, as JSON under the key
``qatkit``: the format, the version, the plan, the switches of each quantizer, which batch norms are
frozen, and the further names of tensors that have several.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.files import replacing
from qatkit.graph.capture import shadow
from qatkit.graph.plan import Plan
from qatkit.modes import quantizers, require_module
from qatkit.nn.batchnorm import (
    batch_norms,
    freeze_statistics,
    statistics_are_frozen,
    thaw_statistics,
)
from qatkit.nn.functions import FUNCTIONS
from qatkit.prepare import apply_plan, plan_of
from qatkit.quantizer import Observe, TensorQuantizer
from qatkit.ranks import GATHER, require_whole
from qatkit.spec import QuantSpec
from qatkit.version import __version__

FORMAT = 1
_KEY = "qatkit"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a prepared model to a safetensors file: all of it or nothing.

    The file appears under its name only when it is complete; one that was there before stays until
    then. Attributes that are no tensors are not in it, as in a ``state_dict``.

    Args:
        model: a prepared model; a wrapper such as ``DistributedDataParallel`` holds it in
            ``.module``.
        path: the file to write; its folder must exist.

    Raises:
        QatkitError: the model is not prepared or holds something that is no tensor, or the file
            cannot be written.
        MissingExtraError: safetensors is not installed.

    >>> import tempfile
    >>> from qatkit.prepare import prepare
    >>> net = prepare(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(net, folder + "/net.safetensors")
    ...     again = load(nn.Sequential(nn.Linear(4, 2)), folder + "/net.safetensors")
    >>> torch.equal(again[0].weight, net[0].weight), type(again[0]).__name__
    (True, 'QuantLinear')
    """
    require_module(model, "save")
    require_whole(model, "save", GATHER)
    plan = plan_of(model)
    if plan is None:
        raise QatkitError(
            f"save: {type(model).__name__} is not prepared; call qatkit.prepare(model, "
            "example_inputs) first, pass the prepared model itself and not a wrapper around it, "
            "or use torch.save(model.state_dict(), path)"
        )
    tensors, aliases = _deduplicated(model)
    header = _Header(
        plan=plan,
        switches={path: _Switch.of(each) for path, each in quantizers(model)},
        frozen=tuple(path for path, norm in batch_norms(model) if statistics_are_frozen(norm)),
        aliases=aliases,
    )
    _write(Path(path), tensors, {"format": "pt", _KEY: json.dumps(header.to_dict())})


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Prepare a freshly built float model as the saved one was, and give it the saved state.

    The file is checked in full before the model is touched. Parameters stay where they are: same
    objects, same device. A model that was prepared by the same plan can be loaded into as well.

    Args:
        model: the float model, built by the same code as the one that was saved.
        path: a file of `save`.

    Returns:
        the same object.

    Raises:
        QatkitError: the file is missing, broken, of another format, or not of such a model. The
            model is then as it was.
        MissingExtraError: safetensors is not installed.
    """
    require_module(model, "load")
    require_whole(model, "load", "load first and call fully_shard then")
    header, tensors = _read(Path(path))
    existing = plan_of(model)
    if existing is not None and existing != header.plan:
        raise QatkitError(
            f"{path}: {type(model).__name__} is prepared by another plan than the saved model; "
            "build a fresh float model and load into it"
        )
    with _naming(path):
        rehearsal = shadow(model)
        if existing is None:
            _check_plan(header.plan, rehearsal)
            apply_plan(header.plan, rehearsal)
        _check_state(header, tensors, rehearsal)
        if existing is None:
            apply_plan(header.plan, model)
    _restore(model, header, tensors)
    return model


@dataclass(frozen=True)
class _Switch:
    """What a quantizer is set to.

    Attributes:
        quantize: on or off.
        observe: when it estimates.
        num_bits: its width now, which a schedule may have changed; ``None`` for that of the plan.
    """

    quantize: bool
    observe: Observe
    num_bits: int | None

    def __post_init__(self) -> None:
        """Check the width."""
        if self.num_bits is not None:
            QuantSpec(num_bits=self.num_bits)

    @classmethod
    def of(cls, quantizer: TensorQuantizer) -> _Switch:
        """Read it."""
        return cls(quantizer.quantize, quantizer.observe, quantizer.spec.num_bits)

    def set(self, quantizer: TensorQuantizer) -> None:
        """Set it; the tensors of the range are loaded next."""
        quantizer.quantize, quantizer.observe = self.quantize, self.observe
        if self.num_bits is not None:
            quantizer.spec = quantizer.spec.replace(num_bits=self.num_bits)


@dataclass(frozen=True)
class _Header:
    """What a file says besides the tensors.

    Attributes:
        plan: the plan that the model was prepared by.
        switches: of each quantizer.
        frozen: paths of the frozen batch norms.
        aliases: for each further name of a tensor the name it is stored under.
    """

    plan: Plan
    switches: Mapping[str, _Switch]
    frozen: tuple[str, ...]
    aliases: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "format": FORMAT,
            "version": __version__,
            "plan": self.plan.to_dict(),
            "quantizers": {path: asdict(each) for path, each in self.switches.items()},
            "frozen_batch_norms": list(self.frozen),
            "aliases": dict(self.aliases),
        }

    @classmethod
    def from_json(cls, text: str) -> _Header:
        """Parse what `to_dict` gave.

        Raises:
            QatkitError: it is another format.
            Exception: the text is broken.
        """
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise QatkitError(
                f"has format {fields['format']} of qatkit {fields['version']}, "
                f"qatkit {__version__} reads format {FORMAT}; install the version that wrote it"
            )
        switches = {
            str(path): _Switch(
                bool(each["quantize"]), _observe(each["observe"]), each.get("num_bits")
            )
            for path, each in fields["quantizers"].items()
        }
        frozen = tuple(str(path) for path in fields["frozen_batch_norms"])
        aliases = {str(name): str(first) for name, first in fields["aliases"].items()}
        return cls(Plan.from_dict(fields["plan"]), switches, frozen, aliases)


def _observe(name: Any) -> Observe:
    if name not in get_args(Observe):
        raise QatkitError(
            f"has a quantizer with observe={name!r}; the file is damaged, save it again"
        )
    mode: Observe = name
    return mode


def _deduplicated(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a model, each once, and the first name for each further name."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            kind = type(value).__name__ if not isinstance(value, Tensor) else "tensor without data"
            raise QatkitError(
                f"save: {name!r} is a {kind}, which a safetensors file cannot hold; "
                "make it a dense tensor or leave it out of the state_dict"
            )
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        dense = value.detach().cpu().contiguous()
        # A view: safetensors refuses tensors that overlap, and would write all of the storage.
        if dense.numel() * dense.element_size() != dense.untyped_storage().nbytes():
            dense = dense.clone()
        pointer = dense.untyped_storage().data_ptr()
        stored[name] = dense.clone() if pointer in storages else dense
        storages.add(pointer)
    return stored, aliases


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        from safetensors.torch import save as serialize
    except ImportError:
        raise MissingExtraError("safetensors", "save") from None
    with replacing(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata))


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    """Return what a file holds, each tensor under all its names."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors", "save") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise QatkitError(f"{path}: no such file; give one that qatkit.save wrote") from None
    except (OSError, SafetensorError) as error:
        raise QatkitError(
            f"{path}: cannot be read as safetensors ({shorten(str(error))}); "
            "give a file that qatkit.save wrote"
        ) from None
    if text is None:
        raise QatkitError(
            f"{path}: holds tensors but no plan; give a file that qatkit.save wrote, "
            "weights alone go in by model.load_state_dict"
        )
    with _naming(path):
        header = _Header.from_json(text)
        missing = sorted(set(header.aliases.values()) - set(tensors))
        if missing:
            raise QatkitError(
                f"lacks the tensor {missing[0]!r}; the file is damaged, save it again"
            )
    return header, tensors | {name: tensors[first] for name, first in header.aliases.items()}


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file in front of what goes wrong in the body."""
    try:
        yield
    except QatkitError as error:
        raise QatkitError(f"{os.fspath(path)}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {shorten(str(error), 120)}"
        raise QatkitError(
            f"{os.fspath(path)}: its plan cannot be used ({reason}); "
            "the file is damaged or of another model, save it again"
        ) from None


def _check_plan(plan: Plan, model: nn.Module) -> None:
    """Check that each quantizer has a plain name in a module that exists, and calls are of them.

    The names become code when blocks are rewritten, so those of a file are not taken on trust.
    """
    modules = {path for path, _ in model.named_modules()}
    for block in plan.changed:
        for replaced in block.replacements:
            parent, _, name = f"{block.path}.{replaced.module}".lstrip(".").rpartition(".")
            fits = parent in modules and name.isidentifier() and replaced.function in FUNCTIONS
            if not fits:
                raise QatkitError(
                    f"puts {replaced.module!r} for {replaced.function!r} into {block.path!r}, "
                    f"which fits nowhere in {type(model).__name__}; build the same float model"
                )
            modules.add(f"{parent}.{name}".lstrip("."))
    known = {path for entry in plan.quantizers for path in (entry.path, *entry.aliases)}
    for path in known:
        parent, _, name = path.rpartition(".")
        if parent not in modules or not re.fullmatch(r"\w+", name):
            raise QatkitError(
                f"has a quantizer {path!r} that fits nowhere in {type(model).__name__}; "
                "build the same float model"
            )
    called = [(block.path, site.quantizer) for block in plan.blocks for site in block.sites]
    called += [
        (block.path, each.quantizer) for block in plan.interceptions for each in block.operands
    ]
    for path, quantizer in called:
        if f"{path}.{quantizer}".lstrip(".") not in known:
            raise QatkitError(
                f"calls {quantizer!r} in {path!r}, which is no quantizer of it; "
                "the file is damaged, save it again"
            )
    for intercepted in plan.interceptions:
        children = {f"{intercepted.path}.{child}".lstrip(".") for child in intercepted.children}
        odd = children - modules
        if odd:
            raise QatkitError(
                f"expects {min(odd)!r}, which {type(model).__name__} lacks; "
                "build the same float model"
            )


def _check_state(header: _Header, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that a file fits a prepared model key by key."""
    wanted = model.state_dict()
    kind = type(model).__name__
    for label, found, against in (("lacks", wanted, tensors), ("has", tensors, wanted)):
        odd = [name for name in found if name not in against]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            contrast = "has" if label == "lacks" else "lacks"
            raise QatkitError(
                f"{label} {odd[0]!r}{more}, which {kind} {contrast}; build the same float model"
            )
    for name, tensor in wanted.items():
        ours = (tuple(tensor.shape), tensor.dtype)
        theirs = (tuple(tensors[name].shape), tensors[name].dtype)
        if ours != theirs:
            raise QatkitError(
                f"{name!r} is {theirs[0]} {theirs[1]} and in {kind} {ours[0]} {ours[1]}; "
                "build the same float model"
            )
    unknown = set(header.switches) ^ {path for path, _ in quantizers(model)}
    unknown |= set(header.frozen) - {path for path, _ in batch_norms(model)}
    if unknown:
        raise QatkitError(
            f"and {kind} differ in {min(unknown)!r}, a quantizer or a frozen batch norm; "
            "build the same float model"
        )


def _restore(model: nn.Module, header: _Header, tensors: Mapping[str, Tensor]) -> None:
    for path, quantizer in quantizers(model):
        header.switches[path].set(quantizer)
    model.load_state_dict(tensors)
    for path, norm in batch_norms(model):
        (freeze_statistics if path in header.frozen else thaw_statistics)(norm)
