"""Between a prepared model and the files of ranges."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from torch import nn

from qatkit.errors import QatkitError
from qatkit.freeze import saved_range
from qatkit.modes import quantizers, select_quantizers
from qatkit.prepare import weight_quantizers
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec
from qatkit.tables.calibration_table import CalibrationTable, TableEntry
from qatkit.tables.encodings import Encoding, Encodings
from qatkit.tables.tensorrt_cache import TensorRTCache

Table: TypeAlias = CalibrationTable | TensorRTCache | Encodings | Mapping[str, tuple[float, float]]
_SHOWN = 5


def calibration_table(model: nn.Module) -> CalibrationTable:
    """Return the ranges of the activations of a prepared model, as a calibration table.

    Names are the paths of the quantizers; those without a range are left out.

    Raises:
        QatkitError: the model has no quantizers.
    """
    entries = []
    for path, quantizer in _with_ranges(_activations(model)).items():
        low, high = (float(end) for end in (quantizer.range[0].min(), quantizer.range[1].max()))
        entries.append(TableEntry(path, float(quantizer.amax.max()), low, high))
    return CalibrationTable(tuple(entries))


def tensorrt_cache(model: nn.Module, version: str = "8601") -> TensorRTCache:
    """Return the scales of the activations of a prepared model, as a TensorRT cache.

    Raises:
        QatkitError: the model has no quantizers, or one is not int8, symmetric and per tensor,
            which is all that a cache can say.
    """
    found = _with_ranges(_activations(model))
    for path, quantizer in found.items():
        _require_int8(quantizer.spec, path)
    return TensorRTCache({path: float(q.scale) for path, q in found.items()}, version)


def encodings(model: nn.Module) -> Encodings:
    """Return the grids of the activations and weights of a prepared model.

    Raises:
        QatkitError: the model has no quantizers.
    """
    activations = _activations(model)
    weights = {path: q for path, q in quantizers(model) if path not in activations}
    parts = (_with_ranges(part) for part in (activations, weights))
    return Encodings(*({path: _encodings_of(q) for path, q in part.items()} for part in parts))


def import_ranges(
    model: nn.Module, table: Table, *, names: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Set the ranges of activations from a table; all of them, or none if there is an error.

    A name stands for the activation quantizer at that path, or for the only one of the module
    there: ``conv1`` for ``conv1.input_quantizer``. Symmetric grids get exactly the threshold or
    scale of the table, affine ones its min and max. Quantizers that are not in the table keep what
    they have; training goes on with the new ranges unless they are frozen.

    Args:
        model: a prepared model.
        table: a calibration table, a TensorRT cache, encodings (those of the activations), or
            pairs (min, max) by name.
        names: name in the table -> path in the model, for the names that differ.

    Returns:
        the paths of the quantizers that got a range, in the order of the table.

    Raises:
        QatkitError: a name has no quantizer or shares one with another name, its grid is not the
            one of the table, or the model has no quantizers.

    >>> from qatkit.nn import QuantLinear
    >>> net = nn.Sequential(QuantLinear(2, 2))
    >>> import_ranges(net, {"0": (-1.0, 2.0)})
    ('0.input_quantizer',)
    >>> net[0].input_quantizer.amax.item()
    2.0
    """
    wanted = _entries(table)
    chosen = _match(model, tuple(wanted), names or {})
    ends = {name: _range(wanted[name], q.spec, name) for name, (_, q) in chosen.items()}
    before = [(q, saved_range(q)) for _, q in chosen.values()]
    try:
        for name, (_, quantizer) in chosen.items():
            quantizer.set_range(*ends[name])
    except Exception:
        for quantizer, state in before:
            quantizer.load_state_dict(state)
        raise
    return tuple(path for path, _ in chosen.values())


_Entry: TypeAlias = TableEntry | float | tuple[Encoding, ...] | tuple[float, float]


def _entries(table: Table) -> dict[str, _Entry]:
    if isinstance(table, CalibrationTable):
        return {entry.name: entry for entry in table.entries}
    if isinstance(table, TensorRTCache):
        return dict(table.scales)
    if isinstance(table, Encodings):
        return dict(table.activations)
    if isinstance(table, Mapping):
        return dict(table)
    raise QatkitError(
        f"import_ranges: table is a {type(table).__name__}, read it first, for example by "
        "qatkit.tables.read_calibration_table"
    )


