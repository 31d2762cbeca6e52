"""`quantize`: the default way from a prepared model to its integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qatkit.calibrate import calibrate
from qatkit.copying import deepcopy
from qatkit.errors import QatkitError
from qatkit.modes import quantizers
from qatkit.prepare import weight_quantizers
from qatkit.ptq.gptq import gptq
from qatkit.ptq.reconstruction import reconstruct
from qatkit.ptq.report import PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.ptq.weight_ranges import fit_weight_ranges

_FINE = 8
"""With so many bits of everything rounding to nearest is good enough."""
_DROP = 0.2
_NOISY_LR, _FINE_LR = 1e-2, 5e-3
"""In steps of the grid; behind `gptq` the weights need not go far."""


def quantize(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: str = "mse",
    steps: int = 200,
    batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[PtqReport, ...]:
    """Set all ranges of a prepared model and round its weights, without labels.

    Activations are calibrated by ``method``. If anything has fewer than 8 bits, the weights of
    fewer than 8 bits get the ranges of least squared error and `reconstruct` learns all weights
    block by block (``adaquant``). It starts from what `gptq` gives where no activation has fewer
    than 8 bits. Freeze or export afterwards; nothing else is needed.

    Args:
        model: a prepared model.
        data: batches as for `qatkit.calibrate`; about a thousand samples do.
        method: as for `qatkit.calibrate`, what makes the ranges of the activations.
        steps: how many steps to learn each block.
        batches: use only so many; ``None`` for all.
        seed: of the learning.
        progress: show progress bars if tqdm is installed and the output is a terminal.

    Returns:
        the reports of the algorithms, in order; print them.

    Raises:
        QatkitError: as `qatkit.calibrate` and `reconstruct`; the model is then as before.

    >>> import torch, qatkit
    >>> x = torch.randn(64, 3, 8, 8)
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    >>> reports = quantize(qatkit.prepare(net, x, "tensorrt-w4a4"), [x], steps=20)
    >>> [report.algorithm for report in reports]
    ['fit_weight_ranges', 'reconstruct']
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise QatkitError(f"quantize(steps={steps!r}): give a positive integer")
    runs = Runs.read(model, data, batches, "quantize")
    with restoring(model):
        calibrate(model, runs.data(), method=method, progress=progress)
        weights = {id(each) for each in weight_quantizers(model).values()}
        coarse = [q for _, q in quantizers(model) if q.quantize and q.spec.num_bits < _FINE]
        if not coarse:
            return ()
        # Dropping helps against the noise of coarse activations; there is none with fine ones.
        noisy = any(id(quantizer) not in weights for quantizer in coarse)
        reference = deepcopy(model)
        reports = [fit_weight_ranges(model, bits_below=_FINE)]
        if not noisy:
            reports.append(gptq(model, runs.data(), bits_below=_FINE))
        reports.append(
            reconstruct(
                model,
                runs.data(),
                rounding="adaquant",
                steps=steps,
                lr=_NOISY_LR if noisy else _FINE_LR,
                drop=_DROP if noisy else 0.0,
                reference=reference,
                seed=seed,
                progress=progress,
            )
        )
    return tuple(reports)
