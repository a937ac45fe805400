"""Selection: ops that pick entries by value or by index. Relevance goes to what was picked (spec 3.6, 3.7)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

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


Picked = Callable[[At], np.ndarray]  # which flat entry of operand 0 each entry of the output is


def _picking(picked: Picked) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        if rs[0] is None or not at.carries(0):
            return []
        shape, index = at.shape(0), np.ravel(picked(at))
        flat = at.ops.scatter_add(at.ops.reshape(rs[0], (index.size,)), index, -1, prod(shape))
        return [(0, at.ops.reshape(flat, shape))]

    return Routing(route)


def _elements(index: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Flat places in `shape` that ONNX GatherElements reads with `index` along `axis`."""
    places: list[np.ndarray] = list(np.indices(index.shape))
    places[axis] = index.astype(np.int64) % shape[axis]
    return np.asarray(np.ravel_multi_index(tuple(places), shape))


def _slices(index: np.ndarray, shape: tuple[int, ...], batch: int) -> np.ndarray:
    """Flat places in `shape` that ONNX GatherND reads: the last axis of `index` holds coordinates."""
    depth = index.shape[-1]
    flat = np.arange(prod(shape)).reshape(shape)
    given = tuple(index[..., i].astype(np.int64) for i in range(depth))
    lead = np.indices(index.shape[:-1])[:batch]
    return flat[(*lead, *given)]


@operator("GatherElements")
def gather_elements(node: Node) -> Operator:
    return _picking(lambda at: _elements(at.host(1), at.shape(0), node.attr("axis", 0) % len(at.shape(0))))


@operator("GatherND")
def gather_nd(node: Node) -> Operator:
    return _picking(lambda at: _slices(at.host(1), at.shape(0), node.attr("batch_dims", 0)))


@operator("TopK")
def top_k(node: Node) -> Operator:
    """Output 1 says where the values of output 0 come from."""

    def picked(at: At) -> np.ndarray:
        index = at.values.host(node.outputs[1])
        return _elements(index, at.shape(0), node.attr("axis", -1) % index.ndim)

    return _picking(picked)


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


def _scattering(node: Node, places: Picked) -> Operator:
    """Operand 0 with entries replaced by, or added to, those of operand 2: `places(at)` says where, flat."""
    reduction = node.attr("reduction", "none")
    if reduction not in ("none", "add"):
        raise refusal(node, f"there is no operator for {node.op_type} with reduction {reduction!r}")

    def route(at: At, rs: Relevances) -> list[Share]:
        ops, shape, index = at.ops, at.shape(0), np.ravel(places(at))
        size, r = prod(shape), rs[0]
        shares = []
        if at.carries(2):
            taken = ops.take(ops.reshape(r, (size,)), index, -1)
            shares.append((2, ops.reshape(taken, at.shape(2))))
        if at.carries(0):
            if reduction == "none":
                kept = np.ones(size)
                kept[index] = 0
                r = r * ops.asarray(kept.reshape(shape))
            shares.append((0, r))
        return shares

    return Routing(route)


@operator("ScatterElements", "Scatter")
def scatter_elements(node: Node) -> Operator:
    """Where updates meet in one place without a reduction, ONNX leaves open which one wins: here all of them do."""
    return _scattering(node, lambda at: _elements(at.host(1), at.shape(0), node.attr("axis", 0) % len(at.shape(0))))


@operator("ScatterND")
def scatter_nd(node: Node) -> Operator:
    return _scattering(node, lambda at: _slices(at.host(1), at.shape(0), 0))
