"""Functions that Numba compiles, and the numbers that lie at an address.

An address is one number where an array is an object to be made and taken apart, which costs more
than a small tensor itself. The caller keeps the tensors alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

_Function = TypeVar("_Function", bound=Callable[..., Any])
F32 = np.float32
INFINITY = F32(np.inf)


def inner(function: _Function) -> _Function:
    """Compile as a part of what calls it."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(_Function, compiled)


def compiled(function: _Function) -> _Function:
    """Compile at the first call, and keep the result on disk if there is a place for it."""
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder that can be written to
        return inner(function)
    return cast(_Function, compiled)


def _float_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.float32)(types.int64), _to_pointer


def _integer_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.int64)(types.int64), _to_pointer


def _byte_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.uint8)(types.int64), _to_pointer


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


_as_floats: Any = intrinsic(_float_pointer)
_as_integers: Any = intrinsic(_integer_pointer)
_as_bytes: Any = intrinsic(_byte_pointer)


@inner
def floats(address, shape):
    """Return the float32 array at an address."""
    return carray(_as_floats(address), shape)


@inner
def integers(address, shape):
    """Return the int64 array at an address."""
    return carray(_as_integers(address), shape)


@inner
def octets(address, shape):
    """Return the uint8 array at an address."""
    return carray(_as_bytes(address), shape)
