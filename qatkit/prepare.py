"""`plan` and `prepare`: look at a model, then quantize it in place."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from qatkit.config import QuantConfig
from qatkit.errors import QatkitError
from qatkit.graph.capture import capture
from qatkit.graph.interception import intercept
from qatkit.graph.placement import place
from qatkit.graph.plan import Plan, QuantizerPlan
from qatkit.graph.rewrite import rewrite
from qatkit.modes import quantizers, require_module
from qatkit.nn.fast_path import avoid_fast_path
from qatkit.nn.functions import FUNCTIONS
from qatkit.nn.quantized import (
    QuantizedComposite,
    QuantizedInput,
    QuantizedWeight,
    weight_quantizer_for,
)
from qatkit.nn.registry import swap, swappable
from qatkit.nn.sequential import link
from qatkit.nn.slots import SUFFIX
from qatkit.nn.weights import weights_of
from qatkit.quantizer import TensorQuantizer, share_range
from qatkit.ranks import require_whole
from qatkit.synchronize import RangeSynchronizer

_PLAN = "_qatkit_plan"


def plan(model: nn.Module, example_inputs: Any, config: QuantConfig | str | None = None) -> Plan:
    """Return what `prepare` would do; the model is not changed.

    Args:
        model: a float model.
        example_inputs: what the model runs on: a tensor, a tuple of positional or a dict of keyword
            arguments.
        config: a `QuantConfig`, the name of a preset, or ``None`` for the default.

    Returns:
        a frozen `Plan`; print it to see each placement with its reason.

    Raises:
        QatkitError: no module, wrong inputs, unknown preset, or a rule that matches nothing.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> print(plan(net, torch.zeros(1, 3, 8, 8)))
    2 layers, 2 weight and 2 activation quantizers, 0 rewritten blocks, ... 0 left in float
    <BLANKLINE>
    quantizer           bits  observer        why
    0.input_quantizer   8     shrink          F1: input of Conv
    0.weight_quantizer  8     minmax, axis 0  F2: weight of Conv
    3.input_quantizer   8     shrink          F1: input of Gemm
    3.weight_quantizer  8     minmax, axis 0  F2: weight of Gemm
    """
    require_module(model, "plan")
    require_whole(model, "plan", "prepare the float model first and call fully_shard then")
    chosen = QuantConfig.of(config)
    existing = plan_of(model)
    if existing is not None:
        if config is not None and chosen != existing.config:
            raise QatkitError(
                f"{type(model).__name__}: is prepared with another config; "
                "prepare a fresh float model with the new one"
            )
        return existing
    if any(isinstance(module, TensorQuantizer) for module in model.modules()):
        raise QatkitError(
            f"{type(model).__name__}: has quantizers inside already; "
            "prepare the whole model once, not its parts"
        )
    return place(capture(model, example_inputs), chosen)


def prepare(
    model: nn.Module, example_inputs: Any, config: QuantConfig | str | None = None
) -> nn.Module:
    """Put quantizers into a model, in place.

    Layers become their quantized classes and keep parameters, keys and hooks; blocks with a
    residual join or several readers of one tensor get a forward that calls the quantizers. A second
    call with the same config does nothing.

    Args:
        model: a float model.
        example_inputs: what the model runs on: a tensor, a tuple of positional or a dict of keyword
            arguments.
        config: a `QuantConfig`, the name of a preset, or ``None`` for the default.

    Returns:
        the same object.

    Raises:
        QatkitError: as for `plan`; the model is then as it was.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> prepare(net, torch.zeros(1, 3, 8, 8), "tensorrt-int8") is net
    True
    >>> type(net[0]).__name__
    'QuantConv2d'
    """
    require_module(model, "prepare")
    require_whole(model, "prepare", "prepare the float model first and call fully_shard then")
    wanted = plan(model, example_inputs, config)
    if plan_of(model) is None:
        apply_plan(wanted, model)
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan that a model was prepared by, ``None`` for a float model."""
    found = model.__dict__.get(_PLAN)
    return found if isinstance(found, Plan) else None