def _match(
    model: nn.Module, wanted: tuple[str, ...], names: Mapping[str, str]
) -> dict[str, tuple[str, TensorQuantizer]]:
    """Return the path and quantizer of each name."""
    activations = _activations(model)
    inside: dict[str, list[str]] = {}
    for path in activations:
        inside.setdefault(path.rpartition(".")[0], []).append(path)
    owners = {module: paths[0] for module, paths in inside.items() if len(paths) == 1}
    paths = {name: owners.get(names.get(name, name), names.get(name, name)) for name in wanted}
    unused = [name for name in names if name not in wanted]
    if unused:
        raise QatkitError(f"import_ranges(names=...): {_some(unused)}: not in the table")
    unmatched = [name for name, path in paths.items() if path not in activations]
    if unmatched:
        known = (*activations, *(module for module in owners if module))
        close = difflib.get_close_matches(unmatched[0], known, n=1) or list(activations)[:1]
        raise QatkitError(
            f"import_ranges: {len(unmatched)} of {len(wanted)} names have no activation quantizer: "
            f"{_some(unmatched)}; give names=dict from them to paths of the model, "
            f"as {close[0]!r}"
        )
    taken: dict[str, str] = {}
    for name, path in paths.items():
        if path in taken:
            raise QatkitError(
                f"import_ranges: {taken[path]!r} and {name!r} are both for {path}, give one"
            )
        taken[path] = name
    return {name: (path, activations[path]) for name, path in paths.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _range(entry: _Entry, spec: QuantSpec, name: str) -> tuple[float, float]:
    """Return the range that gives the grid of ``spec`` what the table says."""
    if isinstance(entry, TableEntry):
        return _symmetric(entry.threshold, spec) if spec.symmetric else (entry.min, entry.max)
    if isinstance(entry, int | float):
        _require_int8(spec, name)
        return _symmetric(_amax(entry, spec), spec)
    if isinstance(entry[0], Encoding):
        return _range_of_encoding(entry, spec, name)
    low, high = entry
    return float(low), float(high)


def _range_of_encoding(
    group: tuple[Encoding, ...], spec: QuantSpec, name: str
) -> tuple[float, float]:
    first = group[0]
    if len(group) > 1 or (first.bitwidth, first.is_symmetric) != (spec.num_bits, spec.symmetric):
        raise QatkitError(
            f"import_ranges: {name!r} has {len(group)} encodings of {first.bitwidth} bits, "
            f"is_symmetric={first.is_symmetric}; the quantizer has one of {spec.num_bits} bits, "
            f"symmetric={spec.symmetric}; change its spec"
        )
    if not spec.symmetric:
        return first.min, first.max
    return _symmetric(_amax(first.scale, spec), spec)


def _symmetric(amax: float, spec: QuantSpec) -> tuple[float, float]:
    return (-amax if spec.signed else 0.0), amax


def _amax(scale: float, spec: QuantSpec) -> float:
    """Return the float32 that divided by the highest code is ``scale`` again, if there is one."""
    top, wanted = np.float32(spec.quant_max), np.float32(scale)
    near = wanted * top
    for each in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
        if each / top == wanted:
            return float(each)
    return float(near)


def _require_int8(spec: QuantSpec, name: str) -> None:
    if (spec.num_bits, spec.signed, spec.symmetric, spec.per_channel) != (8, True, True, False):
        raise QatkitError(
            f"{name}: {spec.num_bits} bits, signed={spec.signed}, symmetric={spec.symmetric}, "
            f"axis={spec.axis}; a TensorRT cache is for int8, symmetric, per tensor"
        )


def _encodings_of(quantizer: TensorQuantizer) -> tuple[Encoding, ...]:
    spec = quantizer.spec
    lowest = -(1 << (spec.num_bits - 1)) if spec.signed else 0
    pairs = zip(quantizer.scale.reshape(-1), quantizer.zero_point.reshape(-1), strict=True)
    found = []
    for scale, zero_point in ((float(s), int(z)) for s, z in pairs):
        offset = lowest - zero_point
        high = scale * (offset + (1 << spec.num_bits) - 1)
        low = scale * offset
        found.append(Encoding(spec.num_bits, spec.symmetric, low, high, scale, offset))
    return tuple(found)


def _activations(model: nn.Module) -> dict[str, TensorQuantizer]:
    select_quantizers(model, "*", "import_ranges")
    weights = {id(each) for each in weight_quantizers(model).values()}
    return {path: q for path, q in quantizers(model) if id(q) not in weights}


def _with_ranges(found: dict[str, TensorQuantizer]) -> dict[str, TensorQuantizer]:
    return {path: quantizer for path, quantizer in found.items() if quantizer.calibrated}
