"""Selection: ops that pick entries by value or by index. Relevance goes to what was picked (spec 3.6, 3.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxcam.engines.places import Index
from onnxcam.graph import Node
from onnxcam.operators.kinds import At, Operator, Relevances, Routing, Share
from onnxcam.operators.registry import operator, refusal


@operator("Where")
def where(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        condition = at.input(0) > 0
        parts = {1: at.ops.where(condition, rs[0], 0.0), 2: at.ops.where(condition, 0.0, rs[0])}
        return [(i, at.ops.unbroadcast(part, at.shape(i))) for i, part in parts.items() if at.carries(i)]

    return Routing(route)


@operator("Max", "Min")
def extremum(node: Node) -> Operator:
    """The operand that equals the output takes all; ties share equally."""

    def route(at: At, rs: Relevances) -> list[Share]:
        y, ops = at.output(0), at.ops
        wins = [ops.mask(at.input(i) == y) for i in range(len(node.inputs))]
        total = sum(wins[1:], wins[0])
        return [(i, ops.unbroadcast(rs[0] * win / total, at.shape(i))) for i, win in enumerate(wins) if at.carries(i)]

    return Routing(route)


@operator("Trilu")
def trilu(node: Node) -> Operator:
    """Keeps the upper (`upper` = 1) or lower triangle, from diagonal k."""
    upper = bool(node.attr("upper", 1))

    def route(at: At, rs: Relevances) -> list[Share]:
        k = (at.ints(1) or [0])[0]
        ones = np.ones(at.shape(0)[-2:])
        return [(0, rs[0] * at.ops.asarray(np.triu(ones, k) if upper else np.tril(ones, k)))]

    return Routing(route)


def _axis(node: Node, at: At, default: int) -> int:
    """The attribute `axis`, counted from the end."""
    axis = int(node.attr("axis", default))
    return axis if axis < 0 else axis - len(at.shape(0))


@operator("GatherElements")
def gather_elements(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        return [(0, at.ops.put_elements(rs[0], at.index(1), _axis(node, at, 0), at.input(0)))]

    return Routing(route)


@operator("TopK")
def top_k(node: Node) -> Operator:
    """Output 1 says where the values of output 0 come from."""
    if len(node.outputs) < 2 or not node.outputs[1]:
        raise refusal(node, "TopK without its output of indices does not tell where its values come from")

    def route(at: At, rs: Relevances) -> list[Share]:
        if rs[0] is None:
            return []
        return [(0, at.ops.put_elements(rs[0], at.values.index(node.outputs[1]), _axis(node, at, -1), at.input(0)))]

    return Routing(route)


@dataclass(frozen=True)
class _Blocks:
    """A tensor as (rows, places, entries): GatherND and ScatterND pick among the places of each row, all entries there.

    Attributes:
        data: that shape.
        index: which places, (rows, picked, entries).
    """

    data: tuple[int, ...]
    index: Index

    @classmethod
    def of(cls, at: At, batch: int) -> _Blocks:
        """The operand 0 and the index in input 1, whose last axis holds coordinates behind `batch` axes in common."""
        shape, lead = at.shape(0), at.shape(1)[:-1]
        depth = at.shape(1)[-1]
        sizes, entries = shape[batch : batch + depth], prod(shape[batch + depth :])
        rows = shape[0] if batch == 1 else prod(shape[:batch])
        picked = prod(lead[batch:])
        places = at.ops.index_shaped(at.ops.index_of_coordinates(at.index(1), sizes), (rows, picked, 1))
        return cls((rows, prod(sizes), entries), at.ops.index_repeated(places, (rows, picked, entries)))

    @property
    def picked(self) -> tuple[int, ...]:
        return tuple(self.index.shape)


@operator("GatherND")
def gather_nd(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        if not at.carries(0):
            return []
        ops, blocks = at.ops, _Blocks.of(at, node.attr("batch_dims", 0))
        r, like = ops.reshape(rs[0], blocks.picked), ops.shaped(at.input(0), blocks.data)
        return [(0, ops.reshape(ops.put_elements(r, blocks.index, -2, like), at.shape(0)))]

    return Routing(route)


Picked = Callable[[At], np.ndarray]  # which flat entry of operand 0 each entry of the output is


def _picking(picked: Picked) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        if rs[0] is None or not at.carries(0):
            return []
        shape, index = at.shape(0), np.ravel(picked(at))
        flat = at.ops.scatter_add(at.ops.reshape(rs[0], (index.size,)), index, -1, prod(shape))
        return [(0, at.ops.reshape(flat, shape))]

    return Routing(route)


@operator("Compress")
def compress(node: Node) -> Operator:
    """Keeps the entries along `axis`, or of the flattened tensor, where the condition holds."""

    def picked(at: At) -> np.ndarray:
        flat = np.arange(prod(at.shape(0))).reshape(at.shape(0))
        return np.compress(np.ravel(at.host(1)), flat, node.attr("axis"))

    return _picking(picked)


@operator("ReverseSequence")
def reverse_sequence(node: Node) -> Operator:
    """The first `lengths[b]` steps of every sequence b in reverse order, the rest as it is."""

    def picked(at: At) -> np.ndarray:
        shape = at.shape(0)
        time, batch = node.attr("time_axis", 0), node.attr("batch_axis", 1)
        flat = np.arange(prod(shape)).reshape(shape)
        moved = np.moveaxis(flat, (batch, time), (0, 1)).copy()
        for b, length in enumerate(at.ints(1) or []):
            moved[b, :length] = moved[b, :length][::-1]
        return np.moveaxis(moved, (0, 1), (batch, time))

    return _picking(picked)


def _overwrites(node: Node) -> bool:
    """Whether a scatter replaces entries; else it adds to them.

    Raises:
        ModelError: it does something else.
    """
    reduction = node.attr("reduction", "none")
    if reduction not in ("none", "add"):
        raise refusal(node, f"there is no operator for {node.op_type} with reduction {reduction!r}")
    return bool(reduction == "none")


@operator("ScatterElements", "Scatter")
def scatter_elements(node: Node) -> Operator:
    """Where updates meet in one place without a reduction, ONNX leaves open which one wins: here all of them do."""
    overwrites = _overwrites(node)

    def route(at: At, rs: Relevances) -> list[Share]:
        ops, index, axis, shares = at.ops, at.index(1), _axis(node, at, 0), []
        if at.carries(2):
            shares.append((2, ops.get_elements(rs[0], index, axis)))
        if at.carries(0):
            shares.append((0, rs[0] * ops.untouched(index, axis, at.input(0)) if overwrites else rs[0]))
        return shares

    return Routing(route)


@operator("ScatterND")
def scatter_nd(node: Node) -> Operator:
    overwrites = _overwrites(node)

    def route(at: At, rs: Relevances) -> list[Share]:
        ops, shape, blocks, shares = at.ops, at.shape(0), _Blocks.of(at, 0), []
        if at.carries(2):
            taken = ops.get_elements(ops.reshape(rs[0], blocks.data), blocks.index, -2)
            shares.append((2, ops.reshape(taken, at.shape(2))))
        if at.carries(0):
            kept = ops.untouched(blocks.index, -2, ops.shaped(at.input(0), blocks.data)) if overwrites else None
            shares.append((0, rs[0] if kept is None else rs[0] * ops.shaped(kept, shape)))
        return shares

    return Routing(route)
