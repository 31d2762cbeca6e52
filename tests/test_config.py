"""Rules, presets, globs, and what a backend refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qatkit.config import ACTIVATION, PRESETS, WEIGHT, QuantConfig, Rule, matches, require_match
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.spec import QuantSpec


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*", "a.b", True),
        ("conv1", "conv1", True),
        ("conv1", "conv1.weight_quantizer", True),
        ("conv1", "layer1.0.conv1", False),
        ("*.conv1", "layer1.0.conv1", True),
        ("*conv1", "conv1", True),
        ("layer1", "layer1.0.conv1", True),
        ("layer1", "layer10.0", False),
        ("layer1.*.conv1", "layer1.0.conv1.weight_quantizer", True),
        ("layer[12].0", "layer2.0.conv1", True),
        ("layer1.?.conv1", "layer1.10.conv1", False),
        ("Conv1", "conv1", False),
        ("conv1.weight_quantizer", "conv1", False),
    ],
)
def test_matches(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_later_rules_win_field_by_field() -> None:
    config = QuantConfig(
        rules=(
            Rule("layer1", num_bits=4, observer="minmax"),
            Rule("layer1.0", num_bits=6),
            Rule("layer1.1", enabled=False),
            Rule("layer1.1.conv", enabled=True),
        )
    )
    first = config.spec("layer1.0.input_quantizer", "activation")
    assert first is not None
    assert (first.num_bits, first.observer) == (6, "minmax")
    weight = config.spec("layer1.0.weight_quantizer", "weight")
    assert weight is not None
    assert (weight.num_bits, weight.observer) == (6, WEIGHT.observer)
    assert config.spec("layer1.1.input_quantizer", "activation") is None
    assert config.spec("layer1.1.conv", "weight") is not None
    assert config.spec("fc", "activation") == ACTIVATION


def test_a_whole_spec_in_a_rule() -> None:
    mine = QuantSpec(num_bits=5, axis=1)
    config = QuantConfig(rules=(Rule("fc", weight=mine, num_bits=6),))
    assert config.spec("fc", "weight") == mine.replace(num_bits=6)
    assert config.spec("fc", "activation") == ACTIVATION.replace(num_bits=6)


def test_first_bits_give_way_to_rules() -> None:
    config = QuantConfig(rules=(Rule("fc", num_bits=3),))
    fc, conv = config.spec("fc", "weight", bits=8), config.spec("conv", "weight", bits=16)
    assert fc is not None
    assert conv is not None
    assert (fc.num_bits, conv.num_bits) == (3, 16)


RULES: list[tuple[dict[str, Any], str]] = [
    ({"pattern": ""}, "give a glob"),
    ({"pattern": 3}, "give a glob"),
    ({"pattern": "fc", "enabled": "no"}, "give True, False or None"),
    ({"pattern": "fc", "num_bits": 1}, r"Rule\('fc'\): QuantSpec\(num_bits=1\)"),
    ({"pattern": "fc", "observer": "minmx"}, "did you mean 'minmax'"),
    ({"pattern": "fc", "percentile": 50}, "percentile < 50"),
    ({"pattern": "fc", "weight": {"num_bits": 4}}, "give a QuantSpec"),
]


@pytest.mark.parametrize(("fields", "message"), RULES)
def test_illegal_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message) as caught:
        Rule(**fields)
    assert "\n" not in str(caught.value)


CONFIGS: list[tuple[dict[str, Any], type[QatkitError], str]] = [
    ({"backend": "tensort"}, QatkitError, "unknown backend 'tensort'"),
    ({"rules": Rule("fc")}, QatkitTypeError, "give a tuple of Rule"),
    ({"rules": ("fc",)}, QatkitTypeError, "is not a Rule"),
    ({"weight": 8}, QatkitTypeError, r"QuantConfig\(weight=8\): give a QuantSpec"),
    ({"activation": None}, QatkitTypeError, "give a QuantSpec"),
    ({"first_last_bits": 1}, QatkitError, "num_bits=1"),
    ({"residual": "left"}, QatkitError, "residual='left'"),
    ({"transformer_residual": 1}, QatkitError, "transformer_residual=1"),
    ({"activation": QuantSpec(symmetric=False)}, QatkitError, "needs zero points"),
    ({"activation": QuantSpec(signed=False)}, QatkitError, "use signed=True"),
    ({"activation": QuantSpec(axis=1)}, QatkitError, "use axis=None"),
    ({"rules": (Rule("fc", activation=QuantSpec(symmetric=False)),)}, QatkitError, "zero points"),
    ({"unsigned_activations": True}, QatkitError, "use num_bits of 7 or less"),
    ({"unsigned_activations": 1}, QatkitError, "give True or False"),
    (
        {"backend": "onnxruntime", "weight": WEIGHT.replace(symmetric=False)},
        QatkitError,
        "symmetric=False on a weight",
    ),
    (
        {"backend": "openvino", "weight": WEIGHT.replace(signed=False, narrow_range=False)},
        QatkitError,
        "runs int8 weights; use signed=True",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), CONFIGS)
def test_illegal_configs(fields: dict[str, Any], error: type[QatkitError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        QuantConfig(**fields)
    assert "\n" not in str(caught.value)


def test_unsigned_below_eight_bits_fits_into_int8() -> None:
    QuantConfig(activation=QuantSpec(num_bits=7, signed=False))


def test_one_rule_below_eight_bits_is_enough_for_unsigned_activations() -> None:
    QuantConfig(unsigned_activations=True, rules=(Rule("layer4", num_bits=4),))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("signed", [True, False])
def test_engines_with_zero_points(backend: str, signed: bool) -> None:
    for symmetric in (True, False):
        QuantConfig(backend=backend, activation=QuantSpec(signed=signed, symmetric=symmetric))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    assert QuantConfig.of(name) is QuantConfig.preset(name) is PRESETS[name]


def test_of() -> None:
    config = QuantConfig()
    assert QuantConfig.of(config) is config
    assert QuantConfig.of(None) == config
    with pytest.raises(QatkitError, match="did you mean 'tensorrt-int8'"):
        QuantConfig.of("tensorrt-int9")
    with pytest.raises(QatkitTypeError, match="a preset name"):
        QuantConfig.of(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        QuantConfig(
            rules=(
                Rule("a", enabled=False),
                Rule("b", weight=QuantSpec(num_bits=3), percentile=0.5),
                Rule("c", activation=QuantSpec(observer="fixed", fixed_range=(-1.0, 1.0))),
            ),
            fold_batch_norm=False,
        ),
    ],
)
def test_survives_json(config: QuantConfig) -> None:
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().backend = "other"  # type: ignore[misc]


def test_a_glob_that_hits_nothing_is_an_error_with_a_hint() -> None:
    paths = ["", "layer1", "layer1.0", "layer1.0.conv1"]
    require_match("layer1.*", paths, "here")
    with pytest.raises(QatkitError, match=r"here: .* write '\*\.conv1' to hit 'layer1\.0\.conv1'"):
        require_match("conv1", paths, "here")
    with pytest.raises(QatkitError, match="did you mean 'layer1'"):
        require_match("layr1", paths, "here")
    with pytest.raises(QatkitError, match=r"Rule\('nothing'\)"):
        QuantConfig(rules=(Rule("layer1"), Rule("nothing"))).check_patterns(paths)