def weight_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return the quantizers of weights by path: of parameters, and of weights that are computed.

    >>> import torch
    >>> net = prepare(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    >>> list(weight_quantizers(net))
    ['0.weight_quantizer']
    """
    found = {weight.path: weight.quantizer for weight in weights_of(model)}
    plan = plan_of(model)
    if plan is not None:
        planned = {entry.path for entry in plan.quantizers if entry.role == "weight"}
        found |= {path: each for path, each in quantizers(model) if path in planned}
    return found


def apply_plan(wanted: Plan, model: nn.Module) -> None:
    """Do what a plan says to a float model.

    Raises:
        QatkitError: the model is not the one that was planned for; it is then as it was.
    """
    modules = dict(model.named_modules())
    _check(wanted, modules, type(model).__name__)
    before = {module: (type(module), _state(module)) for module in modules.values()}
    try:
        _swap_layers(wanted, modules)
        _attach_activations(wanted, model)
        for block in wanted.blocks:
            rewrite(modules[block.path], block)
        for module in modules.values():
            avoid_fast_path(module)
            link(module)
        _synchronize(wanted, model)
        for interception in wanted.interceptions:
            intercept(modules[interception.path], interception)
    except BaseException:
        for module, (kind, state) in before.items():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
        raise
    model.__dict__[_PLAN] = wanted


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, with copies of the tables of its children and hooks."""
    tables = {name: copy.copy(each) for name, each in vars(module).items() if "_hooks" in name}
    return {**module.__dict__, **tables, "_modules": dict(module._modules)}


def _check(wanted: Plan, modules: dict[str, nn.Module], name: str) -> None:
    for layer in wanted.layers:
        module = modules.get(layer.path)
        if module is None or not swappable(module) or type(module).__name__ != layer.kind:
            found = "nothing" if module is None else type(module).__name__
            raise QatkitError(
                f"{name}: expects a {layer.kind} at {layer.path!r} and finds {found}; "
                "build the same float model"
            )
    for block in wanted.changed:
        if block.path not in modules:
            raise QatkitError(
                f"{name}: expects a block at {block.path!r}; build the same float model"
            )


def _swap_layers(wanted: Plan, modules: dict[str, nn.Module]) -> None:
    for layer in wanted.layers:
        swap(modules[layer.path])
    for block in wanted.changed:
        for replaced in block.replacements:
            parent, _, name = replaced.module.rpartition(".")
            owner = modules[block.path].get_submodule(parent)
            owner.add_module(name, FUNCTIONS[replaced.function]().train(owner.training))
    for entry in wanted.quantizers:
        if entry.role == "weight":
            _attach_weight(entry, modules)
    for layer in wanted.layers:
        module = modules[layer.path]
        if (
            isinstance(module, QuantizedWeight)
            and layer.batch_norm
            and wanted.config.fold_batch_norm
        ):
            module.fold(modules[layer.batch_norm])


def _attach_weight(entry: QuantizerPlan, modules: dict[str, nn.Module]) -> None:
    """Put the quantizer of a weight beside it, or in the block that computes the weight."""
    parent, _, name = entry.path.rpartition(".")
    owner = modules[parent]
    if isinstance(owner, QuantizedWeight) and name == "weight_quantizer":
        owner.attach_weight(entry.spec)
    elif entry.channels is None and isinstance(found := _beside(owner, name), Tensor):
        owner.add_module(name, weight_quantizer_for(found, entry.spec))
    else:
        spec = entry.spec.replace(memory="latest")
        device = next((parameter.device for parameter in owner.parameters()), None)
        owner.add_module(name, TensorQuantizer(spec, entry.channels, device=device))
    quantizer = owner.get_submodule(name)
    assert isinstance(quantizer, TensorQuantizer)
    quantizer.name = entry.path
    quantizer.training = owner.training


def _beside(owner: nn.Module, quantizer: str) -> object:
    return getattr(owner, quantizer.removesuffix(SUFFIX), None)


def _attach_activations(wanted: Plan, model: nn.Module) -> None:
    """Make the activation quantizers and register each under all its paths."""
    relieved = {layer.path for layer in wanted.layers if layer.input_is_quantized}
    made: dict[str, TensorQuantizer] = {}
    default = next((parameter.device for parameter in model.parameters()), None)
    for entry in wanted.quantizers:
        if entry.role == "weight":
            continue
        owner = model.get_submodule(entry.path.rpartition(".")[0])
        device = next((parameter.device for parameter in owner.parameters()), default)
        quantizer = made[entry.path] = TensorQuantizer(entry.spec, device=device)
        quantizer.name = entry.path
        quantizer.training = owner.training
        for path in (entry.path, *entry.aliases):
            parent, _, name = path.rpartition(".")
            module = model.get_submodule(parent)
            if isinstance(module, QuantizedInput) and name == "input_quantizer":
                module.attach_input(quantizer)
                module.input_is_quantized = parent in relieved
            else:
                module.add_module(name, quantizer)
    _fill_slots(model)
    for group in wanted.groups:
        share_range([made[path] for path in group])


def _synchronize(wanted: Plan, model: nn.Module) -> None:
    """Let the activation quantizers have the same ranges on all ranks of a distributed run."""
    observed = [q for q in wanted.quantizers if q.role != "weight" and not q.spec.learned]
    found = [each for entry in observed if (each := _quantizer(model, entry.path)) is not None]
    if found:
        RangeSynchronizer(model, found)


def _quantizer(model: nn.Module, path: str) -> TensorQuantizer | None:
    module = model.get_submodule(path)
    return module if isinstance(module, TensorQuantizer) else None


def _fill_slots(model: nn.Module) -> None:
    """Put identities where a rule left out a quantizer that a forward calls."""
    for module in list(model.modules()):
        for name in _called_by(module):
            if name not in module._modules:
                module.add_module(name, nn.Identity())


def _called_by(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the quantizers that the forward of a layer calls."""
    for function in FUNCTIONS.values():
        if isinstance(module, function):
            return tuple(name for group in function.operands for name in group)
    if isinstance(module, QuantizedComposite):
        slots = type(module).slots(module)
        return (*slots.inputs, *(name for group in slots.inner for name in group))
    return ()
