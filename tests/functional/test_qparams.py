from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatkit.functional import fake_quantize, power_of_two_ceil, qparams
from qatkit.spec import QuantSpec

T = torch.tensor
ASYMMETRIC = QuantSpec(symmetric=False)
SPECS = [
    QuantSpec(num_bits=bits, signed=signed, symmetric=symmetric)
    for bits in (2, 4, 8, 16)
    for signed in (True, False)
    for symmetric in (True, False)
]


@pytest.mark.parametrize(
    ("low", "high", "spec", "scale"),
    [
        (-1.0, 2.54, QuantSpec(), 2.54 / 127),
        (-3.81, 1.0, QuantSpec(narrow_range=True), 3.81 / 127),
        (-3.0, 2.0, QuantSpec(signed=False), 2 / 255),
        (-3.0, -2.0, QuantSpec(signed=False), 1.0),
        (-3.0, 5.9, QuantSpec(power_of_two=True), 8 / 128),
        (0.0, 4.0, QuantSpec(power_of_two=True, signed=False), 4 / 256),
        (0.0, 4.01, QuantSpec(power_of_two=True, num_bits=4), 1.0),
        (-1.0, 3.0, ASYMMETRIC, 4 / 255),
        (2.0, 3.0, ASYMMETRIC, 3 / 255),
    ],
)
def test_scale(low, high, spec, scale):
    got, zero_point = qparams(T(low), T(high), spec)
    assert got.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert got.item() == pytest.approx(scale, rel=1e-6)
    assert spec.symmetric is False or zero_point.item() == 0


def test_zero_point_vectors(shared_dir: Path):
    cases = json.loads((shared_dir / "vectors/fixed_point_vectors.json").read_text())["nudge"]
    for case in cases:
        if case["qmin"] == 1:
            continue
        spec = QuantSpec(signed=case["qmin"] < 0, symmetric=False)
        scale, zero_point = qparams(T(float(case["rmin"])), T(float(case["rmax"])), spec)
        if case["rmin"] < 0 < case["rmax"]:
            assert scale.item() == pytest.approx(case["scale"], rel=1e-6)
            assert abs(zero_point.item() - case["zero_point"]) <= 1


def test_power_of_two_vectors(shared_dir: Path):
    for case in json.loads((shared_dir / "vectors/pact2_vectors.json").read_text())["pow2"]:
        assert power_of_two_ceil(T(case["x"])).item() == case["ceil2"]


@given(st.floats(2.0**-120, 2.0**120, width=32))
def test_power_of_two_is_exact_and_least(x):
    power = power_of_two_ceil(T(x)).item()
    assert math.frexp(power)[0] == 0.5
    assert power / 2 < x <= power


DEAD = [0.0, 1e-45, 1e-40, 5e-39, math.nan, math.inf]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("amax", DEAD)
def test_dead_ranges(amax, spec):
    scale, zero_point = qparams(T([-amax, 0.0, -amax]), T([amax, amax, 0.0]), spec)
    assert (scale == 1).all()
    assert (zero_point == 0).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("end", [3e-36, 1e-30, 1.0, 1e30, 3.4e38])
def test_scale_and_its_reciprocal_stay_normal(end, spec):
    scale, zero_point = qparams(T(-end), T(end), spec)
    for number in (scale.item(), scale.reciprocal().item()):
        assert 2.0**-126 <= number <= 2.0**126
    assert spec.quant_min <= zero_point.item() <= spec.quant_max


ends = st.floats(-1e5, 1e5, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


@given(ends, ends, st.sampled_from(SPECS))
def test_covers_the_range_and_represents_zero(one, other, spec):
    low, high = sorted([one, other])
    scale, zero_point = qparams(T(low), T(high), spec)
    if low == high == 0:
        return
    x = torch.linspace(low, high, 50).clamp(min=0.0 if spec.symmetric and not spec.signed else low)
    y = fake_quantize(x, scale, zero_point, spec.quant_min, spec.quant_max)
    steps = 1.01 if not spec.symmetric else 0.51
    assert (y - x).abs().max() <= scale * steps + 1e-6 * x.abs().max()
    assert fake_quantize(T(0.0), scale, zero_point, spec.quant_min, spec.quant_max) == 0


def test_per_channel_shape_no_gradient_and_compile():
    low, high = -torch.rand(5), torch.rand(5).requires_grad_()
    for spec in (QuantSpec(axis=0), QuantSpec(axis=0, power_of_two=True), ASYMMETRIC):
        want = qparams(low, high, spec)
        got = torch.compile(qparams, fullgraph=True, backend="aot_eager")(low, high, spec)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
            assert one.shape == (5,)
            assert not one.requires_grad
