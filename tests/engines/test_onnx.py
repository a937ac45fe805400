"""The recorder engine: what it records, run by ONNX Runtime, gives what the array engine computes.

Oracle: the array engine on NumPy in float64, which shares no code with the recorder. Relevance has an axis of targets
in front, one that the recorder leaves out of the graph where there is one target, so everything runs with 1 and with 3;
the batch is symbolic while recording and runs with 1 and with 2. The recorded graph computes in float32, hence 1e-5 of
the largest value (sums of a few hundred products), and equality where entries only move.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

import onnxcam
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.onnx import BATCH, RecorderOps, Symbol
from onnxcam.engines.window import Window, resolve_conv
from onnxcam.errors import ModelError

NUMPY = ArrayOps(np, "float64")

# Arguments: R is relevance (T, N, *shape), X a tensor (N, *shape), W a constant of exactly this shape.
R, X, W = "R", "X", "W"
SHAPE = (4, 7, 8)
CONV = resolve_conv((7, 8), (3, 2), "NOTSET", (1, 2), (1, 0, 2, 1), (2, 1))
POOL = Window((3, 2), (2, 2), (1, 1), (1, 1), (0, 1))
Argument = tuple[str, tuple[int, ...]]

# Name: (call, arguments, whether it moves entries only).
PRIMITIVES: dict[str, tuple[Callable[..., Any], tuple[Argument, ...], bool]] = {
    "add": (lambda o, r, x: r + x, ((R, SHAPE), (X, SHAPE)), False),
    "subtract from a number": (lambda o, r: 1.0 - r, ((R, SHAPE),), False),
    "multiply by a constant": (lambda o, r, w: w * r, ((R, SHAPE), (W, (4, 1, 1))), False),
    "divide by a tensor": (lambda o, r, x: r / (x * x + 1.0), ((R, SHAPE), (X, SHAPE)), False),
    "a number over a tensor": (lambda o, x: 1.0 / (x * x + 1.0), ((X, SHAPE),), False),
    "negate": (lambda o, r: -r, ((R, SHAPE),), True),
    "where": (lambda o, r, x: o.where(x > 0, r, 0.0), ((R, SHAPE), (X, SHAPE)), True),
    "where at or below": (lambda o, r, x: o.where(x <= 0.0, r, -r), ((R, SHAPE), (X, SHAPE)), True),
    "where below or at a tensor": (lambda o, x, y: o.where(x < y, x, y), ((X, SHAPE), (X, SHAPE)), True),
    "where at or above": (lambda o, x: o.where(x >= 0.5, x, 0.5), ((X, SHAPE),), True),
    "where equal": (lambda o, x: o.where(o.sign(x) == 1.0, x, 0.0), ((X, SHAPE),), True),
    "positive": (lambda o, x: o.positive(x), ((X, SHAPE),), True),
    "positive twice": (lambda o, x: o.positive(o.positive(x)), ((X, SHAPE),), True),
    "negative": (lambda o, x: o.negative(x), ((X, SHAPE),), True),
    "mask": (lambda o, x: o.mask(x > 0), ((X, SHAPE),), True),
    "abs": (lambda o, x: o.abs(x), ((X, SHAPE),), True),
    "sign": (lambda o, r: o.sign(r), ((R, SHAPE),), True),
    "zeros like": (lambda o, r: o.zeros_like(r), ((R, SHAPE),), True),
    "ones like": (lambda o, x: o.ones_like(x), ((X, SHAPE),), True),
    "exp": (lambda o, x: o.exp(x), ((X, SHAPE),), False),
    "log": (lambda o, x: o.log(x * x + 0.1), ((X, SHAPE),), False),
    "sqrt": (lambda o, x: o.sqrt(x * x + 0.1), ((X, SHAPE),), False),
    "sin": (lambda o, x: o.sin(x), ((X, SHAPE),), False),
    "cos": (lambda o, x: o.cos(x), ((X, SHAPE),), False),
    "tanh": (lambda o, x: o.tanh(x), ((X, SHAPE),), False),
    "sigmoid": (lambda o, x: o.sigmoid(x), ((X, SHAPE),), False),
    "power of a number": (lambda o, x: o.power(o.abs(x) + 0.1, 1.7), ((X, SHAPE),), False),
    "power of an array": (lambda o, x, w: o.power(o.abs(x) + 0.1, w), ((X, SHAPE), (W, (8,))), False),
    "sum": (lambda o, r: o.sum(r, (-1, -3)), ((R, SHAPE),), False),
    "sum over nothing": (lambda o, r: o.sum(r, ()), ((R, SHAPE),), True),
    "sum counted from the front": (lambda o, r: o.sum(r, (2, 4), keepdims=True), ((R, SHAPE),), False),
    "mean": (lambda o, r: o.mean(r, (-1, -2), keepdims=True), ((R, SHAPE),), False),
    "prod": (lambda o, x: o.prod(x, (-1,)), ((X, SHAPE),), False),
    "min": (lambda o, x: o.min(x, (-1, -2)), ((X, SHAPE),), True),
    "max": (lambda o, r: o.max(r, (-1,)), ((R, SHAPE),), True),
    "permute": (lambda o, r: o.permute(r, (0, 2, 3, 1)), ((R, SHAPE),), True),
    "slice": (lambda o, r: o.slice(r, -2, 1, 6), ((R, SHAPE),), True),
    "slice of all": (lambda o, r: o.slice(r, -2, 0, 7), ((R, SHAPE),), True),
    "slice by steps": (lambda o, r: o.slice(r, -1, 1, 8, 3), ((R, SHAPE),), True),
    "take": (lambda o, r: o.take(r, np.array([3, 0, 3]), -3), ((R, SHAPE),), True),
    "concat": (lambda o, r: o.concat([r, o.slice(r, -1, 0, 3)], -1), ((R, SHAPE),), True),
    "scatter in order": (lambda o, r: o.scatter_add(r, np.arange(2, 9), -2, 11), ((R, SHAPE),), True),
    "scatter by steps": (lambda o, r: o.scatter_add(r, np.arange(0, 16, 2), -1, 17), ((R, SHAPE),), True),
    "scatter backwards": (lambda o, r: o.scatter_add(r, np.arange(7, -1, -1), -1, 8), ((R, SHAPE),), True),
    "scatter with repeats": (
        lambda o, r: o.scatter_add(r, np.array([1, 1, 0, -1, 1, 4, -1, 4]), -1, 6),
        ((R, SHAPE),),
        False,
    ),
    "scatter of nothing inside": (lambda o, r: o.scatter_add(r, np.full(7, -1), -2, 4), ((R, SHAPE),), True),
    "matmul": (lambda o, r, w: o.matmul(r, w), ((R, SHAPE), (W, (8, 5))), False),
    "matmul of tensors": (lambda o, r, x: o.matmul(r, o.swap(x)), ((R, SHAPE), (X, SHAPE)), False),
    "along the last axis": (lambda o, r, w: o.along(r, w, -1), ((R, SHAPE), (W, (5, 8))), False),
    "along the last axis but one": (lambda o, r, w: o.along(r, w, -2), ((R, SHAPE), (W, (5, 7))), False),
    "along another axis": (lambda o, r, w: o.along(r, w, -3), ((R, SHAPE), (W, (5, 4))), False),
    "conv of relevance": (lambda o, r, w: o.conv(r, w, CONV, 2), ((R, SHAPE), (W, (6, 2, 3, 2))), False),
    "conv of a tensor": (lambda o, x, w: o.conv(x, w, CONV, 2), ((X, SHAPE), (W, (6, 2, 3, 2))), False),
    "window sum": (lambda o, x: o.window_sum(x, POOL), ((X, SHAPE),), False),
    "window sum adjoint": (
        lambda o, r: o.window_sum_adjoint(r, POOL, (7, 8)),
        ((R, (4, *POOL.output((7, 8)))),),
        False,
    ),
}


def arguments(kinds: tuple[Argument, ...], targets: int, batch: int) -> list[np.ndarray]:
    lead = {R: (targets, batch), X: (batch,), W: ()}
    return [
        np.random.default_rng(i).standard_normal(lead[kind] + shape).astype(np.float32)
        for i, (kind, shape) in enumerate(kinds)
    ]


class Recorded:
    """A call recorded once, its batch symbolic, and run as often as wanted."""

    def __init__(self, call: Callable[..., Any], kinds: tuple[Argument, ...], targets: int, opset: int = 17):
        graph = gs.Graph(opset=opset, name="recorded")
        ops = RecorderOps(graph)
        self.kinds, self.targets = kinds, targets
        symbols = []
        for i, (kind, shape) in enumerate(kinds):
            if kind == W:
                constant = arguments(kinds, targets, 1)[i]
                symbols.append(Symbol(ops, gs.Constant(f"w{i}", constant), shape))
                continue
            bare = kind == R and targets == 1
            lead = ("N",) if kind == X or bare else (targets, "N")
            variable = gs.Variable(f"a{i}", np.float32, [*lead, *shape])
            graph.inputs.append(variable)
            symbols.append(Symbol(ops, variable, (targets, BATCH, *shape) if kind == R else (BATCH, *shape), bare))
        self.out = call(ops, *symbols)
        self._session = self._load(graph)

    def _load(self, graph: gs.Graph) -> ort.InferenceSession:
        result = gs.Variable("result", np.float32)
        graph.nodes.append(gs.Node("Identity", inputs=[self.out.tensor], outputs=[result]))
        graph.outputs = [result]
        self.proto = onnx.shape_inference.infer_shapes(gs.export_onnx(graph, do_type_check=False), strict_mode=True)
        self.proto.ir_version = min(self.proto.ir_version, 10)
        onnx.checker.check_model(self.proto, full_check=True)
        return ort.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, batch: int) -> np.ndarray:
        """The result, its axis of targets put back; its shape is the one that was foretold."""
        feeds = {}
        for i, ((kind, _), array) in enumerate(
            zip(self.kinds, arguments(self.kinds, self.targets, batch), strict=True)
        ):
            if kind != W:
                feeds[f"a{i}"] = array[0] if kind == R and self.targets == 1 else array
        result = self._session.run(None, {k: v for k, v in feeds.items() if k in self._inputs})[0]
        result = result[None] if self.out.bare else result
        assert result.shape == tuple(batch if n == BATCH else n for n in self.out.shape)
        assert not self.out.positive or (result >= 0).all()
        return result

    @property
    def _inputs(self) -> set[str]:
        return {i.name for i in self._session.get_inputs()}


def agree(ours: np.ndarray, exact: np.ndarray, moves: bool = False) -> None:
    exact = np.asarray(exact)
    assert ours.shape == exact.shape
    if moves:
        np.testing.assert_array_equal(ours, exact.astype(np.float32))
    else:
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def same(call: Callable[..., Any], kinds: tuple[Argument, ...], targets: int, moves: bool = False, **how: Any) -> None:
    recorded = Recorded(call, kinds, targets, **how)
    for batch in (1, 2):
        exact = call(NUMPY, *(NUMPY.asarray(a) for a in arguments(kinds, targets, batch)))
        agree(recorded(batch), exact, moves)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_recorded_primitive_gives_what_the_array_engine_computes(name: str, targets: int) -> None:
    call, kinds, moves = PRIMITIVES[name]
    same(call, kinds, targets, moves)


# Primitives that are told a shape: while recording, the batch in it is a name.
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_shapes_given_to_a_recorded_primitive_may_name_the_batch(targets: int, batch: int) -> None:
    def through(o: Any, r: Any, n: Any) -> list[Any]:
        flat = o.reshape(r, (n, 28, 8))
        back = o.reshape(flat, (n, 4, -1, 8))
        row = o.sum(r, (-1,), keepdims=True)
        return [flat, back, o.expand(row, (n, *SHAPE)), o.unbroadcast(r, (n, 4, 1, 8)), o.unbroadcast(r, (1, 7, 1))]

    def only(i: int) -> Callable[..., Any]:
        return lambda o, r: through(o, r, BATCH if isinstance(o, RecorderOps) else batch)[i]

    kinds = ((R, SHAPE),)
    for i in range(4):
        agree(Recorded(only(i), kinds, targets)(batch), only(i)(NUMPY, *arguments(kinds, targets, batch)))


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_reductions_are_written_as_the_opset_has_them(opset: int) -> None:
    for name in ("sum", "mean", "prod", "min", "max"):
        same(*PRIMITIVES[name][:2], 3, PRIMITIVES[name][2], opset=opset)


WINDOWS = {
    "1x1": resolve_conv((7, 8), (1, 1), "NOTSET", None, None, None),
    "1x1 by 2": resolve_conv((7, 8), (1, 1), "NOTSET", None, None, (2, 2)),
    "3x3": resolve_conv((7, 8), (3, 3), "NOTSET", None, (1, 1, 1, 1), None),
    "3x3 without pads": resolve_conv((7, 8), (3, 3), "NOTSET", None, None, None),
    "3x2, pads on one side": resolve_conv((7, 8), (3, 2), "NOTSET", None, (2, 0, 0, 1), None),
    "more pads than kernel": resolve_conv((7, 8), (3, 2), "NOTSET", None, (3, 2, 4, 3), None),
    "dilated": resolve_conv((7, 8), (3, 2), "NOTSET", (2, 3), (1, 1, 2, 0), None),
    "by 2": resolve_conv((7, 8), (3, 3), "NOTSET", None, (1, 1, 1, 1), (2, 2)),
    "by 3 and 2, ends left over": resolve_conv((7, 8), (2, 3), "NOTSET", (1, 2), (0, 1, 1, 0), (3, 2)),
}


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize(("name", "groups"), list(product(WINDOWS, ("dense", "grouped", "depthwise"))))
def test_the_adjoint_of_a_recorded_convolution_is_exact(name: str, groups: str, targets: int) -> None:
    window = WINDOWS[name]
    group, weight = {"dense": (1, (6, 4)), "grouped": (2, (6, 2)), "depthwise": (4, (4, 1))}[groups]
    size = window.output((7, 8))
    same(
        lambda o, r, w: o.conv_adjoint(r, w, window, (7, 8), group),
        ((R, (weight[0], *size)), (W, (*weight, *window.kernel))),
        targets,
    )


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_relevance_of_a_maximum_goes_to_the_first_of_its_entries(ties: bool, targets: int) -> None:
    """Oracle: loops over windows, which overlap and have pads; with ties, every entry is the maximum of its window."""
    window = Window((3, 3), (2, 2), (1, 1), (1, 1), (1, 1))
    kinds = ((R, (4, *window.output((7, 8)))), (X, SHAPE), (X, (4, *window.output((7, 8)))))
    flat = (lambda x: 0.0 * x) if ties else (lambda x: x)
    recorded = Recorded(lambda o, r, x, y: o.window_max_adjoint(r, flat(x), y, window), kinds, targets)
    for batch in (1, 2):
        r, x, _ = arguments(kinds, targets, batch)
        x = flat(x)
        exact = np.zeros((targets, *x.shape))
        for n, c, i, j in np.ndindex(batch, *r.shape[2:]):
            cells = [
                (h, w)
                for h, w in product(range(2 * i - 1, 2 * i + 2), range(2 * j - 1, 2 * j + 2))
                if 0 <= h < 7 and 0 <= w < 8
            ]
            best = max(cells, key=lambda cell: x[n, c, cell[0], cell[1]])
            exact[:, n, c, best[0], best[1]] += r[:, n, c, i, j]
        agree(recorded(batch), exact)


def test_both_engines_have_every_primitive_that_the_mathematics_uses() -> None:
    package = Path(onnxcam.__file__).parent
    sources = [*(package / "operators").glob("*.py"), *(package / "methods").glob("*.py")]
    sources += [package / f"{name}.py" for name in ("rules", "starts", "propagate", "compile")]
    used = {name for source in sources for name in re.findall(r"\bops\.([a-z_]\w*)\(", source.read_text())}
    assert len(used) > 30
    recorder_only = {"record", "tap", "constant"}  # which only compile.py calls
    assert [n for n in sorted(used - recorder_only) if not hasattr(NUMPY, n)] == []
    assert [n for n in sorted(used) if not hasattr(RecorderOps, n)] == []


def test_one_target_costs_no_axis() -> None:
    """Several targets are folded into the batch of a convolution; one target needs nothing."""
    call, kinds, _ = PRIMITIVES["conv of relevance"]
    assert [n.op_type for n in Recorded(call, kinds, 1).proto.graph.node] == ["Conv", "Identity"]
    assert [n.op_type for n in Recorded(call, kinds, 3).proto.graph.node] == ["Reshape", "Conv", "Reshape", "Identity"]


def test_a_transposed_convolution_never_shares_its_weight_with_a_convolution() -> None:
    """OpenVINO silently mixes up the repacked weights of the two where they lie in the same memory."""
    window = WINDOWS["by 3 and 2, ends left over"]

    def both(o: Any, x: Any, w: Any) -> Any:
        return o.conv_adjoint(o.conv(x, w, window, 1), w, window, (7, 8), 1)

    nodes = {n.op_type: n for n in Recorded(both, ((R, SHAPE), (W, (4, 4, 2, 3))), 1).proto.graph.node}
    made = {n.output[0]: n.op_type for n in nodes.values()}
    assert nodes["Conv"].input[1] != nodes["ConvTranspose"].input[1]
    # Max with the lowest float is the identity, and none of the nodes that OpenVINO sees through.
    assert made[nodes["ConvTranspose"].input[1]] == "Max"


def test_small_constants_are_stored_once_and_ones_not_at_all() -> None:
    graph = gs.Graph(opset=17)
    ops = RecorderOps(graph)
    x = Symbol(ops, gs.Variable("x", np.float32, [1, 512, 7, 7]), (1, 512, 7, 7))
    total = ops.window_sum(x + 1.0, Window((7, 7), (1, 1), (1, 1), (0, 0), (0, 0))) + 1.0
    constants = [c for t in graph.tensors().values() if isinstance(c := t, gs.Constant)]
    assert sum(c.values.nbytes for c in constants) < 100
    assert sum(c.values.size == 1 and c.values.dtype == np.float32 for c in constants) == 1
    assert total.shape == (1, 512, 1, 1)


def test_what_depends_on_an_unknown_batch_is_refused_in_words() -> None:
    ops = RecorderOps(gs.Graph(opset=17))
    x = Symbol(ops, gs.Variable("x", np.float32, ["N", 4]), (BATCH, 4))
    with pytest.raises(ModelError, match="unknown batch"):
        ops.zeros((BATCH, 4))
    with pytest.raises(ModelError, match="no numbers yet"):
        ops.to_host(x)
