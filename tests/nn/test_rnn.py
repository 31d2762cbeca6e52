"""Recurrent layers: those of ``torch.nn`` without quantizing, and quantized step by step."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import qatkit
import qatkit.nn as qnn
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec

KINDS = ("LSTM", "GRU", "RNN")
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for kind in KINDS),
    *((kind, {"num_layers": 3, "bias": False}) for kind in KINDS),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
    ("LSTM", {"proj_size": 3}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
]
FORMS = ("batch", "single", "sorted", "unsorted")
LENGTHS = {"sorted": [6, 4, 4, 1], "unsorted": [3, 6, 1, 5]}


def pair(kind: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Return a float layer and the quantized one with the same weights."""
    plain = getattr(nn, kind)(*args, **options)
    quantized = getattr(qnn, f"Quant{kind}")(*args, **options)
    quantized.load_state_dict(plain.state_dict(), strict=True)
    return plain, quantized


def state(layer: Any, batch: int | None) -> Any:
    """Return a random state in the form that a layer takes."""
    count = layer.num_layers * (1 + layer.bidirectional)
    shape = (count,) if batch is None else (count, batch)
    hidden = torch.randn(*shape, layer.proj_size or layer.hidden_size)
    if not isinstance(layer, nn.LSTM):
        return hidden
    return hidden, torch.randn(*shape, layer.hidden_size)


