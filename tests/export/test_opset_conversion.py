"""Each rewrite against ONNX Runtime: the file at the other opset computes the same."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qatkit import QatkitError
from qatkit.export.opset_conversion import convert_opset
from qatkit.export.opset_rewrites import DOWN, UP

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RNG = np.random.default_rng(0)


def tensor(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def model_of(nodes, opset, feeds, constants=None, outputs=("y",), dims=None):
    """Return a model with the inputs ``feeds``; ``dims`` are the shapes that the file says."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                (dims or {}).get(name, array.shape),
            )
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def converted(proto, opset):
    result = copy.deepcopy(proto)
    convert_opset(result, opset)
    assert [(one.domain, one.version) for one in result.opset_import] == [("", opset)]
    for node in result.graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        assert {a.name for a in node.attribute} <= schema.attributes.keys()
        assert schema.min_input <= len(node.input) <= schema.max_input
    return result


def node(op, inputs, outputs="y", **attributes):
    names = [name if name != "-" else "" for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), **attributes)


X = tensor(2, 6, 4, 5)
BOXES = np.float32([[0, 0, 3, 3], [1, 0, 3, 2]])
GRID = RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)

# case: opset, target, node, constants beside the input x, kinds that must be there, or not
SAME = {
    "reduce": (18, 13, node("ReduceMean", "x axes", keepdims=0), {"axes": [1, -1]}),
    "reduce all": (18, 13, node("ReduceMax", "x"), {}),
    "reduce no axes": (18, 13, node("ReduceMin", "x axes"), {"axes": np.zeros(0, np.int64)}),
    "reduce from 20": (20, 13, node("ReduceMin", "x axes"), {"axes": [2]}),
    "sum": (18, 13, node("ReduceSum", "x axes", noop_with_empty_axes=1), {"axes": [2]}),
    "split": (18, 13, node("Split", "x", "y z", axis=1, num_outputs=2), {}),
    "split unevenly": (18, 13, node("Split", "x", "y z", axis=-1, num_outputs=2), {}),
    "split lengths": (18, 13, node("Split", "x parts", "y z", axis=1), {"parts": [2, 4]}),
    "pad axes": (18, 13, node("Pad", "x pads - axes"), {"pads": [1, 0, 2, 3], "axes": [3, 1]}),
    "pad value": (
        19,
        13,
        node("Pad", "x pads value axes"),
        {"pads": [1, 2], "value": np.float32(3), "axes": [-1]},
    ),
    "pad": (18, 13, node("Pad", "x pads", mode="edge"), {"pads": [0, 0, 1, 0, 0, 0, 0, 2]}),
    "resize scales": (
        18,
        13,
        node("Resize", "x - factors", axes=[2, 3], antialias=0),
        {"factors": np.float32([2, 3])},
    ),
    "resize sizes": (
        19,
        13,
        node("Resize", "x - - sizes", axes=[3, 2], mode="linear"),
        {"sizes": [7, 9]},
    ),
    "resize": (
        19,
        13,
        node("Resize", "x - - sizes", mode="cubic", keep_aspect_ratio_policy="stretch"),
        {"sizes": [2, 6, 8, 8]},
    ),
    "shape": (15, 13, node("Shape", "x"), {}),
    "shape from": (18, 13, node("Shape", "x", start=-3), {}),
    "shape to": (19, 13, node("Shape", "x", start=1, end=-1), {}),
    "shape of nothing": (18, 14, node("Shape", "x", start=3, end=1), {}),
    "layer norm": (
        17,
        13,
        node("LayerNormalization", "x scale bias", epsilon=0.1),
        {"scale": tensor(5), "bias": tensor(5)},
    ),
    "layer norm over all": (
        17,
        13,
        node("LayerNormalization", "x scale", "y mean deviation", axis=1),
        {"scale": tensor(6, 4, 5)},
    ),
    "plain layer norm": (
        18,
        16,
        node("LayerNormalization", "x scale bias", axis=-2),
        {"scale": np.ones((4, 5), np.float32), "bias": np.zeros((4, 5), np.float32)},
    ),
    "group norm": (
        18,
        13,
        node("GroupNormalization", "x scale bias", num_groups=3, epsilon=0.01),
        {"scale": tensor(3), "bias": tensor(3)},
    ),
    "group norm by channel": (
        21,
        13,
        node("GroupNormalization", "x scale bias", num_groups=2),
        {"scale": tensor(6), "bias": tensor(6)},
    ),
    "group norm by channel, 18": (
        21,
        18,
        node("GroupNormalization", "x scale bias", num_groups=2),
        {"scale": tensor(6), "bias": tensor(6)},
    ),
    "group norm up": (
        18,
        21,
        node("GroupNormalization", "x scale bias", num_groups=2),
        {"scale": tensor(2), "bias": tensor(2)},
    ),
    "gelu": (20, 13, node("Gelu", "x"), {}),
    "gelu by tanh": (20, 13, node("Gelu", "x", approximate="tanh"), {}),
    "hard swish": (14, 13, node("HardSwish", "x"), {}),
    "mish": (18, 13, node("Mish", "x"), {}),
    "cast like": (19, 13, node("CastLike", "x like", saturate=1), {"like": np.int64([1])}),
    "upper": (14, 13, node("Trilu", "x"), {}),
    "upper by 1": (18, 13, node("Trilu", "x k"), {"k": np.asarray(1)}),
    "lower": (14, 13, node("Trilu", "x k", upper=0), {"k": np.asarray(-1)}),
    "reshape": (14, 13, node("Reshape", "x form", allowzero=1), {"form": [2, -1, 5]}),
    "reshape by copy": (19, 13, node("Reshape", "x form"), {"form": [0, -1]}),
    "batch norm": (
        15,
        13,
        node("BatchNormalization", "x a b c d", training_mode=0),
        {"a": tensor(6), "b": tensor(6), "c": tensor(6), "d": np.ones(6, np.float32)},
    ),
    "boxes": (
        16,
        13,
        node(
            "RoiAlign",
            "x boxes numbers",
            output_height=2,
            coordinate_transformation_mode="output_half_pixel",
        ),
        {"boxes": BOXES, "numbers": [0, 1]},
    ),
    "grid sample": (20, 16, node("GridSample", "x grid", mode="cubic"), {"grid": GRID}),
    "grid sample, default": (20, 16, node("GridSample", "x grid"), {"grid": GRID}),
    "grid sample up": (16, 21, node("GridSample", "x grid", mode="bilinear"), {"grid": GRID}),
    "grid sample up, default": (16, 22, node("GridSample", "x grid"), {"grid": GRID}),
    "scatter": (
        18,
        13,
        node("ScatterElements", "x places values", reduction="none"),
        {"places": np.zeros((1, 6, 4, 5), np.int64), "values": tensor(1, 6, 4, 5)},
    ),
    "average pooling": (
        19,
        13,
        node("AveragePool", "x", kernel_shape=[2, 2], dilations=[1, 1]),
        {},
    ),
    "cast": (19, 13, node("Cast", "x", to=INT64, saturate=1), {}),
    "quantize": (
        19,
        13,
        node("QuantizeLinear", "x scale zero", axis=1, saturate=1),
        {"scale": np.float32(0.1), "zero": np.int8(0)},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_same(case):
    opset, target, one, constants = SAME[case]
    proto = model_of([one], opset, {"x": X}, constants, list(one.output))
    before = proto.SerializeToString()
    result = converted(proto, target)
    assert proto.SerializeToString() == before
    for a, b in zip(run(proto, {"x": X}), run(result, {"x": X}), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_rewrite_is_tested():
    covered = set()
    for opset, target, one, _ in SAME.values():
        covered |= {(one.op_type, step) for step in range(target + 1, opset + 1)}
        covered |= {(one.op_type, step) for step in range(opset + 1, target + 1)}
    covered |= {("Relu", 14)}  # below
    reductions = {(op, step) for op, step in DOWN if op.startswith("Reduce")}
    assert (DOWN.keys() | UP.keys()) - covered <= reductions


REDUCTIONS = {
    "L1": lambda x, axes: np.abs(x).sum(axes, keepdims=True),
    "L2": lambda x, axes: np.sqrt((x**2).sum(axes, keepdims=True)),
    "LogSum": lambda x, axes: np.log(x.sum(axes, keepdims=True)),
    "LogSumExp": lambda x, axes: np.log(np.exp(x).sum(axes, keepdims=True)),
    "Max": lambda x, axes: x.max(axes, keepdims=True),
    "Prod": lambda x, axes: x.prod(axes, keepdims=True),
    "SumSquare": lambda x, axes: (x**2).sum(axes, keepdims=True),
}


@pytest.mark.parametrize("axes", [(1, 2), ()])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_other_reductions(kind, axes):
    """Over no axis, each number is a sum of its own; ONNX Runtime 1.23 does not know that."""
    x = np.abs(X) + 0.5
    one = node(f"Reduce{kind}", "x axes", noop_with_empty_axes=1)
    result = converted(model_of([one], 18, {"x": x}, {"axes": np.int64(axes)}), 13)
    expected = REDUCTIONS[kind](x.astype(np.float64), axes)
    np.testing.assert_allclose(run(result, {"x": x})[0], expected, rtol=1e-4, atol=1e-6)


def test_relu_of_integers():
    x = np.int64([-3, 0, 2**40])
    result = converted(model_of([node("Relu", "x")], 14, {"x": x}), 13)
    np.testing.assert_array_equal(run(result, {"x": x})[0], [0, 0, 2**40])


def test_layer_norm_of_ones_and_zeros_has_no_product_and_sum():
    opset, _, one, constants = SAME["plain layer norm"]
    result = converted(model_of([one], opset, {"x": X}, constants), 13)
    assert [n.op_type for n in result.graph.node][-1] == "Div"


def test_open_dimensions():
    """Sizes along open axes are computed where the file runs."""
    nodes = [
        node("Shape", "x", "batch", end=1),
        node("Concat", "batch rest", "form", axis=0),
        node("Reshape", "x form", "flat", allowzero=1),
        node("Trilu", "flat", "upper"),
        node("Resize", "x - - sizes", "large", axes=[2, 3]),
        node("LayerNormalization", "upper scale", "z"),
    ]
    constants = {"rest": [6, 20], "sizes": [8, 8], "scale": tensor(20)}
    proto = model_of(nodes, 18, {"x": X}, constants, ["z", "large"], dims={"x": ["n", 6, 4, 5]})
    result = converted(proto, 13)
    for x in (X, tensor(5, 6, 4, 5)):
        for a, b in zip(run(proto, {"x": x}), run(result, {"x": x}), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inside_a_branch():
    branches = {
        name: helper.make_graph(
            [node("Shape", "x", f"{name}_s", start=1), node(op, "x axes", f"{name}_y")],
            name,
            [],
            [onnx.ValueInfoProto(name=f"{name}_{part}") for part in "sy"],
        )
        for name, op in (("then_branch", "ReduceMax"), ("else_branch", "ReduceMin"))
    }
    feeds = {"x": X, "condition": np.asarray(True)}
    proto = model_of(
        [node("If", "condition", "shape y", **branches)], 18, feeds, {"axes": [1]}, ["shape", "y"]
    )
    result = converted(proto, 13)
    for condition in (True, False):
        feeds["condition"] = np.asarray(condition)
        for a, b in zip(run(proto, feeds), run(result, feeds), strict=True):
            np.testing.assert_array_equal(a, b)


def test_names_that_are_taken():
    nodes = [node("HardSwish", "x", "h"), node("Relu", "h", "same/HardSigmoid")]
    nodes += [node("HardSwish", "same/HardSigmoid", "y")]
    nodes[0].name = "same"
    proto = model_of(nodes, 18, {"x": X})
    result = converted(proto, 13)
    names = [name for one in result.graph.node for name in one.output]
    assert len(names) == len(set(names)) == 5
    np.testing.assert_allclose(run(proto, {"x": X})[0], run(result, {"x": X})[0], rtol=1e-5)


# case: opset, target, node, constants, message
REFUSED = {
    "no operator": (18, 13, node("BitwiseNot", "n"), {}, r"BitwiseNot \(no such.*opset=18 or more"),
    "grid sample": (16, 13, node("GridSample", "x grid"), {"grid": GRID}, "opset=16 or more"),
    "attribute": (
        18,
        13,
        node("Resize", "x - - sizes", antialias=1, mode="linear"),
        {"sizes": [2, 6, 2, 2]},
        r"no attribute 'antialias'\); export with opset=18",
    ),
    "reduction": (
        16,
        13,
        node("ScatterElements", "x places x", reduction="add"),
        {"places": np.zeros((2, 6, 4, 5), np.int64)},
        "no attribute 'reduction'.*opset=16",
    ),
    "wrap": (
        19,
        18,
        node("Pad", "x pads", mode="wrap"),
        {"pads": [0, 0, 0, 1, 0, 0, 0, 1]},
        r"opset 18 cannot express Pad \(its mode is wrap\); export with opset=19",
    ),
    "symmetric": (
        19,
        13,
        node("Resize", "x - - s", coordinate_transformation_mode="half_pixel_symmetric"),
        {"s": [2, 6, 2, 2]},
        "half_pixel_symmetric.*opset=19",
    ),
    "boxes": (
        16,
        13,
        node("RoiAlign", "x boxes numbers"),
        {"boxes": BOXES, "numbers": [0, 1]},
        "aligned=True.*opset=16",
    ),
    "statistics": (
        15,
        13,
        node("BatchNormalization", "x a a a a", "y m v", training_mode=1),
        {"a": np.ones(6, np.float32)},
        "statistics of the batch.*opset=14",
    ),
    "empty": (14, 13, node("Reshape", "e form", allowzero=1), {"form": [0, 3]}, "result is empty"),
    "axes": (18, 13, node("ReduceMean", "x n"), {}, "its axes are computed.*opset=18"),
    "open split": (18, 13, node("Split", "o", "y z", num_outputs=2), {}, "length.*is open"),
    "volume": (
        20,
        16,
        node("GridSample", "v grid"),
        {"grid": np.zeros((1, 2, 2, 2, 3), np.float32)},
        "samples volumes.*opset=20",
    ),
    "type": (14, 13, node("Add", "i i"), {}, r"Add \(A is tensor\(int8\)\); replace it"),
    "no later opset": (18, 13, node("NoSuchOperator", "x"), {}, "replace it in the model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    opset, target, one, constants, message = REFUSED[case]
    one.name = "the node"
    feeds = {
        "x": X,
        "n": np.int64([1]),
        "e": np.zeros((0, 3), np.float32),
        "o": tensor(2, 3),
        "v": tensor(1, 1, 2, 2, 2),
        "i": np.int8([1]),
    }
    proto = model_of([one], opset, feeds, constants, list(one.output), dims={"o": ["n", 3]})
    with pytest.raises(QatkitError, match=f"the node: .*{message}") as error:
        convert_opset(proto, target)
    assert "\n" not in str(error.value)


def test_nodes_of_other_domains_are_left_alone():
    other = helper.make_node("Shape", ["x"], ["y"], domain="com.example", start=1)
    proto = model_of([other, node("Shape", "x", "z", start=1)], 18, {"x": X}, outputs=["y", "z"])
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    convert_opset(proto, 13)
    assert proto.graph.node[0] == other
    assert [n.op_type for n in proto.graph.node] == ["Shape", "Shape", "Slice"]
