"""A spec is checked when it is made, and equal specs are equal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatkit.errors import QatkitError
from qatkit.spec import GRADIENTS, LEARNED, MEMORIES, WATCHING, QuantSpec, suggest


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize(
    ("signed", "narrow"), [(True, False), (True, True), (False, False)], ids=str
)
def test_grid(bits: int, signed: bool, narrow: bool) -> None:
    spec = QuantSpec(num_bits=bits, signed=signed, narrow_range=narrow)
    assert spec.quant_max - spec.quant_min + 1 == 2**bits - narrow
    assert spec.quant_min == (-spec.quant_max - (not narrow) if signed else 0)


ILLEGAL: list[tuple[dict[str, Any], str]] = [
    *(({"num_bits": bits}, "from 2 to 16") for bits in (1, 17, 0, -8, 8.0, "8", None, True)),
    *(({name: 1}, "give True or False") for name in ("signed", "symmetric", "narrow_range")),
    ({"power_of_two": "yes"}, "give True or False"),
    *(({"axis": axis}, "give an integer, or None") for axis in (1.0, "0", True)),
    ({"narrow_range": True, "signed": False}, "lowest code"),
    ({"power_of_two": True, "symmetric": False}, "needs symmetric=True"),
    ({"observer": "minmx"}, "did you mean 'minmax'"),
    ({"observer": "histogram"}, "unknown observer, .*choose one of shrink, minmax"),
    ({"observer": None}, "unknown observer"),
    *(
        ({"percentile": p}, "give 0 <= percentile < 50")
        for p in (-0.1, 50, 99.9, float("nan"), float("inf"), "1", None, True)
    ),
    *(({"sigma": s}, "positive number") for s in (0, -1, float("inf"), float("nan"), "3")),
    *(({"momentum": m}, "0 < momentum <= 1") for m in (0, -0.1, 1.1, float("nan"), "0.1")),
    ({"memory": "forever"}, "choose one of running, batch, latest"),
    *(
        ({"observer": o, "symmetric": False}, "use observer='lsq[+]' or symmetric=True")
        for o in ("lsq", "pact", "tqt")
    ),
    *(({"observer": o, "memory": "batch"}, "use 'running'") for o in LEARNED),
    *(({"observer": o, "momentum": 0.5}, "leave momentum at None") for o in LEARNED),
    ({"observer": "lsq", "fixed_range": (0.0, 1.0)}, "give both or neither"),
    ({"gradient": "egws"}, "did you mean 'ewgs'"),
    ({"gradient": None}, "choose one of ste, ewgs, dsq"),
    *(({"ewgs_delta": d}, "0 <= ewgs_delta < 2") for d in (-0.1, 2, float("nan"), True, "1")),
    *(({"dsq_alpha": a}, "0 < dsq_alpha < 1") for a in (0, 1, float("nan"), True, None)),
    ({"observer": "fixed"}, "give both or neither"),
    ({"fixed_range": (0.0, 1.0)}, "give both or neither"),
    *(
        ({"observer": "fixed", "fixed_range": r}, "fixed_range=")
        for r in ((1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0), (1.0,), 3.0, [0.0, 1.0])
    ),
]


@pytest.mark.parametrize(("fields", "message"), ILLEGAL)
def test_illegal(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message) as caught:
        QuantSpec(**fields)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("QuantSpec")
    assert "\n" not in str(caught.value)


@given(
    bits=st.integers(2, 16),
    observer=st.sampled_from([name for name in WATCHING if name != "fixed"]),
    axis=st.none() | st.integers(-4, 4),
    percentile=st.floats(0, 50, exclude_max=True),
    momentum=st.none() | st.floats(0, 1, exclude_min=True),
    memory=st.sampled_from(MEMORIES),
    gradient=st.sampled_from(GRADIENTS),
    ewgs_delta=st.floats(0, 2, exclude_max=True),
    dsq_alpha=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_survives_json(**fields: Any) -> None:
    spec = QuantSpec(num_bits=fields.pop("bits"), **fields)
    again = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("observer", LEARNED)
def test_a_learned_one_survives_json(observer: str) -> None:
    spec = QuantSpec(observer=observer, gradient="ewgs", ewgs_delta=0.01)
    assert spec.learned
    assert not QuantSpec().learned
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_fixed_range_survives_json() -> None:
    spec = QuantSpec(observer="fixed", fixed_range=(-1.0, 2.5))
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_is_frozen_and_replace_checks() -> None:
    spec = QuantSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.num_bits = 4  # type: ignore[misc]
    assert spec.replace(num_bits=4).num_bits == 4
    assert spec.num_bits == 8
    with pytest.raises(QatkitError, match="num_bits=1"):
        spec.replace(num_bits=1)


def test_suggest() -> None:
    assert suggest("zzz", ("minmax", "ema")) == "choose one of minmax, ema"
    assert suggest(3, ("a",)) == "choose one of a"  # type: ignore[arg-type]
