"""Read and write ONNX files without their weights in memory.

An ONNX file is one protobuf message, and protobuf holds messages whole: a file that is written or
read the usual way is in memory two or three times. Large initializers are written and read here one
by one instead. What is written is an ordinary file.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.export.file_size import too_large

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Array = Any
"""A NumPy array."""

LARGE = 1 << 16
"""Bytes from which on the data of an initializer stays in its file."""

_GRAPH = 7
_INITIALIZER = 5
_RAW_DATA = 9
"""Numbers of fields: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data."""

_BYTES = 2
"""The wire type of a field with a length."""

_MOST = (1 << 31) - 1
"""Bytes of the largest message that protobuf parses."""


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A model whose large initializers are still in its file.

    Attributes:
        model: the model; where data was left in the file, a tensor says so by its
            ``data_location``.
        path: the file.
        places: the offset and the number of the bytes that were left there, by tensor name.
        folder: where further files of tensors lie.
    """

    model: ModelProto
    path: Path = Path()
    places: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    folder: str = ""

    def array(self, tensor: TensorProto) -> Array:
        """Return the value of a tensor; nothing of it stays in memory here."""
        import onnx
        from onnx import numpy_helper

        if tensor.data_location != onnx.TensorProto.EXTERNAL or tensor.name not in self.places:
            return numpy_helper.to_array(tensor, self.folder)
        start, count = self.places[tensor.name]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        data = np.fromfile(self.path, np.uint8, count, offset=start)
        return data.view(kind.newbyteorder("<")).reshape(tensor.dims)


def read_model(path: Path) -> OnnxFile:
    """Return the model in a file; the data of its large initializers stays there.

    Raises:
        Exception: the file cannot be read or is damaged, in the words of onnx.
    """
    import onnx

    folder = str(path.parent)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model, places = _split(data)
    except (ValueError, IndexError, KeyError, TypeError):
        return OnnxFile(onnx.load(path, load_external_data=False), path, folder=folder)
    return OnnxFile(model, path, MappingProxyType(places), folder)


def write_model(
    model: ModelProto, path: Path, values: Mapping[str, Callable[[], Array]] | None = None
) -> None:
    """Write a file; of its initializers one at a time is in memory besides ``model``.

    Args:
        model: the model.
        path: the file.
        values: makes the value of an initializer that has a type and dimensions only, by name.

    Raises:
        QatkitError: protobuf cannot express so large a file.
    """
    values = values or {}
    graph = _without(model.graph, "initializer").SerializeToString()
    sizes = [_size(tensor, tensor.name in values) for tensor in model.graph.initializer]
    total = len(graph) + sum(len(_header(_INITIALIZER, size)) + size for size in sizes)
    head = _without(model, "graph").SerializeToString() + _header(_GRAPH, total)
    if len(head) + total > _MOST:
        raise too_large("the file", ValueError(f"{len(head) + total} bytes"))
    with path.open("wb") as file:
        file.write(head)
        file.write(graph)
        for tensor, size in zip(model.graph.initializer, sizes, strict=True):
            file.write(_header(_INITIALIZER, size))
            file.write(tensor.SerializeToString())
            if tensor.name in values:
                value = np.ascontiguousarray(values[tensor.name]())
                file.write(_header(_RAW_DATA, value.nbytes))
                file.write(value.astype(value.dtype.newbyteorder("<"), copy=False).data)


def _size(tensor: TensorProto, filled: bool) -> int:
    """Return the bytes of a tensor in the file, of one whose value is yet to come too."""
    from onnx import helper

    if not filled:
        return int(tensor.ByteSize())
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = math.prod(tensor.dims) * kind.itemsize
    size: int = tensor.ByteSize() + len(_header(_RAW_DATA, count)) + count
    return size


def _without(message: Any, name: str) -> Any:
    """Return a copy of a message that lacks one of its fields."""
    copy = type(message)()
    for one, value in message.ListFields():
        if one.name == name:
            continue
        if isinstance(value, str | bytes | int | float):
            setattr(copy, one.name, value)
        elif hasattr(value, "extend"):
            getattr(copy, one.name).extend(value)
        else:
            getattr(copy, one.name).CopyFrom(value)
    return copy


def _split(data: Any) -> tuple[ModelProto, dict[str, tuple[int, int]]]:
    """Return the model in a file and the places of what was left out of it."""
    import onnx

    model, graph = bytearray(), bytearray()
    places = {}
    for number, start, body, end in _fields(data, 0, len(data)):
        if number != _GRAPH:
            model += data[start:end]
            continue
        for inner, first, inside, last in _fields(data, body, end):
            if inner != _INITIALIZER or last - inside <= LARGE:
                graph += data[first:last]
                continue
            tensor, place = _tensor(data, inside, last)
            light = tensor.SerializeToString()
            graph += _header(_INITIALIZER, len(light)) + light
            if place is not None:
                places[tensor.name] = place
    found = onnx.ModelProto.FromString(bytes(model))
    if graph:
        found.graph.ParseFromString(bytes(graph))
    return found, places


def _tensor(data: Any, start: int, end: int) -> tuple[TensorProto, tuple[int, int] | None]:
    """Return a tensor without its raw data, if that is large, and where this is.

    Only of the types that NumPy has: others lie there in another form.
    """
    import onnx

    rest, place = bytearray(), None
    for number, first, body, last in _fields(data, start, end):
        if number == _RAW_DATA and last - body > LARGE:
            place = body, last - body
        else:
            rest += data[first:last]
    tensor = onnx.TensorProto.FromString(bytes(rest))
    if place is None:
        return tensor, None
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if not kind.isbuiltin or kind.itemsize * math.prod(tensor.dims) != place[1]:
        return onnx.TensorProto.FromString(data[start:end]), None
    tensor.data_location = onnx.TensorProto.EXTERNAL
    return tensor, place


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number of each field of a message, where it starts, its content, and its end."""
    at = start
    while at < end:
        first = at
        key, at = _varint(data, at)
        wire = key & 7
        body = at
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == _BYTES:
            count, body = _varint(data, at)
            at = body + count
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("a field that goes beyond its message")
        yield key >> 3, first, body, at


def _varint(data: Any, at: int) -> tuple[int, int]:
    """Return a number of variable length and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _header(number: int, count: int) -> bytes:
    """Return what stands in front of a field with a length.

    >>> _header(7, 300).hex()
    '3aac02'
    """
    encoded = bytearray([number << 3 | _BYTES])
    while count >= 0x80:
        encoded.append(count & 0x7F | 0x80)
        count >>= 7
    encoded.append(count)
    return bytes(encoded)