def sequences(layer: Any, form: str) -> tuple[Tensor, Any]:
    """Return a leaf with four sequences of six steps, or one, and what the layer is given of it."""
    x = torch.randn(4, 6, layer.input_size) if form != "single" else torch.randn(6, 5)
    if form != "single" and not layer.batch_first:
        x = x.transpose(0, 1)
    x = x.clone().requires_grad_()
    if form in ("batch", "single"):
        return x, x
    lengths = torch.tensor(LENGTHS[form])
    return x, pack_padded_sequence(x, lengths, layer.batch_first, form == "sorted")


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    output, after = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(after if isinstance(after, tuple) else (after,))]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_without_quantizing(kind: str, options: dict[str, Any], form: str, given: bool) -> None:
    plain, quantized = pair(kind, 5, 7, **options)
    x, argument = sequences(plain, form)
    before = state(plain, None if form == "single" else 4) if given else None
    results, gradients = [], []
    with qatkit.disable_quantization(quantized):
        for layer in (plain, quantized):
            result = layer(argument, before)
            results.append(result)
            loss = sum((y * torch.arange(y.numel()).view_as(y)).mean() for y in tensors(result))
            gradients.append(torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True))
    assert type(results[0][0]) is type(results[1][0])
    torch.testing.assert_close(tensors(results[1]), tensors(results[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    if form == "unsorted":
        ours, theirs = (pad_packed_sequence(result[0])[0] for result in results)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    plain, quantized = pair(kind, 5, 7, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    with qatkit.disable_quantization(quantized):
        torch.testing.assert_close(quantized(x)[0], plain(x)[0])
    assert quantized(x)[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind: str) -> None:
    plain, quantized = pair(kind, 5, 7, num_layers=2, dropout=1.0)
    x = torch.randn(6, 4, 5)
    with qatkit.disable_quantization(quantized):
        torch.testing.assert_close(quantized(x)[0], plain(x)[0])  # all is dropped
        torch.testing.assert_close(quantized.eval()(x)[0], plain.eval()(x)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_without_quantizing(kind: str, bias: bool) -> None:
    plain, quantized = pair(kind, 5, 7, bias=bias)
    for shape in ((4,), ()):
        x = torch.randn(*shape, 5, requires_grad=True)
        hidden = torch.randn(*shape, 7)
        for before in (None, (hidden, 2 * hidden) if kind == "LSTMCell" else hidden):
            gradients = []
            with qatkit.disable_quantization(quantized):
                ours, theirs = quantized(x, before), plain(x, before)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                for layer, result in ((quantized, ours), (plain, theirs)):
                    every = result if isinstance(result, tuple) else (result,)
                    loss = sum(y.sin().sum() for y in every)
                    inputs = [x, *layer.parameters()]
                    gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
            torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def quantized_by_hand(layer: Any, x: Tensor) -> Tensor:
    """Run one layer in one direction with the cell of ``torch.nn`` on quantized tensors."""
    kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[type(layer).__name__[5:]]
    cell = kind(layer.input_size, layer.hidden_size)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    values = {name: getattr(layer, f"{name}_l0").detach() for name in names}
    for name in names[:2]:
        values[name] = getattr(layer, f"{name}_l0_quantizer")(values[name])
    cell.load_state_dict(values)
    hidden, memory = (torch.zeros(x.shape[1], layer.hidden_size) for _ in range(2))
    outputs = []
    for step in layer.input_quantizer(x):
        quantized = layer.hidden_l0_quantizer(hidden)
        if kind is nn.LSTMCell:
            hidden, memory = cell(step, (quantized, memory))
        elif kind is nn.RNNCell:
            hidden = cell(step, quantized)
        else:  # the cell of torch.nn would also mix the quantized state into the new one
            gates = cell.weight_ih @ step.T + cell.bias_ih[:, None]
            own = cell.weight_hh @ quantized.T + cell.bias_hh[:, None]
            reset, update = ((gates + own)[: 2 * layer.hidden_size]).sigmoid().chunk(2)
            new = (gates.chunk(3)[2] + reset * own.chunk(3)[2]).tanh()
            hidden = ((1 - update) * new).T + update.T * hidden
        outputs.append(hidden)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_values(kind: str) -> None:
    layer, x = getattr(qnn, f"Quant{kind}")(5, 7), torch.randn(6, 4, 5)
    with torch.no_grad():
        layer(x)
        layer.eval()
        wanted = quantized_by_hand(layer, x)
        torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-5, atol=1e-5)
        plain = getattr(nn, kind)(5, 7)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "quant" not in k})
        error = (plain(x)[0] - wanted).abs().max()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_is_one_step_of_the_layer(kind: str) -> None:
    layer = getattr(qnn, f"Quant{kind[:-4]}")(5, 7)
    cell = getattr(qnn, f"Quant{kind}")(5, 7)
    x, before = torch.randn(1, 4, 5), state(layer, 4)
    layer(x, before)
    layer(x, before)
    names = {"input": "input", "hidden": "hidden_l0"}
    names |= {f"weight_{part}": f"weight_{part}_l0" for part in ("ih", "hh")}
    values = {key.replace("_l0", ""): value for key, value in layer.state_dict().items()}
    cell.load_state_dict(values, strict=True)
    one = tuple(each[0] for each in before) if isinstance(before, tuple) else before[0]
    ours, theirs = cell.eval()(x[0], one), layer.eval()(x, before)[1]
    ours = ours if isinstance(ours, tuple) else (ours,)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_while_quantizing(kind: str) -> None:
    plain, layer = pair(kind, 8, 16, num_layers=2, bidirectional=True)
    x = torch.randn(5, 4, 8, requires_grad=True)
    layer(x)
    found = [
        torch.autograd.grad(one(x)[0].square().sum(), [x, *one.parameters()])
        for one in (layer, plain)
    ]
    names = ["input", *(name for name, _ in layer.named_parameters())]
    for ours, theirs, name in zip(*found, names, strict=True):
        similarity = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0)
        assert similarity > 0.99, name


def test_one_estimate_for_a_sequence_of_any_length() -> None:
    spec = QuantSpec(observer="minmax")
    layer = qnn.QuantGRU(5, 7, 2, bidirectional=True, input_spec=spec)
    output, _ = layer(torch.randn(9, 4, 5))
    assert {int(q.num_batches) for _, q in quantizers(layer)} == {1}
    forward, backward = output.detach().chunk(2, dim=-1)
    for seen, name in ((forward[:-1], "l1"), (backward[1:], "l1_reverse")):
        low, high = layer.get_submodule(f"hidden_{name}_quantizer").range
        assert (low, high) == (seen.min().clamp(max=0), seen.max().clamp(min=0))


def quantizers(layer: nn.Module) -> list[tuple[str, TensorQuantizer]]:
    return [(n, m) for n, m in layer.named_modules() if isinstance(m, TensorQuantizer)]


def test_first_sequence_passes_the_hidden_state_the_second_quantizes_it() -> None:
    layer, x = qnn.QuantRNN(5, 7), torch.randn(6, 4, 5)
    first = layer(x)[0]
    assert int(layer.hidden_l0_quantizer.num_batches) == 1
    assert not torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell", "RNNCell"])
def test_when_ranges_change(kind: str) -> None:
    layer = getattr(qnn, f"Quant{kind}")(5, 7)
    x = torch.randn(4, 5) if kind.endswith("Cell") else torch.randn(6, 4, 5)
    before = None if not kind.endswith("Cell") else torch.randn(4, 7)
    before = (before, before) if kind == "LSTMCell" else before

    def ranges() -> list[Tensor]:
        every = layer.named_buffers()
        return [buffer.clone() for name, buffer in every if name.endswith("_val")]

    untouched = ranges()
    layer(x, before)
    trained = ranges()
    assert all(not torch.equal(a, b) for a, b in zip(untouched, trained, strict=True))
    layer.eval()(3 * x, before)
    with qatkit.freeze_ranges(layer.train()):
        layer(3 * x, before)
        assert all(torch.equal(a, b) for a, b in zip(trained, ranges(), strict=True))
    layer(3 * x, before)
    assert layer.input_quantizer.amax > trained[1]


def test_packed_sequences_are_quantized_like_each_alone() -> None:
    layer = qnn.QuantLSTM(5, 7, 2, bidirectional=True, batch_first=True, proj_size=4)
    x = torch.randn(4, 6, 5)
    layer(x)
    layer.eval()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS["unsorted"]), True, False)
    output, (hidden, cell) = layer(packed)
    padded, _ = pad_packed_sequence(output, batch_first=True)
    for row, length in enumerate(LENGTHS["unsorted"]):
        alone, (h, c) = layer(x[row, :length])
        torch.testing.assert_close(padded[row, :length], alone)
        torch.testing.assert_close((hidden[:, row], cell[:, row]), (h, c))


