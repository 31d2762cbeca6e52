"""Input data from files: order, kinds, shapes, preprocessing and the errors."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qatkit
from qatkit.data.listing import files_of_folder

PIL = pytest.importorskip("PIL.Image")


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("b/2.png", "a/10.png", "a/9.png", "c.png", ".hidden/0.png", "b/.x.png"):
        save_image(tmp_path / name, rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    (tmp_path / "labels.txt").write_text("not an image")
    return tmp_path


def test_a_folder_in_the_order_of_paths(images: Path, monkeypatch) -> None:
    names = ["a/10.png", "a/9.png", "b/2.png", "c.png"]
    data = qatkit.load_inputs(images, batch_size=3)
    assert [s[0].relative_to(images).as_posix() for s in data.samples] == names
    assert data.kind == "images"
    assert len(data) == 2
    first, second = data
    assert first.shape == (3, 3, 6, 8)
    assert second.shape == (1, 3, 6, 8)
    assert all(torch.equal(x, y) for x, y in zip(data, data, strict=True))
    pixels = np.asarray(PIL.open(images / "a/10.png"), np.float32) / 255
    assert torch.equal(first[0], torch.from_numpy(pixels.transpose(2, 0, 1)))
    walk = __import__("os").walk

    def backwards(*args, **kwargs):
        for root, folders, files in walk(*args, **kwargs):
            folders.reverse()
            yield root, folders, sorted(files, reverse=True)

    monkeypatch.setattr("qatkit.data.listing.os.walk", backwards)
    assert [sample[0].relative_to(images).as_posix() for sample in files_of_folder(images)] == names


def test_the_count_of_samples(images: Path) -> None:
    assert len(qatkit.load_inputs(images, samples=2).samples) == 2
    assert len(qatkit.load_inputs(images, samples=99).samples) == 4


def test_preprocessing(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 2] = 255, np.arange(8) * 30
    save_image(tmp_path / "x.png", pixels)
    path = tmp_path / "x.png"
    whole = qatkit.ImagePreprocess(mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 2.0)).read(path)
    wanted = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255
    wanted = (wanted - torch.tensor([0.5, 0, 0]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(
        3, 1, 1
    )
    torch.testing.assert_close(whole, wanted)
    plain = qatkit.ImagePreprocess().read(path)
    last = qatkit.ImagePreprocess(layout="HWC", color="BGR").read(path)
    assert torch.equal(last, plain.flip(0).permute(1, 2, 0))
    assert last.is_contiguous()
    gray = qatkit.ImagePreprocess(color="L", size=2).read(path)
    assert gray.shape == (1, 2, 2)
    cut = qatkit.ImagePreprocess(size=(4, 4), resize=4)
    assert torch.equal(cut.read(path), plain[:, :, 2:6])
    assert cut.shape == (3, 4, 4)
    assert qatkit.ImagePreprocess(size=(2, 5), layout="HWC").read(path).shape == (2, 5, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cut.size = 3  # type: ignore[misc]


def test_as_torchvision_does() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(1)
    image = PIL.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        image.save(f"{folder}/x.png")
        ours = qatkit.ImagePreprocess(size=21, resize=28, mean=(0.4, 0.5, 0.6), std=0.25)
        found = ours.read(f"{folder}/x.png")
    steps = [
        transforms.Resize(28),
        transforms.CenterCrop(21),
        transforms.ToTensor(),
        transforms.Normalize((0.4, 0.5, 0.6), (0.25,) * 3),
    ]
    torch.testing.assert_close(found, transforms.Compose(steps)(image))


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted = [rng.standard_normal((2, 3)) for _ in range(3)]
    for index, array in enumerate(wanted):
        np.save(tmp_path / f"{index}.npy", array.astype([np.float64, ">f4", np.float32][index]))
    (batch,) = qatkit.load_inputs(tmp_path)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, torch.tensor(np.stack(wanted), dtype=torch.float32))


def test_a_batch_axis_in_the_files(tmp_path: Path) -> None:
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", np.full((1, 3), index, np.float32))
    assert next(iter(qatkit.load_inputs(tmp_path, shapes=[(3,)]))).shape == (2, 3)
    assert next(iter(qatkit.load_inputs(tmp_path))).shape == (2, 1, 3)


def test_npz_by_name_and_by_number(tmp_path: Path) -> None:
    for folder in ("named", "plain", "one"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        x, ids = np.full((2, 2), index, np.float32), np.arange(index, index + 2)
        np.savez(tmp_path / f"named/{index}.npz", ids=ids, x=x)
        np.savez(tmp_path / f"plain/{index}.npz", x, *[ids] * 11)
        np.savez(tmp_path / f"one/{index}.npz", x)
    (named,) = qatkit.load_inputs(tmp_path / "named")
    assert set(named) == {"x", "ids"}
    assert named["ids"].dtype == torch.int64
    assert named["x"].shape == (3, 2, 2)
    (plain,) = qatkit.load_inputs(tmp_path / "plain")
    assert isinstance(plain, tuple)
    assert len(plain) == 12
    assert plain[0].shape == (3, 2, 2)
    assert all(each.dtype == torch.int64 for each in plain[1:])
    (one,) = qatkit.load_inputs(tmp_path / "one")
    assert one.shape == (3, 2, 2)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


def test_a_list_with_several_inputs_calibrates_a_model(tmp_path: Path) -> None:
    lines = []
    for index in (2, 0, 1):
        np.save(tmp_path / f"x{index}.npy", np.full(4, index, np.float32))
        np.save(tmp_path / f"y{index}.npy", np.full(3, -index, np.float32))
        lines += [f" x{index}.npy , {tmp_path}/y{index}.npy", ""]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    data = qatkit.load_inputs(data_list=tmp_path / "list.txt", batch_size=2)
    x, y = next(iter(data))
    assert x[:, 0].tolist() == [2, 0]
    assert y[:, 0].tolist() == [-2, 0]
    model = qatkit.prepare(Two(), (torch.zeros(1, 4), torch.zeros(1, 3)))
    report = qatkit.calibrate(model, data, method="minmax", progress=False)
    assert report.samples == 3
    ranges = {path: (low, high) for path, low, high, _ in report.ranges}
    assert ranges["a.input_quantizer"] == (0, 2)
    assert ranges["b.input_quantizer"] == (-2, 0)
    assert qatkit.sensitivity(model, data, progress=False).batches == 2


def fails(message: str, *args, **kwargs) -> None:
    with pytest.raises(qatkit.QatkitError, match=message) as caught:
        list(qatkit.load_inputs(*args, **kwargs))
    assert "\n" not in str(caught.value)


def test_sources_that_are_none(images: Path, tmp_path: Path) -> None:
    fails("either a folder or data_list")
    fails("either a folder or data_list", images, data_list="x")
    fails("no such folder", tmp_path / "nothing")
    fails("give it as data_list=", images / "labels.txt")
    fails("no such list", data_list=tmp_path / "nothing.txt")
    fails("samples=0", images, samples=0)
    fails("batch_size=True", images, batch_size=True)
    (tmp_path / "empty").mkdir()
    fails("no file of a known kind", tmp_path / "empty")


def test_mixed_kinds(images: Path) -> None:
    np.save(images / "z.npy", np.zeros(3))
    fails(r"mixes images \(10.png\) and npy \(z.npy\)", images)
    (images / "list.txt").write_text("c.png,z.npy")
    fails("mixes images", data_list=images / "list.txt")


def test_bad_lists(images: Path) -> None:
    path = images / "list.txt"
    for text, message in [
        ("", "names no files"),
        ("c.png\n\nno.png", r"line 3: no file .*no.png"),
        ("c.png,c.png\nc.png", "line 2: has 1 inputs and the lines before 2"),
        ("c.png,,c.png", "empty name"),
        ("labels.txt", "'labels.txt' is of no known kind"),
    ]:
        path.write_text(text)
        fails(message, data_list=path)
    path.write_bytes(b"\xff\xfe\x00\x81")
    fails("cannot be read as a list", data_list=path)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, message in [
        ("x.png", "cannot be read as an image"),
        ("x.npy", "cannot be read as arrays"),
        ("x.npz", "cannot be read as arrays"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        for content in (b"", b"broken", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00v\x00{"):
            (folder / name).write_bytes(content)
            fails(message, folder)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "list.txt").write_text("o.npy")
    fails("cannot be read as arrays", data_list=tmp_path / "list.txt")
    np.savez(tmp_path / "n.npz", np.zeros(2))
    (tmp_path / "n.npz").rename(tmp_path / "o.npy")
    fails("is not what its suffix '.npy' says", data_list=tmp_path / "list.txt")
    np.save(tmp_path / "o.npy", np.array(["text"]))
    fails("save numbers", data_list=tmp_path / "list.txt")
    truncated = (tmp_path / "cut.png").open("wb")
    save_image(tmp_path / "whole.png", np.zeros((64, 64, 3), np.uint8))
    with truncated:
        truncated.write((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "list.txt").write_text("cut.png")
    fails("cannot be read as an image", data_list=tmp_path / "list.txt")


def test_wrong_shapes(images: Path, tmp_path: Path) -> None:
    save_image(images / "z.png", np.zeros((3, 3, 3), np.uint8))
    fails(r"z.png: shape \(3, 3, 3\).*ImagePreprocess\(size", images)
    assert len(list(qatkit.load_inputs(images, preprocess=qatkit.ImagePreprocess(size=4)))) == 1
    fails(
        "less than size",
        images,
        preprocess=qatkit.ImagePreprocess(size=(6, 12), resize=6),
    )
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "0.npy", np.zeros(3))
    np.save(arrays / "1.npy", np.zeros(3, np.int32))
    fails(r"1.npy: shape \(3,\), torch.int32, and should be \(3,\), torch.float32", arrays)
    np.save(arrays / "1.npy", np.zeros(3))
    fails(r"0.npy: shape \(3,\).*should be \(4,\)", arrays, shapes=[(4,)])
    fails("1 inputs, shapes= has 2", arrays, shapes=[(3,), (3,)])
    fails("it is for images", arrays, preprocess=qatkit.ImagePreprocess())
    np.savez(tmp_path / "0.npz", a=np.zeros(2))
    np.savez(tmp_path / "1.npz", b=np.zeros(2))
    (tmp_path / "list.txt").write_text("0.npz\n1.npz")
    fails("holds the arrays b and 0.npz a", data_list=tmp_path / "list.txt")


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"size": (1, 2, 3)},
        {"size": 2.5},
        {"resize": 8},
        {"size": 9, "resize": 8},
        {"mean": (1.0, 2.0)},
        {"std": 0.0},
        {"std": float("nan")},
        {"layout": "NCHW"},
        {"color": "rgb"},
    ],
)
def test_illegal_preprocessing(fields) -> None:
    with pytest.raises(qatkit.QatkitError, match=r"ImagePreprocess\("):
        qatkit.ImagePreprocess(**fields)


def test_without_pillow(images: Path, monkeypatch) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    data = qatkit.load_inputs(images)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(qatkit.errors.MissingExtraError, match=r"pip install 'qatkit\[vision\]'"):
        list(data)
