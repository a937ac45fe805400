"""Writing the nodes that an op expands into: recorded first, joined to the graph when all of them could be written.

An expansion is a function that reads one node through a `Body` and calls it once for each node to be made, so that
`b("MatMul", q, k)` is a MatMul. It gives back the tensors that take the place of the node's outputs. Recording touches
nothing: an expansion that finds its node in a form that it has to refuse leaves the graph as it was. Constants take
the node's float type, and what ONNX spells differently from opset to opset is spelled here for the one of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import Names, constant, detach, has, put_for

# What a score is lowered to where attention must not go: exp of it is 0, and sums with it stay finite.
LOWEST = {"float16": -6e4, "float32": -1e30, "float64": -1e30}


class Refused(Exception):
    """This node is in a form that has no expansion; the text says why."""


class Unknown(Exception):
    """A shape or a type that the expansion needs is not known (yet)."""


@dataclass(eq=False)
class Made:
    """A tensor that a recorded node makes."""

    op: str


Operand: TypeAlias = gs.Tensor | Made | np.ndarray | float | None


@dataclass
class Step:
    """A recorded node."""

    op: str
    inputs: list[Operand]
    outputs: list[Made]
    attrs: dict[str, Any] = field(default_factory=dict)


class Body:
    """One node, read, and the nodes that take its place, written.

    Attributes:
        opset: of the standard ops in the graph.
    """

    def __init__(self, node: gs.Node, opset: int):
        self.node, self.opset = node, opset
        self.steps: list[Step] = []
        self._before: dict[int, Operand] = {}  # what `named` was told: the second tensor, by id, to the first

    # -- the node ------------------------------------------------------------------------------------------------

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def has(self, i: int) -> bool:
        return has(self.node, i)

    def input(self, i: int) -> gs.Tensor | None:
        return self.node.inputs[i] if self.has(i) else None

    def constant(self, i: int) -> np.ndarray | None:
        return constant(self.node, i)

    def used(self, i: int) -> bool:
        """True where the node hands out its `i`-th output."""
        return i < len(self.node.outputs) and not self.node.outputs[i].is_empty()

    def shape(self, i: int) -> list[int | str | None]:
        """The shape of input `i`, of known rank.

        Raises:
            Unknown: not even the rank is known.
        """
        shape = self.node.inputs[i].shape
        if shape is None:
            raise Unknown(f"the rank of {self.node.inputs[i].name!r} is not known")
        return list(shape)

    def size(self, i: int, axis: int, what: str) -> int:
        """How long input `i` is along `axis`.

        Raises:
            Unknown: that is not known.
        """
        size = self.shape(i)[axis]
        if not isinstance(size, (int, np.integer)):
            raise Unknown(f"the {what} of {self.node.inputs[i].name!r} is not known")
        return int(size)

    @property
    def dtype(self) -> np.dtype:
        """The float type that the node computes in.

        Raises:
            Unknown: that is not known.
            Refused: NumPy has no such type.
        """
        for tensor in self.node.inputs:
            if tensor.is_empty() or tensor.dtype is None:
                continue
            if isinstance(tensor.dtype, int):
                raise Refused(f"{self.node.op} computes in {onnx.TensorProto.DataType.Name(tensor.dtype)}")
            if np.dtype(tensor.dtype).kind == "f":
                return np.dtype(tensor.dtype)
        raise Unknown(f"the type that {self.node.op} computes in is not known")

    def refuse_inputs(self, inputs: dict[int, str]) -> None:
        """Refuse the node where it has one of `inputs`, index to name.

        Raises:
            Refused: says which.
        """
        for i, what in inputs.items():
            if self.has(i):
                raise Refused(f"{self.node.op} with {what}")

    # -- the nodes to be made ------------------------------------------------------------------------------------

    def __call__(self, op: str, *operands: Operand, **attrs: Any) -> Made:
        """One node of one output."""
        return self.node_of(op, operands, 1, attrs)[0]

    def node_of(self, op: str, operands: Sequence[Operand], outputs: int, attrs: dict[str, Any]) -> list[Made]:
        values: list[Operand] = [np.asarray(x, self.dtype) if isinstance(x, (int, float)) else x for x in operands]
        while values and values[-1] is None:
            values.pop()
        made = [Made(op) for _ in range(outputs)]
        self.steps.append(Step(op, values, made, attrs))
        return made

    def named(self, x: Operand, y: Operand) -> Operand:
        """`y`, made from `x` as an activation is: the layer is what makes `x`, and has the name."""
        self._before[id(y)] = x
        return y

    def ints(self, *values: int) -> np.ndarray:
        return np.array(values, np.int64)

    def number(self, value: float | np.ndarray) -> np.ndarray:
        return np.asarray(value, self.dtype)

    def sum(self, *operands: Operand) -> Operand:
        """The sum of those that are there, from the left."""
        first, *rest = [x for x in operands if x is not None]
        for x in rest:
            first = self("Add", first, x)
        return first

    def reshape(self, x: Operand, *shape: int) -> Made:
        return self("Reshape", x, self.ints(*shape))

    def transpose(self, x: Operand, *perm: int) -> Made:
        return self("Transpose", x, perm=list(perm))

    def slice(self, x: Operand, start: int, end: int, axis: int, step: int = 1) -> Made:
        if self.opset < 10:
            if step != 1:
                raise Refused(f"{self.node.op} needs a Slice with steps, which came with opset 10")
            return self("Slice", x, starts=[start], ends=[end], axes=[axis])
        return self("Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(step))

    def unsqueeze(self, x: Operand, *axes: int) -> Made:
        return self("Unsqueeze", x, self.ints(*axes)) if self.opset >= 13 else self("Unsqueeze", x, axes=list(axes))

    def split(self, x: Operand, sizes: Sequence[int], axis: int) -> list[Made]:
        """`x` in parts of these sizes along an axis counted from the front."""
        if self.opset >= 13:
            return self.node_of("Split", [x, self.ints(*sizes)], len(sizes), {"axis": axis})
        return self.node_of("Split", [x], len(sizes), {"axis": axis, "split": list(sizes)})

    def mean(self, x: Operand, *axes: int) -> Made:
        """The mean over axes, which stay as axes of length 1."""
        if self.opset >= 18:
            return self("ReduceMean", x, self.ints(*axes), keepdims=1)
        return self("ReduceMean", x, axes=list(axes), keepdims=1)

    def cast(self, x: Operand, dtype: Any) -> Made:
        return self("Cast", x, to=int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))

    # -- joining the graph ---------------------------------------------------------------------------------------

    def join(self, graph: gs.Graph, results: Sequence[Operand], names: Names) -> None:
        """Put the recorded nodes in the node's place; its outputs, under their names, are now `results`.

        The node's own name goes to the new node that makes its first output, or to the one before it that `named`
        points to: the layer that the file calls so.
        """
        node = self.node
        outputs: list[gs.Tensor] = list(node.outputs)
        tensors: dict[int, gs.Tensor] = {}
        identities: list[tuple[Operand, gs.Tensor]] = []
        for output, result in zip(outputs, results, strict=False):
            if output.is_empty() or result is None:
                continue
            if isinstance(result, Made) and id(result) not in tensors:
                tensors[id(result)] = output
            else:
                identities.append((result, output))
        taken = {other.name for other in graph.nodes if other is not node}
        bearer = self._bearer(results[0])
        detach(node)

        def tensor(x: Operand) -> gs.Tensor:
            if x is None:
                return gs.Variable.empty()
            if isinstance(x, Made):
                if id(x) not in tensors:
                    tensors[id(x)] = gs.Variable(names.fresh(f"{node.name}/{x.op}"))
                return tensors[id(x)]
            if isinstance(x, np.ndarray):
                values = np.ascontiguousarray(x).reshape(x.shape)  # which makes a vector of a number
                return gs.Constant(names.fresh(f"{node.name}/constant"), values)
            return x

        new = []
        for step in self.steps:
            own = any(made is bearer for made in step.outputs)
            name = node.name if own else unique(f"{node.name}/{step.op}", taken | {node.name})
            taken.add(name)
            made = [tensor(x) for x in step.outputs]
            new.append(gs.Node(step.op, name, step.attrs, [tensor(x) for x in step.inputs], made))
        for result, output in identities:
            name = unique(f"{node.name}/{output.name}", taken)
            taken.add(name)
            new.append(gs.Node("Identity", name, {}, [tensor(result)], [output]))
        put_for(graph, node, new)

    def _bearer(self, result: Operand) -> Operand:
        while id(result) in self._before and isinstance(self._before[id(result)], Made):
            result = self._before[id(result)]
        return result