def test_quantizers_and_their_shapes() -> None:
    layer = qnn.QuantLSTM(5, 7, 2, bidirectional=True, proj_size=3)
    ends = ["l0", "l0_reverse", "l1", "l1_reverse"]
    weights = {f"weight_{part}_{end}_quantizer" for part in ("ih", "hh", "hr") for end in ends}
    hidden = {f"{part}_{end}_quantizer" for part in ("hidden", "projection") for end in ends}
    found = dict(quantizers(layer))
    assert set(found) == weights | hidden | {"input_quantizer", "input_l1_quantizer"}
    for name in weights:
        rows = getattr(layer, name.removesuffix("_quantizer")).shape[0]
        assert found[name].min_val.shape == (rows,)
    assert all(found[name].min_val.shape == () for name in set(found) - weights)


def test_specs_device_dtype_and_signature() -> None:
    four, axis = QuantSpec(num_bits=4), QuantSpec(axis=1, observer="minmax")
    layer = qnn.QuantGRU(
        5, 7, device="meta", dtype=torch.bfloat16, weight_spec=axis, input_spec=four
    )
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.weight_ih_l0_quantizer.min_val.shape == (5,)
    assert layer.input_quantizer.spec.num_bits == layer.hidden_l0_quantizer.spec.num_bits == 4
    for kind in KINDS:
        ours = inspect.signature(getattr(qnn, f"Quant{kind}")).parameters
        theirs = inspect.signature(getattr(nn, kind)).parameters
        assert [name for name in ours if not name.endswith("_spec")] == list(theirs)
    with pytest.raises(QatkitTypeError, match=r"input_spec=8: give a qatkit\.QuantSpec"):
        qnn.QuantLSTM(2, 2, input_spec=8)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell"])
