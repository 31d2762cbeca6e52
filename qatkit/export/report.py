"""`ExportReport`: what `export_onnx` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qatkit.export.lint import Finding, count_levels
from qatkit.export.verify_report import VerifyReport


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        opset: its opset.
        front_end: which of PyTorch's exporters traced the model, ``"legacy"`` or ``"dynamo"``.
        precision: ``"float32"`` or ``"float16"``, the type of all that is not int8.
        size_bytes: its size.
        quantize_nodes: number of QuantizeLinear nodes.
        dequantize_nodes: number of DequantizeLinear nodes.
        simulated: number of quantizers whose grid is narrower than the type of their codes, by the
            bits of the grid: the numbers are those of so few bits, the engine computes with more.
        findings: what the lint found, empty if it was not asked for.
        linted: whether it was asked for.
        verify: the comparison with ONNX Runtime, ``None`` if it was not asked for.
    """

    path: Path
    opset: int
    front_end: str
    precision: str
    size_bytes: int
    quantize_nodes: int
    dequantize_nodes: int
    simulated: Mapping[int, int]
    findings: tuple[Finding, ...]
    linted: bool
    verify: VerifyReport | None

    def __str__(self) -> str:
        """Return a few lines for people."""
        size = f"{self.size_bytes / 1e6:.2f} MB"
        nodes = f"{self.quantize_nodes} Q, {self.dequantize_nodes} DQ"
        counts = [f"{number} {level}" for level, number in count_levels(self.findings).items()]
        lines = [
            f"{self.path}: opset {self.opset}, {self.precision}, {size}, {nodes}, "
            f"{self.front_end} front end",
            *self._simulation(),
            "lint: " + ", ".join(counts) if self.linted else "not linted",
            *_by_rule(self.findings),
        ]
        if self.verify is not None:
            lines.append(str(self.verify))
        return "\n".join(lines)

    def _simulation(self) -> list[str]:
        if not self.simulated:
            return []
        counts = [f"{count} of {bits} bits" for bits, count in self.simulated.items()]
        return [
            "simulation of narrower grids: "
            f"{', '.join(counts)} among {self.dequantize_nodes} DQ, in wider codes"
        ]


def _by_rule(findings: tuple[Finding, ...]) -> list[str]:
    """Return the first error or warning of each rule, with the number of the others."""
    of_rule: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.level != "INFO":
            of_rule.setdefault((finding.rule, finding.level), []).append(finding)
    return [
        f"  {same[0]}" + (f" (and {len(same) - 1} more {rule})" if len(same) > 1 else "")
        for (rule, _), same in of_rule.items()
    ]
