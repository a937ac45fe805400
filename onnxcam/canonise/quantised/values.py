"""What the lowering of a quantised operator is made with: real values of its operands, rounding of its results.

Integers become real numbers through a DequantizeLinear, one for all who read that tensor, constants too: weights stay
the integers that are deployed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import Names, constant, detach, has
from onnxcam.dequantised import ScalesDoNotFit, dequantise

STANDARD = (None, "", "ai.onnx")


class NotLowered(Exception):
    """The node at hand cannot be lowered, not now at least; it stays as it is."""


def dequantised_name(tensor: str) -> str:
    """What the real value of an integer tensor is called, where the file has no name for it."""
    return f"{tensor}_dequantised"


def equal(a: gs.Tensor | None, b: gs.Tensor | None) -> bool:
    """True for the same tensor, and for constants of the same values and type (whether () or (1,))."""
    if a is b:
        return True
    if not (isinstance(a, gs.Constant) and isinstance(b, gs.Constant)):
        return False
    x, y = a.values, b.values
    return x.dtype == y.dtype and x.size == y.size and bool(np.array_equal(x.ravel(), y.ravel()))


def input_of(node: gs.Node, i: int) -> gs.Tensor | None:
    """Input `i`, None where it is omitted."""
    return node.inputs[i] if has(node, i) else None


class Lowering:
    """One node that is about to be replaced by float operators, and the means to do so.

    The node itself becomes the float operator, so that it keeps its name.
    """

    def __init__(self, graph: gs.Graph, node: gs.Node, names: Names):
        self.graph, self.node, self.names = graph, node, names
        self.added: list[gs.Node] = []

    def add(self, op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], **attrs: Any) -> gs.Node:
        """A new node called `name`, or so."""
        name = unique(name, {n.name for n in self.graph.nodes})
        node = gs.Node(op, name, attrs, inputs, outputs)
        self.graph.nodes.append(node)
        self.added.append(node)
        return node

    def undo(self) -> None:
        """Take back the nodes that were added."""
        for node in self.added:
            detach(node)
        self.graph.nodes = [n for n in self.graph.nodes if not any(n is a for a in self.added)]

    def variable(self, name: str, dtype: Any = None) -> gs.Variable:
        return gs.Variable(self.names.fresh(name), dtype)

    def constant(self, values: np.ndarray, name: str) -> gs.Constant:
        return gs.Constant(self.names.fresh(name), np.ascontiguousarray(values))

    def values(self, i: int) -> np.ndarray | None:
        """The constant in input `i`; None where the input is omitted.

        Raises:
            NotLowered: it is computed in the graph.
        """
        if not has(self.node, i):
            return None
        found = constant(self.node, i)
        if found is None:
            raise NotLowered
        return found

    def need(self, i: int) -> np.ndarray:
        """The constant in input `i`, which must be there."""
        found = self.values(i)
        if found is None:
            raise NotLowered
        return found

    def real(self, i: int, scale: int, zero: int, axis: int = 0) -> gs.Tensor:
        """The real value of input `i`, whose scale and zero point are inputs `scale` and `zero`.

        `axis` is where several of them lie along.
        """
        return self.real_of(self.node.inputs[i], self.node.inputs[scale], input_of(self.node, zero), axis)

    def real_of(self, q: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, axis: int = 0) -> gs.Tensor:
        """The real value of the activation `q`, from the DequantizeLinear that there is, else from a new one."""
        for reader in q.outputs:
            fits = reader.op == "DequantizeLinear" and reader.domain in STANDARD and reader.inputs[0] is q
            if fits and equal(reader.inputs[1], scale) and equal(input_of(reader, 2), zero):
                return reader.outputs[0]
        attrs = {}
        if isinstance(scale, gs.Constant) and scale.values.size > 1:
            if isinstance(q, gs.Constant) and self.graph.opset < 13:
                return self._constant(q, scale, zero, axis)
            if scale.values.ndim != 1 or self.graph.opset < 13 or q.shape is None:
                raise NotLowered
            attrs["axis"] = axis % len(q.shape)
            zero = self._as_long(zero, scale.values.size)
        elif isinstance(scale, gs.Constant):
            scale, zero = self._scalar(scale), self._scalar(zero)
        out = self.variable(dequantised_name(q.name), np.float32)
        self.add("DequantizeLinear", out.name, [q, scale, *([] if zero is None else [zero])], [out], **attrs)
        return out

    def bias(self, i: int, steps: np.ndarray) -> gs.Tensor:
        """The real value of the bias in input `i`, which counts in `steps`, one for all channels or one for each."""
        q = self.node.inputs[i]
        self.need(i)
        if steps.size > 1 and q.values.ndim != 1:
            raise NotLowered
        scale = self.constant(steps.reshape(() if steps.size == 1 else (-1,)), f"{q.name}_scale")
        return self.real_of(q, scale, None, axis=0)

    def _constant(self, q: gs.Constant, scale: gs.Constant, zero: gs.Tensor | None, axis: int) -> gs.Tensor:
        """The real value of a constant as another one; before opset 13 a DequantizeLinear had a single scale."""
        if zero is not None and not isinstance(zero, gs.Constant):
            raise NotLowered
        try:
            real = dequantise(q.values, scale.values, None if zero is None else zero.values, axis)
        except ScalesDoNotFit as error:
            raise NotLowered from error
        return self.constant(real, dequantised_name(q.name))

    def quantised(self, real: gs.Tensor, scale: int, zero: int) -> gs.Node:
        """Let a QuantizeLinear of `real` make what this node made."""
        parameters = [self.node.inputs[scale], *([self.node.inputs[zero]] if has(self.node, zero) else [])]
        if any(not isinstance(p, gs.Constant) or p.values.size != 1 for p in parameters):
            raise NotLowered
        output = self.node.outputs[0]
        self.node.outputs.clear()
        return self.add(
            "QuantizeLinear", f"{output.name}_quantise", [real, *(self._scalar(p) for p in parameters)], [output]
        )

    def _as_long(self, zero: gs.Tensor | None, length: int) -> gs.Tensor | None:
        """A zero point for each scale, where there is one for all."""
        if not isinstance(zero, gs.Constant) or zero.values.size == length:
            return zero
        return self.constant(np.full(length, zero.values.item(), zero.values.dtype), zero.name)

    def _scalar(self, tensor: Any) -> Any:
        """A constant of one element as a scalar, as operators of the standard want it."""
        if not isinstance(tensor, gs.Constant) or tensor.values.ndim == 0:
            return tensor
        return self.constant(tensor.values.reshape(()), tensor.name)

    def become(self, op: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], **attrs: Any) -> None:
        """Turn the node into a standard `op`; attributes are replaced."""
        node = self.node
        node.op, node.domain = op, None
        node.attrs.clear()
        node.attrs.update(attrs)
        node.inputs = inputs
        node.outputs = outputs
