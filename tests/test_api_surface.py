"""The public names, their parameters and the cost of importing them, pinned: a change is meant."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import qatkit

# What `inspect.signature` says, without annotations; a default that is no plain value is `...`.
SIGNATURES = {
    "Rule": "(pattern, enabled=None, num_bits=None, observer=None, percentile=None, weight=None, "
    "activation=None)",
    "QuantSpec": "(num_bits=8, signed=True, symmetric=True, narrow_range=False, axis=None, "
    "observer='shrink', percentile=0.01, power_of_two=False, sigma=3.0, momentum=None, "
    "fixed_range=None, memory='running', gradient='ste', ewgs_delta=0.1, dsq_alpha=0.2)",
    "QuantConfig": "(weight=..., activation=..., backend='tensorrt', rules=(), "
    "fold_batch_norm=True, share_concat_scales=True, first_last_bits=None, residual=None, "
    "transformer_residual=None, unsigned_activations=False)",
    "QuantConfig.preset": "(name)",
    "parameter_groups": "(model, *, lr, weight_decay=0.0, range_lr=None, decay_vectors=False)",
    "plan": "(model, example_inputs, config=None)",
    "prepare": "(model, example_inputs, config=None)",
    "calibrate": "(model, data, *, batches=None, method=None, percentile=99.99, "
    "coverage=0.99, progress=True)",
    "disable_quantization": "(model, pattern='*')",
    "enable_quantization": "(model, pattern='*')",
    "freeze_ranges": "(model)",
    "quantize_weights_once": "(model)",
    "freeze_batch_norm": "(model)",
    "shrink_range": "(x, percentile, *, axis=None, exact_ti=False, phase=None)",
    "export_onnx": "(model, example_inputs, path, *, opset=13, dynamic_batch=True, "
    "weights='float', verify=True, lint=True, front_end='auto', precision='float32', "
    "backend=None)",
    "verify_onnx": "(path, model, inputs)",
    "lint_onnx": "(path, backend='tensorrt', *, trt=None)",
    "Finding": "(rule, level, node, message, source='', remedy='')",
    "summary": "(model)",
    "save": "(model, path)",
    "load": "(model, path)",
    "fake_quantize": "(x, scale, zero_point, quant_min, quant_max, axis=None)",
    "TensorQuantizer": "(spec, channels=None, *, device=None)",
    "Distiller": "(student, teacher, *, logits='kl', temperature=4.0, logits_weight=1.0, "
    "features=(), feature_loss='mse', feature_weight=1.0, class_axis=1, select=None)",
    "LearnedQuantizer": "(spec, channels=None, *, device=None)",
    "NanGuard": "(model)",
    "OscillationTracker": "(model, *, threshold=0.02, momentum=0.01)",
    "oscillation_loss": "(model)",
    "reestimate_batch_norm": "(model, data, *, batches=None, progress=True)",
    "sensitivity": "(model, data, *, mode='leave-one-out', metric='sqnr', batches=None, "
    "class_axis=1, progress=True)",
    "bit_sensitivity": "(model, data, bits=(2, 3, 4, 5, 6, 8), *, metric='noise', "
    "activations=False, batches=None, class_axis=1, progress=True)",
    "allocate_bits": "(sensitivity, *, average_bits=None, model_bits=None, bops=None, "
    "latency=None, latency_table=None, min_bits=2, max_bits=16, limits=None)",
    "load_inputs": "(folder=None, *, data_list=None, samples=None, batch_size=8, "
    "preprocess=None, shapes=None)",
    "ImagePreprocess": "(size=None, resize=None, mean=0.0, std=1.0, layout='CHW', color='RGB')",
}
# Pinned by name; what they take beyond these leading parameters may still grow.
LEADING = {"QATSchedule": ["model", "epochs"]}
FIELDS = {
    "ExportReport": {
        "path", "opset", "front_end", "precision", "size_bytes", "quantize_nodes",
        "dequantize_nodes", "findings", "verify",
    },
    "Finding": {"rule", "level", "node", "message"},
}  # fmt: skip
OTHER_NAMES = {
    "BitAllocation",
    "BitSensitivity",
    "CalibrationReport",
    "ExportReport",
    "InputData",
    "Plan",
    "QatkitError",
    "Sensitivity",
    "VerifyReport",
    "nn",
    "ptq",
}
PUBLIC = OTHER_NAMES | set(LEADING) | {name for name in SIGNATURES if "." not in name}
LAYERS = [
    *(f"Conv{n}d" for n in (1, 2, 3)),
    *(f"ConvTranspose{n}d" for n in (1, 2, 3)),
    "Linear",
    "Embedding",
    "EmbeddingBag",
    *(f"{kind}Cell" for kind in ("LSTM", "GRU", "RNN")),
    *(f"{kind}Pool{n}d" for kind in ("Max", "Avg", "AdaptiveAvg") for n in (1, 2, 3)),
]


def resolve(name: str) -> object:
    found: object = qatkit
    for attribute in name.split("."):
        found = getattr(found, attribute)
    return found


def signature(function: object) -> str:
    """Return the parameters of a callable with their kinds and defaults, without annotations."""
    assert callable(function)
    plain = (bool, int, float, str, tuple, type(None), type(inspect.Parameter.empty))
    whole = inspect.signature(function)
    parameters = [
        p.replace(annotation=p.empty, default=p.default if isinstance(p.default, plain) else ...)
        for p in whole.parameters.values()
    ]
    text = str(whole.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return text.replace("Ellipsis", "...")


def test_public_names() -> None:
    assert set(qatkit.__all__) == PUBLIC
    assert len(qatkit.__all__) == len(set(qatkit.__all__))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert signature(resolve(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", LEADING)
def test_leading_parameters(name: str) -> None:
    wanted = LEADING[name]
    parameters = inspect.signature(resolve(name)).parameters  # type: ignore[arg-type]
    assert list(parameters)[: len(wanted)] == wanted
    rest = list(parameters.values())[len(wanted) :]
    assert all(p.default is not p.empty for p in rest), "a new parameter needs a default"


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    kind = resolve(name)
    assert dataclasses.is_dataclass(kind)
    assert {field.name for field in dataclasses.fields(kind)} >= FIELDS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_the_arguments_of_its_parent(name: str) -> None:
    wanted = inspect.signature(getattr(torch.nn, name)).parameters
    taken = inspect.signature(getattr(qatkit.nn, f"Quant{name}")).parameters
    for argument, parameter in wanted.items():
        assert argument in taken
        assert (taken[argument].kind, taken[argument].default) == (
            parameter.kind,
            parameter.default,
        )
    assert list(taken)[: len(wanted)] == list(wanted)
    extra = list(taken.values())[len(wanted) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra)


@pytest.mark.parametrize("name", sorted([*SIGNATURES, *LEADING, *OTHER_NAMES]))
def test_everything_public_has_a_docstring(name: str) -> None:
    public = resolve(name)
    assert (inspect.getdoc(public) or "").strip()
    if inspect.isclass(public):
        for method, function in vars(public).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert (inspect.getdoc(function) or "").strip(), f"{name}.{method}"


@pytest.mark.parametrize(
    "name", ["tensorrt-int8", "tensorrt-w4a4", "onnxruntime-uint8", "openvino-int8"]
)
def test_presets(name: str) -> None:
    assert isinstance(qatkit.QuantConfig.preset(name), qatkit.QuantConfig)


IMPORT = """
import sys, time, torch
before, started = set(sys.modules), time.process_time()
import qatkit
print(time.process_time() - started)
print(*sorted(set(sys.modules) - before))
"""


def import_cost() -> tuple[float, list[str]]:
    """Return the CPU seconds of importing qatkit after torch, and what that loads."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
    )
    seconds, loaded = done.stdout.splitlines()
    return float(seconds), loaded.split()


def test_importing_loads_nothing_heavy_and_takes_a_tenth_of_a_second() -> None:
    costs = [import_cost() for _ in range(3)]
    loaded = costs[0][1]
    own = sys.stdlib_module_names | {"qatkit", "torch"}
    assert [name for name in loaded if name.split(".")[0] not in own] == []
    slow = ("torch.onnx", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")
    assert [name for name in loaded if name.startswith(slow)] == []
    assert min(seconds for seconds, _ in costs) <= 0.1
