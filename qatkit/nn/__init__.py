"""Drop-in quantized layers, with the arguments, parameters and keys of those in ``torch.nn``."""

from qatkit.nn.activation import (
    QuantELU,
    QuantGELU,
    QuantHardsigmoid,
    QuantHardswish,
    QuantLeakyReLU,
    QuantMish,
    QuantReLU,
    QuantReLU6,
    QuantSigmoid,
    QuantSiLU,
    QuantSoftplus,
    QuantTanh,
)
from qatkit.nn.attention import QuantMultiheadAttention
from qatkit.nn.conv import QuantConv1d, QuantConv2d, QuantConv3d
from qatkit.nn.conv_transpose import (
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from qatkit.nn.embedding import QuantEmbedding, QuantEmbeddingBag
from qatkit.nn.linear import QuantLinear
from qatkit.nn.pooling import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
    QuantMaxPool1d,
    QuantMaxPool2d,
    QuantMaxPool3d,
)
from qatkit.nn.rnn import QuantGRU, QuantLSTM, QuantRNN
from qatkit.nn.rnn_cell import QuantGRUCell, QuantLSTMCell, QuantRNNCell
from qatkit.nn.torchvision_attention import QuantShiftedWindowAttention
from qatkit.quantizer import TensorQuantizer

__all__ = [
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantELU",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantGELU",
    "QuantGRU",
    "QuantGRUCell",
    "QuantHardsigmoid",
    "QuantHardswish",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLeakyReLU",
    "QuantLinear",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantMish",
    "QuantMultiheadAttention",
    "QuantRNN",
    "QuantRNNCell",
    "QuantReLU",
    "QuantReLU6",
    "QuantShiftedWindowAttention",
    "QuantSiLU",
    "QuantSigmoid",
    "QuantSoftplus",
    "QuantTanh",
    "TensorQuantizer",
]
