"""What a recorded run knows about values, and that the model is left alone."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import nn

import qatkit
from qatkit.errors import QatkitError
from qatkit.graph.capture import capture
from tests.graph.blocks import X, conv, conv_bn


def names(model, inputs=X):
    return [call.name for call in capture(model, inputs).operators]


def record(forward, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

    return Net()


def test_operators_in_order_with_their_producers():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 2))
    seen = capture(model, X)
    assert [call.name for call in seen.operators] == ["0", "1", "2", "3"]
    assert [call.kind for call in seen.operators] == ["Conv", "Activation", "Flatten", "Gemm"]
    for before, after in zip(seen.operators, seen.operators[1:], strict=False):
        assert after.inputs[0].producer is before
        assert before.results[0].consumers == [after]


def test_writing_in_place_makes_a_new_value():
    def forward(self, x):
        y = self.f(x)
        z = y.add_(1.0)
        return torch.relu_(z)

    f, add, relu = capture(record(forward, f=conv(3)), X).operators
    assert add.inputs[0].producer is f
    assert relu.inputs[0].producer is add
    assert add.results[0] is not f.results[0]


def test_in_place_module():
    f, relu, g = capture(nn.Sequential(conv(3), nn.ReLU(inplace=True), conv()), X).operators
    assert f.results[0].consumers == [relu]
    assert g.inputs[0].producer is relu


def test_an_alias_holds_what_was_written_in_place():
    def forward(self, x):
        y = self.f(x)
        alias = y
        y += 1.0
        return self.g(alias)

    _, add, g = capture(record(forward, f=conv(3), g=conv()), X).operators
    assert g.inputs[0].producer is add


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(), nn.Sequential(), nn.AlphaDropout()]
)
def test_what_hands_a_tensor_through_is_an_operator_of_its_own(module):
    seen = capture(nn.Sequential(conv(3), module, conv()), X)
    first, *_, last = seen.operators
    assert last.inputs[0] is not first.results[0]
    assert first.results[0].consumers[0].kind == "Identity"


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, -1),
        lambda x: x.flatten(1),
        lambda x: x[:, :4],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.mT,
        lambda x: x.contiguous(),
        lambda x: x.unsqueeze(0),
    ],
)
def test_views_are_operators(view):
    f, v, g = capture(record(lambda self, x: torch.tanh(view(self.f(x))), f=conv(3)), X).operators
    assert f.results[0].consumers == [v]
    assert v.results[0].consumers == [g]


def test_chunks_are_values_of_one_operator():
    def forward(self, x):
        a, b = self.f(x).chunk(2, dim=1)
        return self.g(torch.cat((b, a), dim=1))

    f, split, cat, _ = capture(record(forward, f=conv(3), g=conv()), X).operators
    assert (split.kind, cat.kind) == ("Split", "Concat")
    assert cat.inputs == list(reversed(split.results))
    assert f.results[0].consumers == [split]


def test_parameters_and_what_is_made_of_them_are_constant():
    net = record(lambda self, x: x * torch.exp(self.f.weight).sum() + self.f.bias.sum(), f=conv(3))
    seen = capture(net, X)
    constant = {call.name: call.results[0].constant for call in seen.operators}
    assert constant["exp"]
    assert constant["sum"]
    assert not constant["mul"]


def test_a_shared_module_has_a_call_for_each_use():
    relu = nn.ReLU()
    net = record(lambda self, x: self.r(self.g(self.r(self.f(x)))), f=conv(3), g=conv(), r=relu)
    assert names(net) == ["f", "r", "g", "r"]


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Fields:
    a: torch.Tensor
    b: list


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"b": b}],
        lambda a, b: {"a": a, "b": (b,)},
        lambda a, b: collections.OrderedDict(a=a, b=b),
        Pair,
        lambda a, b: Fields(a, [b]),
        lambda a, b: {("odd", 1): a, None: b},
    ],
)
def test_every_returned_tensor_is_known(wrap):
    def forward(self, x):
        y = self.f(x)
        return wrap(y, self.n(y))

    seen = capture(record(forward, f=conv(3), n=nn.BatchNorm2d(8)), X)
    f, n = seen.operators
    assert seen.root.results == [f.results[0], n.results[0]]


def test_functions_that_return_named_tuples_are_operators():
    net = record(lambda self, x: self.f(x).max(dim=1).values, f=conv(3))
    assert names(net) == ["f", "max"]


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_forms_of_inputs(inputs):
    assert names(record(lambda self, x: self.f(x), f=conv(3)), inputs) == ["f"]


class Busy(nn.Module):
    """Writes to itself when it runs."""

    def __init__(self):
        super().__init__()
        self.body = conv_bn(3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []
        self.drop = nn.Dropout()

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.last = x
        torch.rand(1)
        return self.drop(self.body(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(training):
    model = Busy().train(training)
    hook = model.body.register_forward_hook(lambda *_: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    random = torch.get_rng_state()
    qatkit.plan(model, X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert model.seen == []
    assert [module.training for module in model.modules()] == [training] * 5
    assert list(model.body._forward_hooks) == [hook.id]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn(3)

    def forward(self, x):
        y = self.f(x)
        raise RuntimeError("of its own\nsecond line")
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Fails(), X, "of its own"),
        (conv_bn(3), torch.zeros(1, 4, 8, 8), "does not run on example_inputs"),
        (conv_bn(3), (X, X), "does not run on example_inputs"),
        (conv_bn(3), {"wrong": X}, "does not run on example_inputs"),
        (conv_bn(3), None, "does not run on example_inputs"),
        (conv_bn(3), [X], "does not run on example_inputs"),
        (nn.ReLU(), X, "nothing to quantize"),
        (nn.Sequential(), X, "nothing to quantize"),
    ],
)
def test_failing_inputs_leave_the_model_as_it_was(model, inputs, message):
    classes = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(QatkitError, match=message) as error:
        qatkit.prepare(model, inputs)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("model", [None, "resnet18", lambda x: x, nn.Conv2d])
def test_what_is_no_module_is_refused(model):
    for function in (qatkit.plan, qatkit.prepare):
        with pytest.raises(QatkitError, match=r"nn\.Module"):
            function(model, X)