def test_copies_and_keys(kind: str, through: str) -> None:
    layer = getattr(qnn, f"Quant{kind}")(5, 7)
    x = torch.randn(4, 5) if kind.endswith("Cell") else torch.randn(6, 4, 5)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "save": lambda: torch.load(file, weights_only=False),
    }[through]()
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=0, atol=0)
    fresh = getattr(qnn, f"Quant{kind}")(5, 7)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(x), layer(x), rtol=0, atol=0)
    own = [key for key in layer.state_dict() if "_quantizer." not in key]
    assert own == list(getattr(nn, kind)(5, 7).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str) -> None:
    layer, x = getattr(qnn, f"Quant{kind}")(5, 7, num_layers=2), torch.randn(6, 4, 5)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x)
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), layer(x)[0], rtol=0.05, atol=0.05)
    ranges = [buffer.clone() for buffer in layer.buffers()]
    layer.eval().to(torch.bfloat16)
    assert layer(x.bfloat16())[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(ranges, layer.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("kind", "whole"), [("RNN", False), ("GRU", True), ("LSTMCell", True)])
def test_compiled(kind: str, whole: bool) -> None:
    """TorchDynamo breaks its graph at every ``torch.nn.RNNBase``, unless ``allow_rnn`` is set."""
    layer = getattr(qnn, f"Quant{kind}")(5, 7)
    x = torch.randn(4, 5) if kind.endswith("Cell") else torch.randn(3, 4, 5)
    layer(x)
    layer(x)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=whole, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=whole):
        results = [one(x) for one in (compiled, eager)]
    torch.testing.assert_close(*results)
    for result in results:
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    grads = [[p.grad for p in one.parameters()] for one in (layer, eager)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(list(layer.buffers()), list(eager.buffers()))


@pytest.mark.parametrize("kind", KINDS)
def test_illegal_inputs_of_layers(kind: str) -> None:
    layer = getattr(qnn, f"Quant{kind}")(5, 7)
    hidden = torch.zeros(1, 4, 7)
    good = (hidden, hidden) if kind == "LSTM" else hidden
    short = (hidden[:, :3], hidden[:, :3]) if kind == "LSTM" else hidden[:, :3]
    layer(torch.randn(6, 4, 5), good)
    for x, before, message in (
        (torch.randn(6, 4, 3), None, "Expected 5, got 3"),
        (torch.randn(6, 4, 5), short, r"size \(1, 4, 7\), got \[1, 3, 7\]"),
        (torch.randn(6, 5), good, "size"),
        (torch.randn(1, 6, 4, 5), None, "dimensions"),
        (torch.randn(5), None, "dimensions"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer(x, before)
    with pytest.raises(QatkitError, match=r"without time steps, of shape \(0, 4, 5\)"):
        layer(torch.randn(0, 4, 5))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_illegal_inputs_of_cells(kind: str) -> None:
    layer = getattr(qnn, f"Quant{kind}")(5, 7)

    def before(*shape: int) -> Any:
        hidden = torch.zeros(*shape)
        return (hidden, hidden) if kind == "LSTMCell" else hidden

    for x, hx in (
        (torch.randn(4, 3), None),
        (torch.randn(6, 4, 5), None),
        (torch.randn(4, 5), before(1, 7)),
        (torch.randn(4, 5), before(4, 5)),
        (torch.randn(4, 5), before(7)),
        (torch.randn(5), before(4, 7)),
    ):
        with pytest.raises(QatkitError, match=r"give \(N, 5\) and a state of \(N, 7\)"):
            layer(x, hx)
