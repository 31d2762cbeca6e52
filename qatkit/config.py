"""Which tensors of a model are quantized and how: `QuantConfig`, its presets, and `Rule`."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qatkit.backend import Backend, ResidualPolicy, get_backend
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.spec import QuantSpec, suggest

Role = Literal["weight", "activation"]

WEIGHT = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
ACTIVATION = QuantSpec()


def matches(pattern: str, path: str) -> bool:
    """Tell whether a glob matches a whole module path, or the path of a module around it.

    >>> matches("conv1", "conv1.weight_quantizer"), matches("conv1", "layer1.0.conv1")
    (True, False)
    >>> matches("layer1", "layer1.0.conv1"), matches("*.conv1", "layer1.0.conv1")
    (True, True)
    """
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Rule:
    """An exception for the modules whose path a glob matches, and for everything inside them.

    The glob is matched against whole module paths (``conv1`` is not ``layer1.0.conv1``; write
    ``*.conv1`` for that) and against quantizer paths (``conv1.weight_quantizer``). ``None`` leaves
    a field as it is. Where several rules match, the later one wins, field by field.

    Attributes:
        pattern: the glob.
        enabled: False leaves the tensors in float.
        num_bits: width of weights and activations.
        observer: observer of the activations.
        percentile: percent of the activations cut per tail.
        weight: a whole spec for the weights, its ``axis`` taken literally.
        activation: a whole spec for the activations.
    """

    pattern: str
    enabled: bool | None = None
    num_bits: int | None = None
    observer: str | None = None
    percentile: float | None = None
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        """Check the fields, the values by making a spec with them."""
        if not isinstance(self.pattern, str) or not self.pattern:
            raise QatkitError(
                f"Rule(pattern={self.pattern!r}): "
                "give a glob over module paths, for example 'layer1.*'"
            )
        if self.enabled not in (None, True, False):
            raise QatkitError(
                f"Rule({self.pattern!r}, enabled={self.enabled!r}): give True, False or None"
            )
        for role, spec in (("weight", self.weight), ("activation", self.activation)):
            if spec is not None and not isinstance(spec, QuantSpec):
                raise QatkitTypeError(f"Rule({self.pattern!r}, {role}={spec!r}): give a QuantSpec")
        try:
            self.change(ACTIVATION, "activation")
        except QatkitError as error:
            raise QatkitError(f"Rule({self.pattern!r}): {error}") from None

    def change(self, spec: QuantSpec, role: Role) -> QuantSpec:
        """Return ``spec`` as this rule wants it."""
        whole = self.weight if role == "weight" else self.activation
        fields: dict[str, Any] = {"num_bits": self.num_bits}
        if role == "activation":
            fields |= {"observer": self.observer, "percentile": self.percentile}
        return (whole or spec).replace(
            **{name: value for name, value in fields.items() if value is not None}
        )


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a whole model.

    Attributes:
        weight: spec of the weights. With an ``axis`` it is per-channel, each layer using its own
            output axis (transposed convolutions stay per-tensor, see
            `qatkit.backend.Backend.axis_of_weight`).
        activation: spec of the activations, per-tensor.
        backend: name of the engine, which decides where quantizers go.
        rules: exceptions, the later one wins.
        fold_batch_norm: quantize the weight as it is after folding the batch norm behind it.
        share_concat_scales: one scale for all inputs of a concatenation (F9).
        first_last_bits: width of the first and the last weighted layer, ``None`` for no exception
            (F16).
        residual: which operand of an addition behind a convolution is quantized: ``"skip"``,
            ``"both"`` or ``"none"``; ``None`` for what the backend fuses (F6).
        transformer_residual: the same for an addition behind a linear layer or attention (F6c).
        unsigned_activations: codes from 0 for an activation that cannot be negative, such as the
            result of a ReLU, where the engine takes codes of that width: TensorRT up to 7 bits.

    Raises:
        QatkitError: the backend is unknown or cannot run such a spec.

    >>> config = QuantConfig(rules=(Rule("fc", enabled=False), Rule("conv1", num_bits=4)))
    >>> config.spec("fc", "weight") is None, config.spec("conv1", "weight").num_bits
    (True, 4)
    """

    weight: QuantSpec = field(default=WEIGHT)
    activation: QuantSpec = field(default=ACTIVATION)
    backend: str = "tensorrt"
    rules: tuple[Rule, ...] = ()
    fold_batch_norm: bool = True
    share_concat_scales: bool = True
    first_last_bits: int | None = None
    residual: ResidualPolicy | None = None
    transformer_residual: ResidualPolicy | None = None
    unsigned_activations: bool = False

    def __post_init__(self) -> None:
        """Check the fields against each other and against the backend."""
        object.__setattr__(self, "rules", _checked_rules(self.rules))
        for role in ("weight", "activation"):
            if not isinstance(getattr(self, role), QuantSpec):
                raise QatkitTypeError(
                    f"QuantConfig({role}={getattr(self, role)!r}): give a QuantSpec"
                )
        if self.first_last_bits is not None:
            self.weight.replace(num_bits=self.first_last_bits)
        for name in ("residual", "transformer_residual"):
            if getattr(self, name) not in (None, *get_args(ResidualPolicy)):
                raise QatkitError(
                    f"QuantConfig({name}={getattr(self, name)!r}): "
                    "give 'skip', 'both', 'none', or None for what the backend fuses"
                )
        backend = get_backend(self.backend)
        for spec, role, where in self._specs():
            _check_backend(spec, role, where, backend)
        if not isinstance(self.unsigned_activations, bool):
            raise QatkitError(
                f"QuantConfig(unsigned_activations={self.unsigned_activations!r}): "
                "give True or False"
            )
        widths = [spec.num_bits for spec, role, _ in self._specs() if role == "activation"]
        if self.unsigned_activations and not backend.unsigned_int8 and min(widths) >= 8:
            raise QatkitError(
                f"QuantConfig(unsigned_activations=True) with {min(widths)} bits, "
                f"{backend.name} runs int8; use num_bits of 7 or less, or leave it at False"
            )

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """Return the configuration called ``name``.

        Raises:
            QatkitError: no preset has this name.

        >>> QuantConfig.preset("tensorrt-w4a4").activation.num_bits
        4
        """
        if name not in PRESETS:
            raise QatkitError(f"unknown preset {name!r}: {suggest(name, tuple(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def of(cls, config: QuantConfig | str | None) -> QuantConfig:
        """Return ``config`` itself, the preset of that name, or the default for ``None``."""
        if config is None:
            return cls()
        if isinstance(config, str):
            return cls.preset(config)
        if not isinstance(config, cls):
            raise QatkitTypeError(
                f"config={config!r}: give a QuantConfig, "
                f"a preset name ({', '.join(PRESETS)}) or None"
            )
        return config

    def spec(self, path: str, role: Role, *, bits: int | None = None) -> QuantSpec | None:
        """Return the spec of the quantizer at ``path``, ``None`` where a rule disables it.

        Args:
            path: path of the module or of the quantizer.
            role: whether the tensor is a weight or an activation.
            bits: width to start from in place of the one of the config; rules still win.
        """
        spec = self.weight if role == "weight" else self.activation
        if bits is not None:
            spec = spec.replace(num_bits=bits)
        enabled = True
        for rule in self.rules:
            if matches(rule.pattern, path):
                spec = rule.change(spec, role)
                enabled = enabled if rule.enabled is None else rule.enabled
        return spec if enabled else None

    def names_axis(self, path: str) -> bool:
        """Tell whether a rule gives the weight at ``path`` a spec of its own, axis included."""
        return any(rule.weight is not None and matches(rule.pattern, path) for rule in self.rules)

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Raise a `QatkitError` for the first rule that matches none of ``paths``."""
        known = list(paths)
        for rule in self.rules:
            require_match(rule.pattern, known, f"Rule({rule.pattern!r})")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantConfig:
        """Rebuild a config from `to_dict`."""
        known = dict(fields)
        known["weight"] = QuantSpec.from_dict(known["weight"])
        known["activation"] = QuantSpec.from_dict(known["activation"])
        known["rules"] = tuple(_rule_from_dict(rule) for rule in known["rules"])
        return cls(**known)

    def _specs(self) -> Iterable[tuple[QuantSpec, Role, str]]:
        yield self.activation, "activation", "QuantConfig(activation=...)"
        yield self.weight, "weight", "QuantConfig(weight=...)"
        for rule in self.rules:
            where = f"Rule({rule.pattern!r})"
            yield rule.change(self.activation, "activation"), "activation", where
            yield rule.change(self.weight, "weight"), "weight", where


def require_match(pattern: str, paths: Iterable[str], where: str) -> None:
    """Raise a `QatkitError` that starts with ``where`` if ``pattern`` matches none of ``paths``."""
    known = list(paths)
    if any(fnmatch.fnmatchcase(path, pattern) for path in known):
        return
    deeper = [path for path in known if path.rsplit(".", 1)[-1] == pattern]
    hint = (
        f"write '*.{pattern}' to hit {deeper[0]!r}" if deeper else suggest(pattern, _modules(known))
    )
    raise QatkitError(f"{where}: the glob matches no module path of the model; {hint}")


def _modules(paths: list[str]) -> tuple[str, ...]:
    """Return a few paths of modules, to show what there is."""
    return tuple(path for path in paths if path and not path.endswith("quantizer"))[:8]


def _checked_rules(rules: object) -> tuple[Rule, ...]:
    if isinstance(rules, Rule) or not isinstance(rules, tuple | list):
        raise QatkitTypeError(f"QuantConfig(rules={rules!r}): give a tuple of Rule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise QatkitTypeError(
                f"QuantConfig(rules=...): {rule!r} is not a Rule, write Rule(pattern, ...)"
            )
    return tuple(rules)


def _check_backend(spec: QuantSpec, role: Role, where: str, backend: Backend) -> None:
    if role == "weight" and not spec.symmetric and backend.zero_point:
        raise QatkitError(
            f"{where}: symmetric=False on a weight, {backend.name} wants zero point 0 there; "
            "use symmetric=True"
        )
    if not backend.zero_point and not spec.symmetric:
        raise QatkitError(
            f"{where}: symmetric=False needs zero points, {backend.name} has none; "
            "use symmetric=True"
        )
    wide = backend.unsigned_int8 and role == "activation"
    if not wide and not spec.signed and spec.num_bits >= 8:
        raise QatkitError(
            f"{where}: signed=False with {spec.num_bits} bits, {backend.name} runs int8"
            f"{' weights' if backend.unsigned_int8 else ''}; use signed=True"
        )
    if role == "activation" and spec.per_channel:
        raise QatkitError(
            f"{where}: axis={spec.axis} on an activation, engines want per-tensor; use axis=None"
        )


def _rule_from_dict(fields: Mapping[str, Any]) -> Rule:
    known = dict(fields)
    for role in ("weight", "activation"):
        if known.get(role) is not None:
            known[role] = QuantSpec.from_dict(known[role])
    return Rule(**known)


PRESETS: Mapping[str, QuantConfig] = {
    "tensorrt-int8": QuantConfig(),
    "tensorrt-w4a4": QuantConfig(
        weight=WEIGHT.replace(num_bits=4),
        activation=ACTIVATION.replace(num_bits=4),
        first_last_bits=8,
    ),
    "onnxruntime-uint8": QuantConfig(backend="onnxruntime", unsigned_activations=True),
    "openvino-int8": QuantConfig(backend="openvino", unsigned_activations=True),
}
