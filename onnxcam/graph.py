"""The canonised graph as the rest of onnxcam sees it: nodes in topological order, tensors by name, structure only.

A `Graph` wraps an onnx-graphsurgeon graph whose spatial sizes are static and whose constants are folded, and answers
the questions that layers, operators and the walk ask: who makes a tensor, who reads it, what is its shape, is it
constant, which nodes lie between two tensors. It holds no values of activations; those come from a session as taps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.dequantised import dequantised_constants

Shape = tuple[int | str | None, ...]


class Node:
    """One ONNX node: its attributes, the names of its operands, and the constants among them."""

    def __init__(self, graph: Graph, node: gs.Node, index: int):
        self.graph = graph
        self.index = index
        self.name: str = node.name or (node.outputs[0].name if node.outputs else f"{node.op}_{index}")
        self.op_type: str = node.op
        self.domain: str = "" if node.domain in (None, "ai.onnx") else node.domain
        self.inputs: tuple[str, ...] = tuple(t.name for t in node.inputs)
        self.outputs: tuple[str, ...] = tuple(t.name for t in node.outputs)
        self._attrs = node.attrs

    def __repr__(self) -> str:
        return f"{self.op_type} {self.name!r}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}"

    @property
    def opset(self) -> int:
        """The opset version of the node's domain in this graph."""
        return self.graph.opset(self.domain)

    def attr(self, name: str, default: Any = None) -> Any:
        """The attribute as Python or NumPy value; `default` where the node does not set it."""
        value = self._attrs.get(name, default)
        if isinstance(value, gs.Tensor):
            value = value.values if isinstance(value, gs.Constant) else default
        return value

    def has(self, i: int) -> bool:
        """True where the node has an `i`-th input (an omitted optional input has an empty name)."""
        return i < len(self.inputs) and self.inputs[i] != ""

    def constant(self, i: int) -> np.ndarray | None:
        """The value of input `i` where it is a constant of the graph, else None."""
        return self.graph.constants.get(self.inputs[i]) if self.has(i) else None

    def is_constant(self, i: int) -> bool:
        return self.has(i) and self.inputs[i] in self.graph.constants

    def shape(self, i: int) -> Shape | None:
        """Static shape of input `i`: ints, a string or None for a symbolic axis; None where the rank is unknown."""
        return self.graph.shape(self.inputs[i])

    def output_shape(self, i: int = 0) -> Shape | None:
        return self.graph.shape(self.outputs[i])

    def producer(self, i: int) -> Node | None:
        """The node that makes input `i`; None for a constant or a graph input."""
        return self.graph.producer(self.inputs[i]) if self.has(i) else None


class Graph:
    """Structure of one canonised model; `surgeon` is the graph-surgeon graph it describes and must not change after."""

    def __init__(self, surgeon: gs.Graph):
        self.surgeon = surgeon
        self.inputs: tuple[str, ...] = tuple(t.name for t in surgeon.inputs)
        self.outputs: tuple[str, ...] = tuple(t.name for t in surgeon.outputs)
        self.nodes: list[Node] = [Node(self, node, i) for i, node in enumerate(surgeon.nodes)]
        self._tensors: dict[str, gs.Tensor] = surgeon.tensors()
        self._opsets = {"": surgeon.opset} | {
            ("" if o.domain == "ai.onnx" else o.domain): o.version for o in (surgeon.import_domains or [])
        }

    def opset(self, domain: str = "") -> int:
        return self._opsets.get(domain, 1)

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        stored = {name: t.values for name, t in self._tensors.items() if isinstance(t, gs.Constant)}
        return stored | dict(dequantised_constants(self.surgeon))

    @cached_property
    def _producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def _consumers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    readers[name].append(node)
        return readers

    @cached_property
    def data(self) -> set[str]:
        """The tensors that what the model sees flows into: those that depend on an input through values.

        A shape, an index or a condition breaks the chain, and so does not belong to it: a mask made from the batch
        size depends on the input, but on nothing that is seen.
        """
        found = set(self.inputs)
        for node in self.nodes:
            if node.op_type == "QuantizeLinear":
                found.update(node.outputs if node.inputs[0] in found else ())  # integers, but values all the same
            elif node.op_type == "DynamicQuantizeLinear":
                found.update(node.outputs[:1] if node.inputs[0] in found else ())  # scale and zero point are statistics
            elif any(name in found for name in node.inputs):
                found.update(name for name in node.outputs if name and not self._counts(name))
        return found

    def _counts(self, tensor: str) -> bool:
        """True for tensors of positions, sizes and conditions, told by their type."""
        dtype = self.dtype(tensor)
        return dtype is not None and (dtype.kind == "b" or (dtype.kind in "iu" and dtype.itemsize > 1))

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def producer(self, tensor: str) -> Node | None:
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> list[Node]:
        """The nodes that read `tensor`, each once, in topological order."""
        return self._consumers.get(tensor, [])

    def shape(self, tensor: str) -> Shape | None:
        t = self._tensors.get(tensor)
        if t is None or t.shape is None:
            return None
        return tuple(d if isinstance(d, str) or d is None else int(d) for d in t.shape)

    def dtype(self, tensor: str) -> np.dtype | None:
        """NumPy dtype of a tensor; None where shape inference could not tell (or NumPy has none, as for bfloat16)."""
        t = self._tensors.get(tensor)
        try:
            return None if t is None or t.dtype is None else np.dtype(t.dtype)
        except TypeError:
            return None

    def between(self, sources: Collection[str], target: str) -> list[Node]:
        """The nodes on a path from any of `sources` to `target`, in topological order.

        A source counts as reached, so the nodes that read it are in; the node that makes it is in only where another
        source lies before it.
        """
        end = self.producer(target)
        first = min((node.index for name in sources for node in self.consumers(name)), default=len(self.nodes))
        nodes = self.nodes[first : end.index + 1] if end else []
        below = set(sources)
        forward = set()
        for node in nodes:
            if any(name in below for name in node.inputs if name):
                below.update(name for name in node.outputs if name)
                forward.add(node.index)
        wanted = {target}
        path = []
        for node in reversed(nodes):
            if node.index in forward and any(name in wanted for name in node.outputs if name):
                wanted.update(name for name in node.inputs if name in below)
                path.append(node)
        return path[::-1]
