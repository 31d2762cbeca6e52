"""Keep PyTorch's fused transformer kernels from going around the quantizers.

In eval mode without gradients ``torch.nn.TransformerEncoderLayer`` hands the weights of its
children to one kernel and never calls them.
"""

from __future__ import annotations

from torch import nn

from qatkit.nn.quantized import QuantizedWeight


def avoid_fast_path(module: nn.Module) -> None:
    """Let a transformer layer call its children if some are quantized; others are left alone.

    It works by the attributes that the layers themselves consult.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> avoid_fast_path(layer)
    >>> layer.activation_relu_or_gelu
    1
    """
    if not any(isinstance(child, QuantizedWeight) for child in module.modules()):
        return
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
