"""`export_onnx`: write a prepared model as a QDQ ONNX file, with lint and proof beside it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from qatkit.backend import get_backend
from qatkit.errors import MissingExtraError, QatkitError
from qatkit.export.biases import set_biases_apart
from qatkit.export.cleanup import batch_norm_to_affine, remove_identities, remove_unused
from qatkit.export.constant_folding import fold_constants
from qatkit.export.float16 import FIRST_OPSET, to_float16
from qatkit.export.float_weights import store_as_float
from qatkit.export.four_bits import FIRST_OPSET as FIRST_INT4_OPSET
from qatkit.export.four_bits import count_simulated, specs_of, to_four_bits
from qatkit.export.graph_editor import without_weights
from qatkit.export.inputs import to_cpu_float32
from qatkit.export.lint import lint_onnx
from qatkit.export.lowering import lower
from qatkit.export.onnx_file import write_model
from qatkit.export.opset_conversion import convert_opset
from qatkit.export.pads import absorb_pads
from qatkit.export.plain_forms import PlainForms
from qatkit.export.qdq import insert_qdq
from qatkit.export.report import ExportReport
from qatkit.export.trace import choose_front_end, trace
from qatkit.export.verify import verify_onnx
from qatkit.files import replacing
from qatkit.graph.capture import split_inputs
from qatkit.modes import require_module
from qatkit.prepare import plan_of
from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import GATHER, require_whole
from qatkit.version import __version__

if TYPE_CHECKING:
    from onnx import ModelProto

_log = logging.getLogger(__name__)

_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""The IR version that came with each opset (P9)."""


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = 13,
    dynamic_batch: bool = True,
    weights: Literal["float", "int8"] = "float",
    verify: bool = True,
    lint: bool = True,
    front_end: Literal["auto", "legacy", "dynamo"] = "auto",
    precision: Literal["float32", "float16"] = "float32",
    backend: str | None = None,
) -> ExportReport:
    """Write a prepared model as an ONNX file with Q/DQ nodes that its engine parses and fuses.

    The batch norms are folded, the weights lie on their integer grid; for TensorRT every zero point
    is an int8 zero. The model and PyTorch's settings are left as they were, and ``path`` changes
    only when all went well.

    Args:
        model: a prepared and calibrated model.
        example_inputs: as for `qatkit.prepare`.
        path: the file to write.
        opset: 13..23. The front end writes what it can, 13..20 or 18, and a pass over the file
            does the rest of the way, up or down. From 21 on codes of at most 4 bits are INT4 or
            UINT4; before, they are int8 behind a Clip to the narrow grid: the same numbers,
            computed in 8 bits, which is the only way that TensorRT runs 4-bit activations.
        dynamic_batch: leave dimension 0 of every tensor argument with two or more dimensions open.
        weights: ``"float"``: float32 -> Q -> DQ, NVIDIA's form; ``"int8"``: int8 -> DQ, a quarter
            of the size.
        verify: compare the file with the model in ONNX Runtime, see `verify_onnx`.
        lint: check the file against the engine's rules, see `lint_onnx`.
        front_end: which of PyTorch's exporters traces the model: ``"legacy"``, the one with
            TorchScript, ``"dynamo"``, the one with ``torch.export``, or ``"auto"``: the legacy one
            where this PyTorch has it. Both give the same graph.
        precision: type of all that is not int8. ``"float16"`` is for engines with strong typing
            (TensorRT 11) and needs opset 19: operators, biases and scales are float16, the codes of
            the weights stay the same, inputs and outputs stay float32 behind a Cast. What float16
            cannot express, or hold, stays float32 between Casts.
        backend: write and lint for another engine than the model was prepared for: the same
            numbers in the types of codes that it takes, and no quantizer more.

    Returns:
        an `ExportReport`; print it.

    Raises:
        MissingExtraError: the packages of the ``onnx`` extra are not installed.
        QatkitError: no quantizers, one without a range, a path that cannot be written, an opset
            that cannot express the model, a range or constant beyond float16.
    """
    _check_arguments(model, opset, weights, precision)
    exporter = choose_front_end(front_end)
    _require_packages("onnx", *(["onnxruntime"] if verify else []))
    args, kwargs = (to_cpu_float32(given) for given in split_inputs(example_inputs))
    prepared = plan_of(model)
    planned = "tensorrt" if prepared is None else prepared.config.backend
    engine = get_backend(planned if backend is None else backend)
    specs = specs_of(model)
    with replacing(path) as temporary:
        lowered = lower(model, engine, args, kwargs)
        with PlainForms(opset):
            proto = trace(
                lowered,
                model,
                args,
                kwargs,
                front_end=exporter,
                opset=opset,
                dynamic_batch=dynamic_batch,
            )
        del lowered
        fold_constants(proto)
        insert_qdq(proto)
        convert_opset(proto, opset)
        set_biases_apart(proto.graph, engine.bias_apart)
        _clean_up(proto)
        if precision == "float16":
            to_float16(proto)
        if opset >= FIRST_INT4_OPSET:
            to_four_bits(proto, specs)
        _write(proto, opset, temporary, as_float=weights == "float")
        kinds = Counter(node.op_type for node in proto.graph.node)
        simulated = count_simulated(proto, specs)
        del proto
        findings = tuple(lint_onnx(temporary, engine)) if lint else ()
        report = verify_onnx(temporary, model, example_inputs) if verify else None
    if report is not None and not report.ok:
        _log.warning("%s: %s", os.fspath(path), report)
    return ExportReport(
        path=Path(path),
        opset=opset,
        front_end=exporter.name,
        precision=precision,
        size_bytes=Path(path).stat().st_size,
        quantize_nodes=kinds["QuantizeLinear"],
        dequantize_nodes=kinds["DequantizeLinear"],
        simulated=simulated,
        findings=findings,
        linted=lint,
        verify=report,
    )


