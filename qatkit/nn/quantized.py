"""What every quantized layer has in common: its quantizers and its construction."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from qatkit.config import ACTIVATION, WEIGHT
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.functional import fold_scale
from qatkit.nn.registry import swap
from qatkit.nn.slots import Slots, parameter_of, quantizer_of
from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import whole
from qatkit.spec import QuantSpec


class QuantizedInput(nn.Module):
    """A layer whose input is quantized.

    Attributes:
        input_quantizer: quantizes the input.
        input_is_quantized: the block around the layer has run `input_quantizer` already, because
            the same tensor feeds other layers too; the layer then leaves its input alone.
    """

    input_quantizer: TensorQuantizer
    input_is_quantized: bool

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizers that the float layer ``layer`` is going to have."""
        return Slots()

    @classmethod
    def refusal(cls, layer: nn.Module) -> str:
        """Return why the float layer ``layer`` cannot be swapped, empty if it can."""
        return ""

    def __init__(self, *args: Any, input_spec: QuantSpec | None = None, **kwargs: Any) -> None:
        """Make the float layer from its own arguments, then add the quantizer.

        Args:
            *args: arguments of the float layer.
            input_spec: spec of the input; 8 bit by default.
            **kwargs: arguments of the float layer.
        """
        super().__init__(*args, **kwargs)
        spec = _spec(input_spec, ACTIVATION, "input_spec")
        if "input_quantizer" in type(self).slots(self).inputs:
            self.attach_input(TensorQuantizer(spec))

    def attach_input(self, quantizer: TensorQuantizer) -> None:
        """Use ``quantizer`` for the input."""
        self.input_quantizer = quantizer
        self.input_is_quantized = False

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the input as the layer computes with it."""
        return x if self.input_is_quantized else self.input_quantizer(x)


class QuantizedWeight(QuantizedInput):
    r"""A layer whose input and weight are quantized.

    With a batch norm behind it (`batch_norm`) the weight quantizer sees the folded weight while the
    batch norm stays where it is: the layer computes with ``Q(w * s) / s``, ``s = gamma /
    sqrt(running_var + eps)`` without gradient. Where each channel has its own symmetric scale, s
    cancels (``Q(w * s) / s == Q(w)``) and is never computed.

    Attributes:
        weight_quantizer: quantizes the weight.
        default_axis: axis of the output channels in the weight if it is quantized per channel, else
            ``None``.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: TensorQuantizer
    default_axis: ClassVar[int | None] = 0
    _batch_norm: tuple[nn.Module, ...]

    def __init__(
        self,
        *args: Any,
        weight_spec: QuantSpec | None = None,
        input_spec: QuantSpec | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the float layer from its own arguments, then add the quantizers.

        Args:
            *args: arguments of the float layer.
            weight_spec: spec of the weight; 8 bit, per output channel by default.
            input_spec: spec of the input; 8 bit by default.
            **kwargs: arguments of the float layer.
        """
        super().__init__(*args, input_spec=input_spec, **kwargs)
        default = WEIGHT.replace(axis=self.default_axis)
        self.attach_weight(_spec(weight_spec, default, "weight_spec"))
        self.input_quantizer.to(self.weight.device)

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizers that the float layer ``layer`` is going to have."""
        return Slots(parameters=("weight",))

    def attach_weight(self, spec: QuantSpec) -> None:
        """Quantize the weight as ``spec`` says, with its own range until that is frozen.

        Raises:
            QatkitError: the weight has no such axis.
        """
        self.weight_quantizer = weight_quantizer_for(self.weight, spec)
        self._batch_norm = ()

    @property
    def batch_norm(self) -> nn.Module | None:
        """The batch norm that is folded into the weight, or ``None``; it is not registered here."""
        return self._batch_norm[0] if self._batch_norm else None

    def fold(self, batch_norm: nn.Module) -> None:
        """Let the weight quantizer see the weight with ``batch_norm`` folded in."""
        self._batch_norm = (batch_norm,)

    @property
    def fold_cancels(self) -> bool:
        """Whether the codes are the same with and without the fold, so that it costs nothing."""
        spec = self.weight_quantizer.spec
        own_scales = spec.axis == self.output_axis and self.groups_of_output == 1
        grid = spec.symmetric and spec.narrow_range and not spec.power_of_two
        return own_scales and grid and spec.observer != "fixed"

    @property
    def reads_its_parameter(self) -> bool:
        """Whether the weight quantizer gets the parameter itself, not what a fold makes of it."""
        return len(self._batch_norm) == 0 or self.fold_cancels

    @property
    def output_axis(self) -> int:
        """The axis of the weight that runs over output channels."""
        return 0

    @property
    def groups_of_output(self) -> int:
        """How many groups of output channels share an index of `output_axis`."""
        return 1

    def along_output(self, vector: Tensor) -> Tensor:
        """Shape a (output channels,) vector so that it multiplies the weight."""
        shape = [1] * self.weight.dim()
        shape[self.output_axis] = -1
        return vector.reshape(shape)

    def weight_fold_scale(self) -> Tensor | None:
        """Return s, shaped for the weight, or ``None`` if there is no fold or it cancels."""
        if self.reads_its_parameter:
            return None
        norm: Any = self._batch_norm[0]
        gamma = None if norm.weight is None else whole(norm.weight.detach())
        return self.along_output(fold_scale(gamma, norm.running_var, norm.eps))

    def quantized_weight(self) -> Tensor:
        """Return the weight as the layer computes with it, on the grid of the folded one.

        Shape and dtype are those of the weight.
        """
        scale = self.weight_fold_scale()
        if scale is None:
            weight: Tensor = self.weight_quantizer(self.weight)
            return weight
        folded: Tensor = self.weight_quantizer(self.weight.float() * scale)
        return (folded / scale).to(self.weight.dtype)


class QuantizedComposite(QuantizedInput):
    """A layer that is more than one operator, with a quantizer for each of its `slots`.

    Its forward calls them by name. Where one is switched off in the config, an identity stands.

    Attributes:
        default_axis: axis of the output channels in the parameters if they are quantized per
            channel, else ``None``.
    """

    default_axis: ClassVar[int | None] = 0

    def __init__(
        self,
        *args: Any,
        weight_spec: QuantSpec | None = None,
        input_spec: QuantSpec | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the float layer from its own arguments, then add the quantizers.

        Args:
            *args: arguments of the float layer.
            weight_spec: spec of the weights; 8 bit, per output channel by default.
            input_spec: spec of the inputs and of the tensors inside; 8 bit by default.
            **kwargs: arguments of the float layer.
        """
        super().__init__(*args, input_spec=input_spec, **kwargs)
        default = WEIGHT.replace(axis=self.default_axis)
        weight = _spec(weight_spec, default, "weight_spec")
        activation = _spec(input_spec, ACTIVATION, "input_spec")
        slots = type(self).slots(self)
        device = next(self.parameters()).device
        inner = (name for group in slots.inner for name in group)
        for name in (*slots.inputs, *map(quantizer_of, slots.parameters), *inner):
            parameter = parameter_of(self, name)
            if parameter is None:
                self.add_module(name, TensorQuantizer(activation, device=device))
            else:
                self.add_module(name, weight_quantizer_for(parameter, weight))
        for name in slots.layers:
            layer: Any = self.get_submodule(name)
            swap(layer)
            layer.attach_input(TensorQuantizer(activation, device=device))
            layer.attach_weight(weight)

    def quantized_parameter(self, name: str) -> Tensor:
        """Return a parameter as the layer computes with it."""
        quantized: Tensor = self.get_submodule(quantizer_of(name))(getattr(self, name))
        return quantized


def weight_quantizer_for(parameter: Tensor, spec: QuantSpec) -> TensorQuantizer:
    """Return a quantizer of a weight: its range is that of the weight at hand until it is frozen.

    Raises:
        QatkitError: the parameter has no such axis.
    """
    if spec.axis is not None:
        spec = spec.replace(axis=_positive(spec.axis, parameter))
    channels = None if spec.axis is None else parameter.shape[spec.axis]
    return TensorQuantizer(spec.replace(memory="latest"), channels, device=parameter.device)


def _positive(axis: int, weight: Tensor) -> int:
    """Count an axis of the weight from the front."""
    if not -weight.dim() <= axis < weight.dim():
        raise QatkitError(f"QuantSpec(axis={axis}): the weight has {weight.dim()} axes; give 0")
    return axis % weight.dim()


def _spec(spec: QuantSpec | None, default: QuantSpec, where: str) -> QuantSpec:
    if spec is None:
        return default
    if not isinstance(spec, QuantSpec):
        raise QatkitTypeError(f"{where}={spec!r}: give a qatkit.QuantSpec")
    return spec
