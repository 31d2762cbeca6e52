"""`export_onnx`: write a prepared model as a QDQ ONNX file, with lint and proof beside it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.export.cleanup import batch_norm_to_affine, remove_identities, remove_unused
from qatkit.export.lint import Finding, count_levels, lint_onnx
from qatkit.export.lowering import lower
from qatkit.export.marker import DOMAIN, exportable
from qatkit.export.qdq import insert_qdq
from qatkit.export.verify import VerifyReport, verify_onnx
from qatkit.graph.capture import split_inputs
from qatkit.graph.level import float_class
from qatkit.modes import require_module
from qatkit.prepare import plan_of
from qatkit.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = range(13, 21)
_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        opset: its opset.
        size_bytes: its size.
        quantize_nodes: number of QuantizeLinear nodes.
        dequantize_nodes: number of DequantizeLinear nodes.
        findings: what the lint found, empty if it was not asked for.
        verify: the comparison with ONNX Runtime, ``None`` if it was not asked for.
    """

    path: Path
    opset: int
    size_bytes: int
    quantize_nodes: int
    dequantize_nodes: int
    findings: tuple[Finding, ...]
    verify: VerifyReport | None

    def __str__(self) -> str:
        """Return a few lines for people."""
        size = f"{self.size_bytes / 1e6:.2f} MB"
        lines = [
            f"{self.path}: opset {self.opset}, {size}, {self.quantize_nodes} Q, {self.dequantize_nodes} DQ"
        ]
        counts = count_levels(self.findings)
        lines.append("lint: " + ", ".join(f"{n} {level}" for level, n in counts.items()))
        lines += [f"  {finding}" for finding in self.findings if finding.level != "INFO"]
        if self.verify is not None:
            lines.append(str(self.verify))
        return "\n".join(lines)


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
) -> ExportReport:
    """Write a prepared model as an ONNX file with Q/DQ nodes that TensorRT parses and fuses.

    The batch norms are folded, the weights lie on their integer grid, every zero point is an int8 zero. The model and
    PyTorch's settings are left as they were, and ``path`` changes only when all went well.

    Args:
        model: a prepared and calibrated model.
        example_inputs: as for `qatkit.prepare`.
        path: the file to write.
        opset: 13..20.
        dynamic_batch: leave dimension 0 of every tensor argument with two or more dimensions open.
        weights: ``"float"``: float32 -> Q -> DQ, NVIDIA's form; ``"int8"``: int8 -> DQ, a quarter of the size.
        verify: compare the file with the model in ONNX Runtime, see `verify_onnx`.
        lint: check the file against the engine's rules, see `lint_onnx`.

    Returns:
        an `ExportReport`; print it.

    Raises:
        MissingExtraError: the packages of the ``onnx`` extra are not installed.
        QatkitError: no quantizers, one without a range, a path that cannot be written, an opset that cannot express
            the model.
    """
    _check_arguments(model, opset, weights)
    target = _writable(path)
    _require_packages(verify)
    args, kwargs = split_inputs(example_inputs)
    args, kwargs = _to_cpu_float32(args), _to_cpu_float32(kwargs)
    backend = "tensorrt" if (plan := plan_of(model)) is None else plan.config.backend
    proto = _trace(lower(model), model, args, kwargs, opset, dynamic_batch)
    insert_qdq(proto, int8_weights=weights == "int8")
    _finish(proto, opset)
    with _atomic(target) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        findings = tuple(lint_onnx(temporary, backend)) if lint else ()
        report = verify_onnx(temporary, model, example_inputs) if verify else None
    kinds = [node.op_type for node in proto.graph.node]
    return ExportReport(
        path=target,
        opset=opset,
        size_bytes=target.stat().st_size,
        quantize_nodes=kinds.count("QuantizeLinear"),
        dequantize_nodes=kinds.count("DequantizeLinear"),
        findings=findings,
        verify=report,
    )


def _check_arguments(model: nn.Module, opset: int, weights: str) -> None:
    require_module(model, "export_onnx")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise QatkitError(
            f"export_onnx(opset={opset!r}): Q/DQ with an axis need 13 and the exporter ends at 20; "
            "give 13..20, 13 for TensorRT"
        )
    if weights not in ("float", "int8"):
        raise QatkitError(f"export_onnx(weights={weights!r}): give 'float' or 'int8'")
    if not any(isinstance(module, TensorQuantizer) for module in model.modules()):
        raise QatkitError(
            f"{type(model).__name__}: has no quantizers; call qatkit.prepare(model, example_inputs) first"
        )


