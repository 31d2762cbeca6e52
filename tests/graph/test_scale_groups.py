"""F8 and F9: what only moves values shares a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule
from tests.graph.blocks import X, conv, prepared


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3)
        self.a, self.b = conv(), conv()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.out, self.other = conv(16), conv()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.cat((torch.relu(self.a(x)), self.pool(torch.relu(self.b(x)))), 1)
        return self.out(y)


def groups(model, config=None):
    return [set(group) for group in qatkit.plan(model, X, config).groups]


class Reread(Branches):
    """A part of the concatenation has a reader of its own."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        a = torch.relu(self.a(x))
        return self.out(torch.cat((a, self.pool(x)), 1)) + self.other(a)


def test_concat_and_max_pool_share():
    (group,) = groups(Reread())
    assert group == {"a.input_quantizer", "out.input_quantizer", "other.input_quantizer"}
    model = prepared(Reread())
    scales = {float(model.get_submodule(path).scale) for path in group}
    assert len(scales) == 1


def test_sharing_over_concat_is_a_switch():
    assert groups(Reread(), QuantConfig(share_concat_scales=False)) == []


def test_one_reader_has_nothing_to_share():
    assert groups(Branches()) == []


def test_different_grids_do_not_share():
    config = QuantConfig(rules=(Rule("other", activation=QuantSpec(num_bits=4)),))
    (group,) = groups(Reread(), config)
    assert group == {"a.input_quantizer", "out.input_quantizer"}
    prepared(Reread(), config=config)


def test_a_disabled_member_leaves_the_others():
    (group,) = groups(Reread(), QuantConfig(rules=(Rule("other", enabled=False),)))
    assert group == {"a.input_quantizer", "out.input_quantizer"}


class Moves(nn.Module):
    """conv reads x, and x again after values were only moved."""

    def __init__(self, move):
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(), conv()
        self.move = move

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.a(x).mean() + self.b(self.move(x)).mean()


def roll(x):
    return torch.cat((x[:, 4:], x[:, :4]), 1)


def swap(x):
    return x.permute(0, 1, 3, 2)


def shuffle(x):
    a, b = x.chunk(2, 1)
    return torch.stack((a, b), 2).flatten(1, 2)


def shuffle_by_view(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def pool(x):
    return F.max_pool2d(x, 2)


def pool_with_indices(x):
    return F.max_pool2d(x, 2, return_indices=True)[0]


def window(x):
    return x[:, :, 1:, 2:].squeeze(-1)


MOVES = [roll, swap, shuffle, shuffle_by_view, pool, pool_with_indices, window]


def pytest_generate_tests(metafunc):
    if "move" in metafunc.fixturenames:
        metafunc.parametrize("move", MOVES, ids=[move.__name__ for move in MOVES])


def test_moved_values_share(move):
    assert groups(Moves(move)) == [{"a.input_quantizer", "b.input_quantizer"}]
    prepared(Moves(move))


def test_an_activation_in_between_does_not_share():
    assert groups(Moves(F.hardswish)) == []


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(conv(3 + 4 * n, 4) for n in range(4))

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(torch.relu(layer(torch.cat(seen, 1))))
        return torch.cat(seen, 1)


def test_densely_concatenated_layers_are_one_group():
    assert groups(Dense()) == [{f"layers.{n}.input_quantizer" for n in range(4)}]
    prepared(Dense())


class C2f(nn.Module):
    """As in YOLO: chunk, a chain of residual bottlenecks, concat, SiLU."""

    def __init__(self):
        super().__init__()
        self.cv1, self.cv2 = conv(3, 8, 1), conv(16, 8, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(4, 4), nn.SiLU()) for _ in range(2))
        self.act = nn.SiLU()

    def forward(self, x):
        y = list(self.act(self.cv1(x)).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.act(self.cv2(torch.cat(y, 1)))


def test_c2f():
    model = prepared(C2f())
    assert "cv2" in {layer.path for layer in qatkit.plan(model, X).layers}


class Detect(nn.Module):
    """Two outputs of one feature map, concatenated at the end, and nothing behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.box, self.cls = conv(3), conv(8, 4, 1), conv(8, 2, 1)

    def forward(self, x):
        x = F.silu(self.stem(x))
        return torch.cat((self.box(x), self.cls(x)), 1).flatten(2)


def test_two_heads_read_one_quantizer():
    model = prepared(Detect())
    assert model.box.input_quantizer is model.cls.input_quantizer
    assert groups(Detect()) == []
