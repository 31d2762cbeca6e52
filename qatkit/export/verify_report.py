"""`VerifyReport`: how far a file and a model agree."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Tolerance:
    """What rounding and different orders of summation explain.

    Attributes:
        share: share of the integers that may differ, beside ``few`` of them.
        few: the number that may differ in a model of any size.
        step: by how much.
        relative: relative difference of the outputs behind the last quantizers.
    """

    share: float
    few: int
    step: int
    relative: float


TOLERANCES = MappingProxyType(
    {
        "float32": Tolerance(share=1e-5, few=3, step=1, relative=1e-3),
        "float16": Tolerance(share=5e-2, few=3, step=2, relative=2e-2),
    }
)
"""By the type that a file computes in."""


@dataclass(frozen=True)
class QuantizerCheck:
    """One quantizer, computed by both from the same inputs.

    Attributes:
        name: path of the quantizer.
        codes: how many integers were compared.
        differing: how many differ.
        largest_step: the largest difference.
        constant: whether it quantizes a weight or another constant.
        selected: whether what it reads was picked by value (non-maximum suppression, top k): a
            last bit can change which elements there are, so they are not judged.
    """

    name: str
    codes: int
    differing: int
    largest_step: int
    constant: bool = False
    selected: bool = False


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
        precision: the type that the file computes in, ``"float32"`` or ``"float16"``.
    """

    quantizers: tuple[QuantizerCheck, ...]
    outputs: int
    max_difference: float
    relative_difference: float
    last_layers: float | None
    top1_agreement: float
    missing: tuple[str, ...] = ()
    precision: str = "float32"

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

        No quantizer is missing and no integer of a constant differs. Of the others at most 3 differ
        and 1 in 100,000, by one step, and behind the last quantizers the outputs are equal to a
        thousandth: what different orders of summation explain. In float16 these are 1 in 20, two
        steps and a fiftieth.
        """
        most = TOLERANCES[self.precision]
        judged = [check for check in self.quantizers if not check.selected]
        differing = sum(check.differing for check in judged)
        few = differing <= most.few + sum(check.codes for check in judged) * most.share
        near = all(check.largest_step <= most.step for check in judged)
        exact = not any(check.differing for check in self.quantizers if check.constant)
        close = self.last_layers is None or self.last_layers <= most.relative
        return few and near and exact and close and not self.missing

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
        picked = [check for check in self.quantizers if check.selected]
        if picked:
            differing, codes = (sum(getattr(c, n) for c in picked) for n in ("differing", "codes"))
            lines.append(f"  behind a selection by value, not judged: {differing} of {codes}")
        if not self.ok:
            worst = sorted(self.quantizers, key=lambda check: -check.differing)[:5]
            lines += [
                f"  {check.name}: {check.differing} of {check.codes}, step {check.largest_step}"
                for check in worst
            ]
        if self.missing:
            lines.append(f"  not in the file: {', '.join(self.missing)}")
        return "\n".join(lines)
