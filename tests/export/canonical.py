"""The canonical graph of a file: what two exporters must agree on, whatever they call things.

A term stands for each tensor: its operator, its attributes without defaults, and the terms it is
made of. Two files compute the same in the same way if the terms of their outputs are equal. These
differences are none:

- names, the order of nodes, and whether a constant is an initializer;
- how a shape, or a number made of shapes alone, is computed: its value at the example counts;
- which operator changes a shape without moving data (Reshape, Flatten, Squeeze, Unsqueeze, some
  Transpose), and which one cuts a piece out (Slice, several of them, Split);
- the order of the operands of a sum or product, division by a number or multiplication by its
  inverse, and where in a product a number stands;
- zeros as a bias or a padding, ones as a factor, or none.
"""

from __future__ import annotations

import collections
import hashlib

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


class Canonical:
    """The terms of a file.

    Attributes:
        outputs: the term of each output by name.
        described: what each term is made of.
    """

    def __init__(self, proto, feeds):
        self._values = all_values(proto, feeds)
        self._inputs = {value.name for value in proto.graph.input}
        self._initializers = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self._producers = {name: node for node in proto.graph.node for name in node.output if name}
        self._opset = next(one.version for one in proto.opset_import if one.domain == "")
        self._fixed = {}
        self._sliced = {}
        self._memo = {}
        self.described = {}
        for node in proto.graph.node:  # in order, so that no chain of calls gets deep
            for name in node.output:
                if name and not self._is_fixed(name):
                    self.term(name)
        self.outputs = {value.name: self.term(value.name) for value in proto.graph.output}

    def term(self, name):
        if name not in self._memo:
            self._memo[name] = self._make(name)
        return self._memo[name]

    def reached(self):
        """Return the description of every term that an output is made of."""
        found, waiting = {}, list(self.outputs.values())
        while waiting:
            term = waiting.pop()
            if term in self.described and term not in found:
                found[term] = self.described[term]
                waiting += found[term].split()
        return found

    def operators(self):
        """Return how many different terms there are of each operator."""
        return collections.Counter(text.split()[0] for text in self.reached().values())

    def _make(self, name):
        if name in self._inputs:
            return self._note("input", name)
        if self._is_fixed(name):
            return self._constant(self._value(name))
        node = self._producers[name]
        if self._reshapes(name):
            return self._reshape(name)
        if node.op_type in ("Slice", "Split"):
            return self._slice(name)
        if node.op_type in ("Mul", "Div", "Add"):
            return self._combined(name, "Add" if node.op_type == "Add" else "Mul")
        inputs = list(node.input)
        attributes = self._attributes(node)
        kind = node.op_type
        if kind in WITH_BIAS and len(inputs) == 3 and self._is_zero(inputs[2]):
            inputs = inputs[:2]
        if kind == "Pad":
            inputs = [one for one in inputs[:2] + inputs[2:3] if one and not self._is_zero(one)]
        if kind in QUANTIZING:
            per_channel = self._value(inputs[1]).ndim > 0
            attributes = {"axis": attributes["axis"]} if per_channel else {}
        if kind == "Expand":
            attributes, inputs = {"shape": self._value(name).shape}, inputs[:1]
        terms = [self.term(one) if one else "" for one in inputs]
        return self._note(kind, sorted(attributes.items()), list(node.output).index(name), *terms)

    def _reshapes(self, name):
        """Tell whether the node behind a tensor changes its shape and moves nothing."""
        node = self._producers.get(name)
        if node is None or self._is_fixed(name):
            return False
        if node.op_type == "Transpose":
            shape = self._value(node.input[0]).shape
            order = [axis for axis in self._attributes(node)["perm"] if shape[axis] > 1]
            return order == sorted(order)
        return node.op_type in RESHAPES

    def _reshape(self, name):
        source = name
        while self._reshapes(source):
            source = self._producers[source].input[0]
        shape = self._value(name).shape
        if shape == self._value(source).shape:
            return self.term(source)
        return self._note("Reshape", shape, self.term(source))

    def _slice(self, name):
        """Return the term of a slice, or of one part of a split: first index and step by axis."""
        node = self._producers[name]
        x = self._value(node.input[0])
        if node.op_type == "Split":
            axis = self._attributes(node)["axis"]
            before = list(node.output)[: list(node.output).index(name)]
            first = {axis: (sum(self._value(one).shape[axis] for one in before), 1)}
        else:
            starts, ends, axes, steps = (
                self._value(node.input[i]).tolist() if len(node.input) > i else None
                for i in (1, 2, 3, 4)
            )
            axes = range(len(starts)) if axes is None else axes
            first = {}
            for position, axis in enumerate(axes):
                step = 1 if steps is None else steps[position]
                picked = slice(starts[position], ends[position], step).indices(x.shape[axis])
                first[axis % x.ndim] = (picked[0], step)
        kept = self._value(name).shape
        first = {a: one for a, one in first.items() if (kept[a], one) != (x.shape[a], (0, 1))}
        source = node.input[0]
        if source in self._sliced and not first.keys() & self._sliced[source][1].keys():
            source, before = self._sliced[source]
            first |= before
        self._sliced[name] = (source, first)
        return self._note("Slice", kept, sorted(first.items()), self.term(source))

    def _is_zero(self, name):
        return self._is_fixed(name) and not self._value(name).any()

    def _combined(self, name, kind):
        """Return the term of a chain of products, or of sums, with its numbers taken together."""
        number, terms = float(kind == "Mul"), []
        waiting = [(name, False)]
        while waiting:
            one, inverse = waiting.pop()
            node = self._producers.get(one)
            if self._is_fixed(one) and np.all(self._value(one) == (kind == "Mul")):
                continue
            if self._is_fixed(one) and self._value(one).size == 1 and self._is_real(one):
                value = self._value(one).item()
                number = number + value if kind == "Add" else number * value ** (1 - 2 * inverse)
            elif (
                node is not None
                and node.op_type in (("Mul", "Div") if kind == "Mul" else ("Add",))
                and not self._is_fixed(one)
            ):
                waiting.append((node.input[0], inverse))
                waiting.append((node.input[1], inverse != (node.op_type == "Div")))
            else:
                terms.append("inverse " * inverse + self.term(one))
        if len(terms) == 1 and number == (kind == "Mul") and not terms[0].startswith("inverse"):
            return terms[0]
        return self._note(kind, f"{number:.5g}", *sorted(terms))

    def _is_real(self, name):
        return self._value(name).dtype.kind == "f"

    def _attributes(self, node):
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        found = {}
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            default = schema.attributes[attribute.name].default_value
            if default.name and helper.get_attribute_value(default) == value:
                continue
            if attribute.name == "axis" and node.input:
                value %= max(self._value(node.input[0]).ndim, 1)
            if isinstance(value, float):
                value = float(f"{value:.6g}")
            if attribute.name == "axes":
                value = sorted(axis % self._value(node.input[0]).ndim for axis in value)
            found[attribute.name] = list(value) if isinstance(value, tuple) else value
        if "axis" in schema.attributes and "axis" not in found and node.op_type != "Concat":
            default = helper.get_attribute_value(schema.attributes["axis"].default_value)
            found["axis"] = default % max(self._value(node.input[0]).ndim, 1)
        found.pop("noop_with_empty_axes", None)
        return found

    def _is_fixed(self, name):
        """Tell whether a tensor depends on constants and shapes alone; a quantized one does not."""
        if name not in self._fixed:
            node = self._producers.get(name)
            if node is None:
                self._fixed[name] = name in self._initializers
            elif node.op_type in QUANTIZING:
                self._fixed[name] = False
            elif node.op_type in ("Shape", "Size"):
                self._fixed[name] = True
            else:
                self._fixed[name] = all(self._is_fixed(one) for one in node.input if one)
        return self._fixed[name]

    def _value(self, name):
        return self._initializers[name] if name in self._initializers else self._values[name]

    def _constant(self, value):
        digest = hashlib.sha1(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]
        shown = value.ravel()[:1].tolist() if value.size else []
        return self._note("constant", str(value.dtype), value.shape, digest, shown)

    def _note(self, *parts):
        text = " ".join(str(part) for part in parts)
        term = hashlib.sha1(text.encode()).hexdigest()[:16]
        self.described[term] = text
        return term


def all_values(proto, feeds):
    """Return the value of each tensor of a file at an example."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    names = [name for node in proto.graph.node for name in node.output if name]
    own = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    order = [value.name for value in session.get_outputs()]
    return dict(zip(order, session.run(None, feeds), strict=True)) | feeds


def explain(one, other):
    """Return the terms that only one of two files has, for an assertion message."""
    lines = []
    mine, others = one.reached(), other.reached()
    for sign, left, right in (("-", mine, others), ("+", others, mine)):
        lines += [f"{sign} {t}: {text[:300]}" for t, text in left.items() if t not in right]
    return "\n".join(lines[:40])