def _writable(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if a file can be made there."""
    target = Path(path)
    if target.is_dir():
        raise QatkitError(f"{target}: is a directory; give the name of a file")
    if not target.parent.is_dir():
        raise QatkitError(f"{target}: the directory {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise QatkitError(
            f"{target}: the directory {target.parent} is not writable; choose another"
        )
    return target


def _require_packages(verify: bool) -> None:
    for package in ("onnx", "onnxruntime") if verify else ("onnx",):
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package, "onnx") from None


def _trace(
    lowered: nn.Module, model: nn.Module, args: Any, kwargs: Any, opset: int, dynamic_batch: bool
) -> ModelProto:
    """Run PyTorch's exporter on the lowered model."""
    import onnx

    inputs = _input_names(model, args, kwargs)
    with exportable(opset):
        outputs, batched = _output_names(lowered, args, kwargs, dynamic_batch, inputs)
        buffer = io.BytesIO()
        try:
            torch.onnx.export(
                lowered,
                args,
                buffer,
                kwargs=kwargs,
                opset_version=opset,
                dynamo=False,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_axes=batched,
                custom_opsets={DOMAIN: 1},
            )
        except QatkitError:
            raise
        except torch.onnx.errors.UnsupportedOperatorError as error:
            raise QatkitError(
                f"{type(model).__name__}: opset {opset} cannot express it ({shorten(str(error), 160)}); "
                "try a higher opset, up to 20"
            ) from None
        except Exception as error:
            raise QatkitError(
                f"{type(model).__name__}: PyTorch's ONNX exporter fails ({shorten(str(error), 200)}); "
                "see that the float model exports with torch.onnx.export(dynamo=False)"
            ) from None
    return onnx.load_model_from_string(buffer.getvalue())


def _input_names(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return each argument by the name it has in the file: that of the model's own parameter."""
    if len(args) == 1 and not kwargs:
        return {"input": args[0]}
    parameters = list(inspect.signature(float_class(type(model)).forward).parameters)[1:]  # type: ignore[attr-defined]
    names = {name: value for name, value in zip(parameters, args, strict=False)}
    names |= kwargs
    return {name: value for name, value in names.items() if isinstance(value, Tensor)}


def _output_names(
    lowered: nn.Module, args: Any, kwargs: Any, dynamic_batch: bool, inputs: dict[str, Any]
) -> tuple[list[str], dict[str, dict[int, str]]]:
    """Return the names of the outputs, and which inputs and outputs have an open batch dimension."""
    result = lowered(*args, **kwargs)
    outputs = {"output": result}
    if not isinstance(result, Tensor):
        many = (
            result.items()
            if isinstance(result, dict)
            else enumerate(result if isinstance(result, tuple | list) else ())
        )
        outputs = {f"output_{key}": value for key, value in many}
    if not all(isinstance(value, Tensor) for value in outputs.values()):
        return [], {}
    if not dynamic_batch:
        return list(outputs), {}
    batched = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() > 1
    }
    sizes = {value.shape[0] for value in batched.values()}
    same = {
        name: value
        for name, value in outputs.items()
        if value.dim() > 0 and sizes == {value.shape[0]}
    }
    return list(outputs), {name: {0: "batch"} for name in (*batched, *same)}


def _finish(proto: ModelProto, opset: int) -> None:
    """Clean up, set the versions, and check what must hold."""
    import onnx

    remove_identities(proto.graph)
    batch_norm_to_affine(proto)
    remove_unused(proto.graph)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if versions.get("") != opset:
        raise QatkitError(
            f"the exporter wrote opset {versions.get('')} where {opset} was asked for; try another opset"
        )
    proto.ir_version = _IR_VERSIONS[opset]
    proto.producer_name, proto.producer_version = "qatkit", ""
    onnx.checker.check_model(proto)


@contextlib.contextmanager
def _atomic(target: Path) -> Iterator[Path]:
    """Give a temporary file beside ``target``; it takes its name at the end, or vanishes after an error."""
    handle, name = tempfile.mkstemp(suffix=".onnx", prefix=f".{target.stem}-", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise QatkitError(
            f"{target}: cannot be written ({shorten(str(error))}); choose another path"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """Return the mask of a new file's permissions."""
    current = os.umask(0)
    os.umask(current)
    return current


def _to_cpu_float32(value: Any) -> Any:
    """Return arguments as the exported model takes them."""
    if isinstance(value, Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    if type(value) in (tuple, list):
        return type(value)(_to_cpu_float32(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_cpu_float32(item) for key, item in value.items()}
    return value
