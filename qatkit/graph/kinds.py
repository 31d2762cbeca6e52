"""What an operator of PyTorch is called in ONNX: one table for modules and functions alike.

The names on the right are the vocabulary of `qatkit.backend.Backend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qatkit.nn.registry import swappable

_COPIES = {
    "Reshape": (
        "reshape view view_as reshape_as unflatten pixel_shuffle pixel_unshuffle channel_shuffle"
    ),
    "Transpose": "transpose permute swapaxes swapdims movedim t T mT moveaxis",
    "Flatten": "flatten ravel",
    "Squeeze": "squeeze",
    "Unsqueeze": "unsqueeze",
    "Slice": "narrow getitem select unbind flip roll",
    "Split": "chunk split tensor_split split_with_sizes",
    "Gather": "index_select gather",
    "Concat": "cat concat concatenate stack hstack vstack",
    "Expand": "expand expand_as repeat tile repeat_interleave",
    "MaxPool": (
        "max_pool1d max_pool2d max_pool3d "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
    ),
    "Identity": (
        "contiguous clone detach alias identity "
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth"
    ),
}
_COMPUTES = {
    "Conv": "conv1d conv2d conv3d",
    "ConvTranspose": "conv_transpose1d conv_transpose2d conv_transpose3d",
    "Gemm": "linear",
    "MatMul": "matmul bmm mm mv baddbmm addmm addbmm einsum",
    "BatchNormalization": (
        "batch_norm batch_norm1d batch_norm2d batch_norm3d sync_batch_norm frozen_batch_norm2d"
    ),
    "LayerNormalization": "layer_norm",
    "Pad": "pad zeropad1d zeropad2d zeropad3d constantpad1d constantpad2d constantpad3d",
    "Add": "add",
    "Mul": "mul multiply",
    "AveragePool": (
        "avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
    ),
    "ReduceMean": "mean",
    "Activation": (
        "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish glu threshold hardshrink "
        "sigmoid hardsigmoid logsigmoid hardswish tanh hardtanh softplus softsign"
    ),
    "Attention": "multihead_attention scaled_dot_product_attention",
    "LSTM": "lstm lstm_cell",
    "GRU": "gru gru_cell",
    "RNN": "rnn_tanh rnn_relu rnn_tanh_cell rnn_relu_cell",
    "Embedding": "embedding embedding_bag",
    "DeformConv": "deform_conv2d",
    "RoiAlign": "roi_align ps_roi_align roi_pool ps_roi_pool",
}

KINDS: Mapping[str, str] = {
    name: kind
    for table in (_COPIES, _COMPUTES)
    for kind, names in table.items()
    for name in names.split()
}

SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as"})
"""Functions that give their first input the shape of the second."""

_OPERATORS = {
    prefix + name: name
    for prefix in ("i", "r")
    for name in ("add", "sub", "mul", "matmul", "floordiv", "pow")
} | {
    **dict.fromkeys(("truediv", "itruediv", "rtruediv", "rdiv", "true_divide", "divide"), "div"),
    **dict.fromkeys(("mod", "imod", "rmod", "remainder"), "remainder"),
    "multiply": "mul",
    "subtract": "sub",
}
_MODULES = {
    "Conv1d": "conv1d",
    "Conv2d": "conv2d",
    "Conv3d": "conv3d",
    "ConvTranspose1d": "conv_transpose1d",
    "ConvTranspose2d": "conv_transpose2d",
    "ConvTranspose3d": "conv_transpose3d",
    "Linear": "linear",
    "NonDynamicallyQuantizableLinear": "linear",
    "BatchNorm1d": "batch_norm1d",
    "BatchNorm2d": "batch_norm2d",
    "BatchNorm3d": "batch_norm3d",
    "SyncBatchNorm": "sync_batch_norm",
    "FrozenBatchNorm2d": "frozen_batch_norm2d",
    "LayerNorm": "layer_norm",
    "MultiheadAttention": "multihead_attention",
    "LSTM": "lstm",
    "LSTMCell": "lstm_cell",
    "GRU": "gru",
    "GRUCell": "gru_cell",
    "RNN": "rnn_tanh",
    "RNNCell": "rnn_tanh_cell",
    "Embedding": "embedding",
    "EmbeddingBag": "embedding_bag",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "PReLU": "prelu",
    "RReLU": "rrelu",
    "GELU": "gelu",
    "SiLU": "silu",
    "ELU": "elu",
    "SELU": "selu",
    "CELU": "celu",
    "LogSigmoid": "logsigmoid",
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "ChannelShuffle": "channel_shuffle",
    "MaxPool1d": "max_pool1d",
    "MaxPool2d": "max_pool2d",
    "MaxPool3d": "max_pool3d",
    "AvgPool1d": "avg_pool1d",
    "AvgPool2d": "avg_pool2d",
    "AvgPool3d": "avg_pool3d",
    "AdaptiveAvgPool1d": "adaptive_avg_pool1d",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "AdaptiveAvgPool3d": "adaptive_avg_pool3d",
    "AdaptiveMaxPool1d": "adaptive_max_pool1d",
    "AdaptiveMaxPool2d": "adaptive_max_pool2d",
    "AdaptiveMaxPool3d": "adaptive_max_pool3d",
    "AlphaDropout": "alpha_dropout",
    "Dropout1d": "dropout1d",
    "Dropout2d": "dropout2d",
    "Dropout3d": "dropout3d",
}


def function_name(function: Any) -> str:
    """Return the one name of a function, method or operator, in place or not.

    >>> import operator, torch
    >>> {function_name(f) for f in (operator.iadd, torch.Tensor.__iadd__, torch.add, "add_")}
    {'add'}
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    if name == "__get__":
        return str(function.__self__.__name__)
    if name.startswith("__") or not isinstance(function, str):
        bare = name.strip("_")
        return _OPERATORS.get(bare, bare)
    return _OPERATORS.get(name.rstrip("_"), name.rstrip("_"))


# What `torch.compiler.assume_constant_result` does, without its import of the compiler: torch 2.14
# knows no names of builtin methods while it compiles.
function_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def module_name(module: nn.Module) -> str:
    """Return the name that `KINDS` has for what a leaf module computes.

    >>> module_name(nn.Conv2d(1, 1, 1)), KINDS[module_name(nn.Dropout())]
    ('conv2d', 'Identity')
    """
    names = [ancestor.__name__ for ancestor in type(module).__mro__]
    return next((_MODULES[name] for name in names if name in _MODULES), names[0].lower())


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one operator.

    That is a layer which has a quantized form, a childless layer of ``torch.nn``, or a known one.
    """
    kind = type(module)
    if swappable(module) or kind.__name__ == "FrozenBatchNorm2d":
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    childless = not any(True for _ in module.children())
    return (
        kind.__module__.startswith("torch.nn.modules.")
        and childless
        and not isinstance(module, containers)
    )


def kind_of(name: str) -> str:
    """Return the kind of an operator, ``"Other"`` for one that no rule speaks about."""
    return KINDS.get(name, "Other")
