"""The float model whose tensors an algorithm wants to reproduce."""

from __future__ import annotations

from torch import nn

from qatkit.copying import deepcopy
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.modes import disable_quantization, quantizers
from qatkit.quantizer import TensorQuantizer


def reference_of(model: nn.Module, reference: nn.Module | None, where: str) -> nn.Module:
    """Return the float model: a copy of ``reference``, or of the model as it is now, in eval mode.

    Raises:
        QatkitError: the reference lacks a module that the model has.
    """
    if reference is not None and not isinstance(reference, nn.Module):
        raise QatkitTypeError(
            f"{where}(reference={type(reference).__name__}): give a torch.nn.Module or None"
        )
    twin = deepcopy(model if reference is None else reference).eval()
    if any(True for _ in quantizers(twin)):
        disable_quantization(twin).apply()
    if reference is not None:
        known = {path for path, _ in twin.named_modules()}
        own = [
            path
            for path, module in model.named_modules()
            if module._parameters and not isinstance(module, TensorQuantizer)  # a learned range
        ]
        missing = [path for path in own if path not in known]
        if missing:
            raise QatkitError(
                f"{where}(reference): has no {missing[0]!r}; give the float model that was prepared"
            )
    return twin
