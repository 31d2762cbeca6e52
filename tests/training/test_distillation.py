"""The distillation loss against its formulas, in every kind of loop, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import qatkit
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.training.distillation import Distiller
from tests.training.nets import W4A4, Net, X, batch, sgd


def models() -> tuple[Any, Any]:
    """Return a prepared student and the float model that it was."""
    torch.manual_seed(0)
    model = Net()
    teacher = copy.deepcopy(model)
    return qatkit.prepare(model, X, W4A4).train(), teacher


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def softmax(x: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Fixed(nn.Module):
    """Returns what it is told to."""

    def __init__(self, output: Any, train: bool = True) -> None:
        super().__init__()
        self.output = nn.Parameter(output, requires_grad=train)

    def forward(self, x: Tensor) -> Tensor:
        return self.output * 1.0


@pytest.mark.parametrize(("shape", "axis"), [((5, 4), 1), ((2, 4, 3, 3), 1), ((2, 6, 4), -1)])
@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
def test_logits(shape: tuple[int, ...], axis: int, kind: Any) -> None:
    s, t = 3 * torch.randn(shape), 3 * torch.randn(shape)
    student, teacher = Fixed(s), Fixed(t)
    distill = Distiller(
        student, teacher, logits=kind, temperature=3.0, logits_weight=0.5, class_axis=axis
    )
    loss = distill(X, student(X))
    a, b = s.double().numpy(), t.double().numpy()
    if kind == "kl":
        p, q = softmax(b / 3, axis), softmax(a / 3, axis)
        wanted = 9 * (p * np.log(p / q)).sum(axis).mean()
    elif kind == "mse":
        wanted = ((a - b) ** 2).mean()
    else:
        norms = np.linalg.norm(a, axis=axis) * np.linalg.norm(b, axis=axis)
        wanted = (1 - (a * b).sum(axis) / norms).mean()
    assert loss.item() == pytest.approx(0.5 * wanted, rel=1e-4)
    loss.backward()
    assert student.output.grad is not None
    assert teacher.output.grad is None


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_features(kind: Any) -> None:
    student, teacher = models()
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        for path in ("layer1", "layer2"):
            model.get_submodule(path).register_forward_hook(
                lambda _, __, output, name=name: seen[name].append(output.detach())
            )
    with Distiller(
        student, teacher, logits=None, features=("layer?",), feature_loss=kind, feature_weight=2.0
    ) as distill:
        assert distill.features == (("layer1", "layer1"), ("layer2", "layer2"))
        loss = distill(X, student(X))
    terms = []
    for s, t in zip(seen["student"], seen["teacher"], strict=True):
        a, b = (x.double().flatten(1).numpy() for x in (s, t))
        if kind == "mse":
            terms.append(((a - b) ** 2).mean())
        else:
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            terms.append((1 - (a * b).sum(1) / norms).mean())
    assert loss.item() == pytest.approx(2 * np.mean(terms), rel=1e-4)
    loss.backward()
    assert student.conv.weight.grad.abs().sum() > 0
    assert student.fc.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_outermost_of_what_a_glob_matches() -> None:
    student, teacher = models()
    pairs = [
        [path for path, _ in Distiller(student, teacher, features=globs).features]
        for globs in (("layer*",), ("*.conv1",), ("layer*.*",), ("layer1", "layer1.conv1"))
    ]
    assert pairs[0] == ["layer1", "layer2"]
    assert pairs[1] == ["layer1.conv1", "layer2.conv1"]
    assert pairs[2] == [
        f"layer{n}.{name}" for n in (1, 2) for name in ("conv1", "bn1", "conv2", "bn2")
    ]
    assert pairs[3] == ["layer1", "layer1.conv1"]


def test_a_teacher_of_another_architecture() -> None:
    student, _ = models()
    teacher = nn.ModuleDict({"body": Net()})
    teacher.forward = lambda x: teacher["body"](x)  # type: ignore[method-assign]
    distill = Distiller(student, teacher, features={"layer1": "body.layer2"})
    assert distill(X, student(X)).isfinite()
    with pytest.raises(QatkitError, match=r"ModuleDict has no module 'layer2'"):
        Distiller(student, teacher, features={"layer1": "layer2"})


def test_the_teacher_is_run_in_eval_and_left_as_it_was() -> None:
    student, teacher = models()
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with Distiller(student, teacher) as distill:
        distill(X, student(X)).backward()
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def reference() -> tuple[Any, list[Tensor]]:
    student, teacher = models()
    with Distiller(student, teacher, features=("layer1",)) as distill:
        loss = distill(X, student(X))
    loss.backward()
    return loss.detach(), gradients(student)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("outer", [False, True])
def test_under_ddp(group: None, outer: bool) -> None:
    wanted, wanted_gradients = reference()
    student, teacher = models()
    parallel = nn.parallel.DistributedDataParallel(student)
    distill = Distiller(parallel if outer else student, teacher, features=("layer1",))
    loss = distill(X, parallel(X))
    loss.backward()
    assert torch.equal(loss.detach(), wanted)
    assert all(map(torch.equal, gradients(student), wanted_gradients))


def test_compiled() -> None:
    x, losses = torch.randn(4, 6), []
    for compiled in (False, True):
        torch.manual_seed(0)
        student: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        teacher = copy.deepcopy(student)
        qatkit.prepare(student, x, W4A4).train()
        student = torch.compile(student, backend="eager") if compiled else student
        distill = Distiller(student, teacher, features=("1",))
        losses += [distill(x, student(x)) for _ in range(2)]
    losses[3].backward()
    assert torch.allclose(losses[2], losses[0], rtol=1e-4)
    assert torch.allclose(losses[3], losses[1], rtol=1e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    student, teacher = models()
    distill = Distiller(student, teacher, features=("layer*",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(X)
        loss = distill(X, output) if inside else None
    loss = distill(X, output) if loss is None else loss
    assert output.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(bool(torch.isfinite(g).all()) for g in gradients(student))


def test_gradient_accumulation() -> None:
    student, teacher = models()
    distill = Distiller(student, teacher, features=("layer1",))
    losses = []
    for index in range(3):
        x, _ = batch(index)
        loss = distill(x, student(x)) / 3
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == 3


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = checkpoint(self.layer1, x, use_reentrant=False)
        return self.fc(self.layer2(x).mean((2, 3)))


def test_gradient_checkpointing_records_once() -> None:
    torch.manual_seed(0)
    student = Checkpointed()
    teacher = copy.deepcopy(student)
    student.conv.weight.data.mul_(1.1)
    distill = Distiller(student, teacher, features=("layer1", "layer1.conv2"))
    for _ in range(2):
        loss = distill(X, student(X))
        loss.backward()
        assert distill._taps_of_student.of("layer1") == []
    assert student.conv.weight.grad is not None


def test_it_teaches() -> None:
    student, teacher = models()
    optimizer = sgd(student)
    losses = []
    with Distiller(student, teacher, features=("layer*",)) as distill:
        for _ in range(25):
            optimizer.zero_grad()
            loss = distill(X, student(X))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_arguments_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a - b)

    student, teacher = Two(), Two()
    distill = Distiller(student, teacher, logits="mse")
    a, b = torch.randn(2, 3, 2)
    wanted = F.mse_loss(student(a, b), teacher(a, b))
    assert torch.equal(distill((a, b), student(a, b)), wanted)
    assert torch.equal(distill({"b": b, "a": a}, student(a, b)), wanted)


def test_outputs_that_are_not_a_tensor() -> None:
    class Pair(Fixed):
        def forward(self, x: Tensor) -> Any:
            return {"out": self.output * 1.0, "size": 3}

    student, teacher = Pair(torch.randn(3, 4)), Pair(torch.randn(3, 4))
    plain = Distiller(student, teacher)(X, student(X))

    class More(Pair):
        def forward(self, x: Tensor) -> Any:
            return {**super().forward(x), "aux": self.output * 2.0}

    a, b = More(student.output.detach()), More(teacher.output.detach())
    with pytest.raises(QatkitError, match="2 tensors of floats in a dict; give select="):
        Distiller(a, b)(X, a(X))
    assert torch.equal(Distiller(a, b, select=lambda output: output["out"])(X, a(X)), plain)


def test_hooks_go_and_copies_have_none_that_work() -> None:
    student, teacher = models()
    before = hooks(student), hooks(teacher)
    distill = Distiller(student, teacher, features=("layer1",))
    assert hooks(student) > before[0]
    mean = AveragedModel(student)
    assert len(list(mean.modules())) == len(list(student.modules())) + 1
    mean(X)
    again = pickle.loads(pickle.dumps(student))
    again(X)
    with pytest.raises(QatkitError, match="'layer1' gave no tensor in the last forward of the st"):
        distill(X, student.fc(torch.ones(4, 8)))
    distill.close()
    distill.close()
    assert (hooks(student), hooks(teacher)) == before


def test_pickle() -> None:
    student, teacher = models()
    student(X)
    distill = Distiller(student, teacher, features=("layer1",), temperature=2.0)
    again = pickle.loads(pickle.dumps(distill))
    student.eval(), again.student.eval()
    wanted = distill(X, student(X))
    assert torch.equal(again(X, again.student(X)), wanted)
    distill.close()
    closed = pickle.loads(pickle.dumps(distill))
    with pytest.raises(QatkitError, match="gave no tensor"):
        closed(X, closed.student(X))


def test_a_teacher_that_trains_is_warned_of() -> None:
    student, teacher = models()
    distill = Distiller(student, teacher)
    distill(X, student(X))
    with torch.no_grad():
        teacher.conv.weight.mul_(0.9)
    with pytest.warns(UserWarning, match="weights of the teacher have changed"):
        distill(X, student(X))
    distill(X, student(X))


def test_shapes_that_differ_are_named() -> None:
    student, _ = models()
    with pytest.raises(
        QatkitError, match=r"feature 'layer1' has shape \(4, 8, 8, 8\) in .* \(4, 6, 8, 8\)"
    ):
        Distiller(student, Net(6), features=("layer1",))(X, student(X))
    distill = Distiller(Fixed(torch.ones(2, 3)), Fixed(torch.ones(2, 4)))
    with pytest.raises(QatkitError, match=r"the logits has shape \(2, 3\)"):
        distill(X, torch.ones(2, 3))


def test_student_and_teacher_are_two() -> None:
    student, teacher = models()
    with pytest.raises(QatkitError, match="are the same object"):
        Distiller(student, student)
    with pytest.raises(QatkitError, match="are the same object"):
        Distiller(nn.DataParallel(student), student)
    teacher.fc.weight = student.fc.weight
    with pytest.raises(QatkitError, match=r"share the parameter 'fc\.weight'"):
        Distiller(student, teacher)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": "ce"}, "logits='ce'.*choose one of kl, mse, cosine"),
        ({"feature_loss": "kl"}, "choose one of mse, cosine"),
        ({"temperature": 0}, "positive number"),
        ({"temperature": "4"}, "positive number"),
        ({"logits_weight": -1}, "0 or more"),
        ({"feature_weight": float("nan")}, "0 or more"),
        ({"logits": None}, "nothing to learn"),
        ({"features": ("layer9",)}, "matches no module path"),
        ({"features": "layer1"}, "tuple of globs"),
        ({"features": ("conv.input_quantizer",)}, "matches no module path"),
        ({"class_axis": 2}, r"shape \(4, 10\)"),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    student, teacher = models()
    before = hooks(student)
    with pytest.raises(QatkitError, match=message):
        Distiller(student, teacher, **settings)(X, student(X))
    assert hooks(student) == before


def test_models_are_checked() -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        Distiller(3, nn.Linear(2, 2))  # type: ignore[arg-type]
