"""Embeddings: those of ``torch.nn`` without quantizing, and rows of the quantized table."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatkit
import qatkit.nn as qnn
from qatkit.errors import QatkitError
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec

PER_ROW = QuantSpec(axis=0, observer="minmax", memory="latest")


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Return a float layer and the quantized one with the same table."""
    plain = getattr(nn, kind)(10, 4, **options)
    quantized = getattr(qnn, f"Quant{kind}")(10, 4, **options)
    quantized.load_state_dict(plain.state_dict(), strict=True)
    return plain, quantized


def compare(plain: Any, quantized: Any, *args: Any) -> None:
    """Check values and gradients without quantizing."""
    with qatkit.disable_quantization(quantized):
        wanted, found = plain(*args), quantized(*args)
        torch.testing.assert_close(found, wanted)
        weights = torch.randn_like(wanted)
        for layer, y in ((plain, wanted), (quantized, found)):
            layer.zero_grad()
            (y * weights).sum().backward()
    ours, theirs = quantized.weight.grad, plain.weight.grad
    assert ours.is_sparse == theirs.is_sparse
    torch.testing.assert_close(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 0},
        {"padding_idx": -1, "sparse": True},
        {"scale_grad_by_freq": True},
        {"dtype": torch.float64},
    ],
)
def test_embedding_without_quantizing(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    plain, quantized = pair("Embedding", **options)
    compare(plain, quantized, torch.randint(10, shape))
    compare(plain, quantized, torch.randint(10, shape, dtype=torch.int32))
    compare(plain, quantized, torch.full(shape, 9))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_without_quantizing(mode: str, padding: int | None) -> None:
    plain, quantized = pair("EmbeddingBag", mode=mode, padding_idx=padding)
    bags = torch.randint(10, (4, 5))
    bags[0] = 2
    compare(plain, quantized, bags)
    compare(plain, quantized, bags.flatten(), torch.tensor([0, 4, 4, 9]))
    if mode == "sum":
        compare(plain, quantized, bags, None, torch.randn(4, 5))
        compare(plain, quantized, bags.flatten(), torch.tensor([0, 4]), torch.randn(20))
    last, ours = pair("EmbeddingBag", mode=mode, padding_idx=padding, include_last_offset=True)
    compare(last, ours, bags.flatten(), torch.tensor([0, 3, 20]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_the_quantized_table(axis: int | None, training: bool, frozen: bool) -> None:
    spec = QuantSpec(axis=axis, observer="minmax", memory="latest", num_bits=4)
    layer = qnn.QuantEmbedding(10, 4, weight_spec=spec)
    indices = torch.randint(10, (3, 5))
    layer(indices)
    if frozen:
        qatkit.freeze_ranges(layer).apply()
    with torch.no_grad():
        layer.weight.mul_(1.3)
        wanted = F.embedding(indices, layer.weight_quantizer(layer.weight))
        assert torch.equal(layer.train(training)(indices), wanted)
    assert not torch.equal(wanted, F.embedding(indices, layer.weight))


def test_default_is_one_scale_and_no_input_quantizer() -> None:
    for layer in (qnn.QuantEmbedding(10, 4), qnn.QuantEmbeddingBag(10, 4)):
        found = [n for n, m in layer.named_modules() if isinstance(m, TensorQuantizer)]
        assert found == ["weight_quantizer"]
        assert layer.weight_quantizer.min_val.shape == ()
    assert qnn.QuantEmbedding(10, 4, weight_spec=PER_ROW).weight_quantizer.min_val.shape == (10,)


def test_a_single_index() -> None:
    plain, quantized = pair("Embedding")
    compare(plain, quantized, torch.tensor(3))


def test_a_row_that_is_not_read_still_counts_for_the_range() -> None:
    layer = qnn.QuantEmbedding(10, 4)
    with torch.no_grad():
        layer.weight[7] = 100.0
    layer(torch.tensor([1, 2]))
    assert layer.weight_quantizer.max_val == 100.0


@pytest.mark.parametrize("sparse", [False, True])
def test_training(sparse: bool) -> None:
    layer, indices = qnn.QuantEmbedding(10, 4, sparse=sparse), torch.tensor([[1, 2, 2]])
    optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    losses = []
    for _ in range(30):
        loss = (layer(indices) - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    moved = (layer.weight != before).any(dim=1)
    assert moved.tolist() == [row in (1, 2) for row in range(10)]


def test_from_pretrained_copies_and_keys() -> None:
    table = torch.randn(10, 4)
    indices = torch.randint(10, (3, 5))
    for kind in ("Embedding", "EmbeddingBag"):
        layer = getattr(qnn, f"Quant{kind}").from_pretrained(table)
        assert not layer.weight.requires_grad
        layer(indices)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin.eval()(indices), layer.eval()(indices))
        fresh = getattr(qnn, f"Quant{kind}")(10, 4)
        fresh.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(fresh.eval()(indices), layer(indices))
        own = [key for key in layer.state_dict() if "_quantizer." not in key]
        assert own == list(getattr(nn, kind)(10, 4).state_dict())


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("axis", [None, 0])
def test_compiled(kind: str, axis: int | None) -> None:
    spec = PER_ROW.replace(axis=axis)
    layer = getattr(qnn, f"Quant{kind}")(10, 4, weight_spec=spec)
    indices = torch.randint(10, (3, 5))
    layer(indices)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(indices), eager(indices)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, eager.weight.grad)


def test_illegal() -> None:
    for kind in (qnn.QuantEmbedding, qnn.QuantEmbeddingBag):
        with pytest.raises(QatkitError, match="max_norm changes the table while it is read"):
            kind(10, 4, max_norm=1.0)
    with pytest.raises(IndexError):
        qnn.QuantEmbedding(10, 4)(torch.tensor([10]))
    mean, total = qnn.QuantEmbeddingBag(10, 4), qnn.QuantEmbeddingBag(10, 4, mode="sum")
    bags, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    illegal: list[tuple[Any, tuple[Any, ...], str]] = [
        (mean, (bags[0],), "1 dimensions without offsets"),
        (mean, (bags, torch.tensor([0, 1])), "2 dimensions with offsets"),
        (mean, (bags.unsqueeze(0),), "3 dimensions without offsets"),
        (mean, (bags, None, ones), "give them with mode='sum'"),
        (total, (bags, None, ones[:, :2]), r"the shape of the input, \(2, 3\)"),
    ]
    for layer, args, message in illegal:
        with pytest.raises(QatkitError, match=message):
            layer(*args)


def test_half_precision() -> None:
    layer: Any = qnn.QuantEmbedding(10, 4)
    indices = torch.randint(10, (3, 5))
    wanted: Tensor = layer(indices)
    layer.to(torch.bfloat16)
    assert layer.weight_quantizer.min_val.dtype == torch.float32
    found = layer(indices)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