def _check_arguments(model: nn.Module, opset: int, weights: str, precision: str) -> None:
    require_module(model, "export_onnx")
    require_whole(model, "export_onnx", GATHER)
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in _IR_VERSIONS:
        raise QatkitError(
            f"export_onnx(opset={opset!r}): Q/DQ with an axis need 13 and ONNX is known up to 23; "
            "give 13..23, 13 for TensorRT"
        )
    if weights not in ("float", "int8"):
        raise QatkitError(f"export_onnx(weights={weights!r}): give 'float' or 'int8'")
    if precision not in ("float32", "float16"):
        raise QatkitError(f"export_onnx(precision={precision!r}): give 'float32' or 'float16'")
    if precision == "float16" and opset < FIRST_OPSET:
        raise QatkitError(
            f"export_onnx(precision='float16', opset={opset}): float16 scales need opset "
            f"{FIRST_OPSET}; give opset={FIRST_OPSET} or more"
        )
    if not any(isinstance(module, TensorQuantizer) for module in model.modules()):
        raise QatkitError(
            f"{type(model).__name__}: has no quantizers; "
            "call qatkit.prepare(model, example_inputs) first"
        )


def _require_packages(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx")


def _clean_up(proto: ModelProto) -> None:
    remove_identities(proto.graph)
    batch_norm_to_affine(proto)
    absorb_pads(proto.graph)
    remove_unused(proto.graph)


def _write(proto: ModelProto, opset: int, path: Path, *, as_float: bool) -> None:
    """Set the versions, check what must hold, and write the file."""
    import onnx

    values = store_as_float(proto) if as_float else {}
    remove_unused(proto.graph)
    proto.ir_version = _IR_VERSIONS[opset]
    proto.producer_name, proto.producer_version = "qatkit", __version__
    onnx.checker.check_model(without_weights(proto, values))
    write_model(proto, path, values)
