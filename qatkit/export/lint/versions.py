"""What differs between the major versions of TensorRT, as far as a file is concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qatkit.errors import QatkitError


@dataclass(frozen=True)
class TensorRT:
    """One major version.

    Attributes:
        major: the version.
        last_opset: the highest opset that any release of it documents.
        common_opset: the highest opset that does not depend on the release.
        opset_note: which release ends where.
        opset_source: where this is written.
        later_codes: types of the codes that it does not know, and the release that brought each.
        later_operators: operators that came within it, and the release that brought each.
        three_inputs: whether every Q and DQ must have a zero point.
        float_scales: whether scales must be float32.
        blocks: whether block scales are known.
        strong_typing: whether the types in the file alone decide how an operator runs.
    """

    major: int
    last_opset: int
    common_opset: int
    opset_note: str
    opset_source: str
    later_codes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    later_operators: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    three_inputs: bool = False
    float_scales: bool = False
    blocks: bool = True
    strong_typing: bool = False


VERSIONS: Mapping[int, TensorRT] = MappingProxyType(
    {
        8: TensorRT(
            major=8,
            last_opset=17,
            common_opset=13,
            opset_note="8.2 and 8.4 end at 13, 8.5 and 8.6 at 17",
            opset_source="[D] onnx-tensorrt 8.2 to 8.6, operators.md",
            later_codes=MappingProxyType(
                {"float8e4m3fn": "9.0", "int4": "10.0", "float4e2m1": "10"}
            ),
            later_operators=MappingProxyType({"LayerNormalization": "8.6"}),
            three_inputs=True,
            float_scales=True,
            blocks=False,
        ),
        10: TensorRT(
            major=10,
            last_opset=24,
            common_opset=22,
            opset_note="10.15 ends at 24, releases before it may end lower",
            opset_source="[D] onnx-tensorrt 10.15, operators.md",
        ),
        11: TensorRT(
            major=11,
            last_opset=25,
            common_opset=24,
            opset_note="the guide of 11.x names 25, releases may end lower",
            opset_source="[D] TensorRT 11, ONNX Opset Guide",
            strong_typing=True,
        ),
    }
)
DEFAULT_VERSION = 10


def get_version(major: int) -> TensorRT:
    """Return the record of a major version.

    Raises:
        QatkitError: there is none.

    >>> get_version(8).last_opset
    17
    """
    if isinstance(major, bool) or major not in VERSIONS:
        known = ", ".join(str(one) for one in VERSIONS)
        raise QatkitError(f"trt={major!r}: no such version of TensorRT here: give one of {known}")
    return VERSIONS[major]
