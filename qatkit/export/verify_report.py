"""`VerifyReport`: how far a file and a model agree."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SHARE = 1e-5
MAX_STEP = 1
MAX_RELATIVE = 1e-3


@dataclass(frozen=True)
class QuantizerCheck:
    """One quantizer, computed by both from the same inputs.

    Attributes:
        name: path of the quantizer.
        codes: how many integers were compared.
        differing: how many differ.
        largest_step: the largest difference.
    """

    name: str
    codes: int
    differing: int
    largest_step: int


@dataclass(frozen=True)
class VerifyReport:
    """How far the file and the model agree.

    Attributes:
        quantizers: activations and weights, each computed by both from the same inputs.
        outputs: number of output values compared, each computed from the model's inputs alone.
        max_difference: largest difference of an output.
        relative_difference: root of the mean squared difference over that of the output; of the
            worst output.
        last_layers: the same with every layer computed from the model's own quantized tensors;
            ``None`` where the file selects by value (non-maximum suppression), which may flip.
        top1_agreement: share of equal arg-max over the classes (axis 1) of the first output.
        missing: paths of the quantizers that ran in the model and are not in the file.
    """

    quantizers: tuple[QuantizerCheck, ...]
    outputs: int
    max_difference: float
    relative_difference: float
    last_layers: float | None
    top1_agreement: float
    missing: tuple[str, ...] = ()

    @property
    def codes(self) -> int:
        """Number of integers compared."""
        return sum(check.codes for check in self.quantizers)

    @property
    def differing(self) -> int:
        """Number of integers that differ."""
        return sum(check.differing for check in self.quantizers)

    @property
    def largest_step(self) -> int:
        """Largest difference of an integer."""
        return max((check.largest_step for check in self.quantizers), default=0)

    @property
    def ok(self) -> bool:
        """Whether the file computes what the model does.

        No quantizer is missing, at most 1 integer in 100,000 differs, by one step, and behind the
        last quantizers the outputs are equal to a thousandth: what different orders of summation
        explain.
        """
        few = self.differing <= self.codes * MAX_SHARE and self.largest_step <= MAX_STEP
        close = self.last_layers is None or self.last_layers <= MAX_RELATIVE
        return few and close and not self.missing

    def __str__(self) -> str:
        """Return the verdict and the worst quantizers."""
        verdict = "verified" if self.ok else "NOT VERIFIED"
        lines = [
            f"{verdict}: {self.differing} of {self.codes} codes differ, "
            f"by at most {self.largest_step} step; "
            f"outputs differ by at most {self.max_difference:.3g} "
            f"(relative {self.relative_difference:.2g}), "
            f"top-1 equal for {100 * self.top1_agreement:.2f} %"
        ]
        if not self.ok:
            worst = sorted(self.quantizers, key=lambda check: -check.differing)[:5]
            lines += [
                f"  {check.name}: {check.differing} of {check.codes}, step {check.largest_step}"
                for check in worst
            ]
        if self.missing:
            lines.append(f"  not in the file: {', '.join(self.missing)}")
        return "\n".join(lines)
