"""Random small networks: both engines give the same relevance, and the gradient is the slope.

Hypothesis grows networks of a few nodes over most operators, with fan-out, residual sums, gates, joins and several
kinds of head, on tiny tensors with seeded weights. Three comparisons, none of which knows the rules:

* the recorder against the array engine, both in float64, for every composite: 1e-9, a thousand times what the orders of
  summation of the two differ by;
* ONNX Runtime on what was recorded, in float32, against the same: 1e-5, or what the relevance itself moves by where the
  input moves by a rounding of float32, since sums may cancel;
* the gradient against central differences in float64: 1e-5, where two steps agree that there is no kink in between.

A failure prints the network as text. ONNXCAM_EXAMPLES sets how many are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import assume, given, settings, strategies as st
from walking import RecordedWalk, Walker, as_written, canonised, network

from onnxcam.composites import COMPOSITES, Composite
from onnxcam.engines.session import RuntimeSession
from onnxcam.graph import Graph
from onnxcam.taps import expose

EXAMPLES = int(os.environ.get("ONNXCAM_EXAMPLES", "60"))
NAMES = ("relevance_cam", "epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box", "gradient")
CLASSES, IMAGES = 4, 2
Draw = Callable[[st.SearchStrategy], Any]


def rules(name: str) -> Composite:
    return COMPOSITES[name].with_box(np.array(-4.0), np.array(4.0))


@dataclass
class Net:
    """A network under construction: its text, its weights, and the shape of every tensor, the batch left out."""

    symbolic: bool
    opset: int
    shape: tuple[int, ...]
    lines: list[str] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes["x"] = self.shape

    @property
    def last(self) -> str:
        return next(reversed(self.shapes))

    def weight(self, *shape: int, low: float | None = None) -> str:
        """The name of a new weight, from the normal distribution scaled by its fan-in; uniform from `low` on."""
        rng = np.random.default_rng(len(self.weights))
        fan = max(1, int(np.prod(shape[1:])))
        value = rng.standard_normal(shape) / np.sqrt(fan) if low is None else rng.uniform(low, low + 1, shape)
        return self.constant(value.astype(np.float32))

    def constant(self, value: Any) -> str:
        name = f"w{len(self.weights)}"
        array = np.asarray(value)
        self.weights[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def add(self, call: str, outputs: int = 1) -> list[str]:
        """Append a node, "Conv<...>(x, w0)"; the names of its outputs."""
        made = [f"t{len(self.lines)}" + ("" if i == 0 else "abc"[i - 1]) for i in range(outputs)]
        self.lines.append(f"{', '.join(made)} = {call}")
        model = self.model(made[0])
        del model.graph.output[:]
        for value in onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info:
            if value.name in made and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
                self.shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)[1:]
        return made

    def model(self, output: str) -> onnx.ModelProto:
        sizes = ",".join(map(str, self.shape))
        batch = "N" if self.symbolic else IMAGES
        body = "\n    ".join(self.lines)
        return network(f"(float[{batch},{sizes}] x) => (float {output}) {{\n    {body}\n}}", self.opset, **self.weights)

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{name} {value.tolist()}" if value.size < 7 and value.dtype.kind in "iu" else f"{name} {value.shape}"
            for name, value in self.weights.items()
        )
        return f"opset {self.opset}, x {self.shape}, {'N' if self.symbolic else IMAGES} images\n" + "\n".join(
            [*self.lines, sizes]
        )

    def pictures(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if len(shape) == 3]


# -- what a network may grow by: each takes a tensor (C, H, W) and adds nodes behind it ------------------------------


def pair(draw: Draw, low: int, high: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=2, max_size=2))


def conv(draw: Draw, net: Net, x: str) -> None:
    c, h, w = net.shapes[x]
    group = draw(st.sampled_from([g for g in (1, 2, c) if c % g == 0]))
    m = group * draw(st.integers(1, 2))
    kernel, strides, dilations = pair(draw, 1, 3), pair(draw, 1, 3), pair(draw, 1, 2)
    pads = [draw(st.integers(0, min(2, k))) for k in kernel * 2]
    room = [(h, w)[i] + pads[i] + pads[2 + i] - (kernel[i] - 1) * dilations[i] for i in (0, 1)]
    if min(room) < 1:
        kernel, pads = [1, 1], [0, 0, 0, 0]
    bias = f", {net.weight(m, low=-0.5)}" if draw(st.booleans()) else ""
    weight = net.weight(m, c // group, *kernel)
    net.add(f"Conv<group={group}, strides={strides}, dilations={dilations}, pads={pads}>({x}, {weight}{bias})")


def same_conv(draw: Draw, net: Net, x: str) -> None:
    """Keeps the shape, so that sums find something to add."""
    c = net.shapes[x][0]
    group = draw(st.sampled_from([1, c]))
    (y,) = net.add(f"Conv<group={group}, pads=[1,1,1,1]>({x}, {net.weight(c, c // group, 3, 3)}, {net.weight(c)})")
    if draw(st.booleans()):
        net.add(f"Relu({y})")


def transposed(draw: Draw, net: Net, x: str) -> None:
    c = net.shapes[x][0]
    strides, kernel = pair(draw, 1, 2), pair(draw, 2, 3)
    pads = [draw(st.integers(0, 1)) for _ in range(4)]
    group = draw(st.sampled_from([1, c]))
    if max(net.shapes[x][1:]) <= 6 and min(net.shapes[x][1:]) > 1:
        weight = net.weight(c, 2 if group == 1 else 1, *kernel)
        net.add(f"ConvTranspose<group={group}, strides={strides}, pads={pads}>({x}, {weight})")


ACTIVATIONS = (
    *("Relu", "LeakyRelu<alpha=0.2>", "Elu", "Selu", "Celu<alpha=0.7>", "Softplus", "Softsign", "Sigmoid", "Tanh"),
    *("HardSigmoid", "HardSwish", "Mish", "Erf", "Neg", "Abs", "ThresholdedRelu<alpha=0.3>", "Identity", "Sin"),
)


def activation(draw: Draw, net: Net, x: str) -> None:
    net.add(f"{draw(st.sampled_from(ACTIVATIONS))}({x})")


def clip(draw: Draw, net: Net, x: str) -> None:
    net.add(f"Clip({x}, {net.constant(np.float32(-0.2))}, {net.constant(np.float32(0.9))})")


def prelu(draw: Draw, net: Net, x: str) -> None:
    net.add(f"PRelu({x}, {net.weight(net.shapes[x][0], 1, 1)})")


def smooth_gate(draw: Draw, net: Net, x: str) -> None:
    """SiLU, or a squeeze-and-excitation gate, in either slot."""
    c = net.shapes[x][0]
    inner = x
    if draw(st.booleans()):
        (pooled,) = net.add(f"GlobalAveragePool({x})")
        (inner,) = net.add(f"Conv({pooled}, {net.weight(c, c, 1, 1)})")
    (gate,) = net.add(f"Sigmoid({inner})")
    net.add(f"Mul({x}, {gate})" if draw(st.booleans()) else f"Mul({gate}, {x})")


def two(draw: Draw, net: Net, x: str) -> None:
    """A sum, difference, product or maximum with another tensor of the same shape, maybe itself."""
    op = draw(st.sampled_from(["Add", "Add", "Add", "Sub", "Sum", "Mean", "Max", "Min", "Mul", "Div"]))
    others = [name for name in net.pictures() if net.shapes[name] == net.shapes[x]]
    other = draw(st.sampled_from(others))
    if op == "Div":
        (positive,) = net.add(f"Softplus({other})")
        (other,) = net.add(f"Add({positive}, {net.constant(np.float32(0.5))})")
    if op != "Sub" or other != x:
        net.add(f"{op}({x}, {other})" if draw(st.booleans()) or op == "Div" else f"{op}({other}, {x})")


def pooled_sum(draw: Draw, net: Net, x: str) -> None:
    """A summand that broadcasts."""
    (pooled,) = net.add(f"{draw(st.sampled_from(['GlobalAveragePool', 'GlobalMaxPool']))}({x})")
    net.add(f"Add({x}, {pooled})")


def constant_operand(draw: Draw, net: Net, x: str) -> None:
    op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Pow"]))
    shape = draw(st.sampled_from([(net.shapes[x][0], 1, 1), (1,), (), net.shapes[x][1:]]))
    if op == "Pow":
        (x,) = net.add(f"Abs({x})")
        net.add(f"Pow({x}, {net.constant(np.float32(2.0))})")
        return
    k = net.weight(*shape, low=0.5)
    net.add(f"{op}({x}, {k})" if op == "Div" or draw(st.booleans()) else f"{op}({k}, {x})")


def batchnorm(draw: Draw, net: Net, x: str) -> None:
    c = net.shapes[x][0]
    scale, mean = net.weight(c, low=-0.3), net.weight(c, low=-0.5)
    net.add(f"BatchNormalization({x}, {scale}, {net.weight(c, low=-0.5)}, {mean}, {net.weight(c, low=0.5)})")


def normalisation(draw: Draw, net: Net, x: str) -> None:
    c = net.shapes[x][0]
    if draw(st.booleans()):
        (y,) = net.add(f"MeanVarianceNormalization<axes=[2,3]>({x})")
        net.add(f"Add({y}, {net.weight(c, 1, 1, low=0.5)})")  # else its mean is zero, and rounding decides its sign
    elif draw(st.booleans()):
        net.add(f"LRN<size={draw(st.sampled_from([1, 3]))}, alpha=0.5>({x})")
    else:
        net.add(f"InstanceNormalization<epsilon=0.1>({x}, {net.weight(c, low=0.5)}, {net.weight(c)})")


def pool(draw: Draw, net: Net, x: str) -> None:
    op = draw(st.sampled_from(["MaxPool", "MaxPool", "AveragePool", "LpPool"]))
    kernel, strides = pair(draw, 1, 3), pair(draw, 1, 3)
    begin, end = ([draw(st.integers(0, k - 1)) for k in kernel] for _ in range(2))
    room = [net.shapes[x][1 + i] + begin[i] + end[i] - kernel[i] for i in (0, 1)]
    if min(room) < 0:
        return
    extra = ""
    # Before opset 22 shape inference counts a window of ceil_mode that starts behind the input, which nobody computes.
    inside = not any(end) and all(s <= k for s, k in zip(strides, kernel, strict=True))
    if op != "LpPool" and inside and draw(st.booleans()):
        extra = ", ceil_mode=1"
    if op == "AveragePool" and draw(st.booleans()):
        extra += ", count_include_pad=1"
    net.add(f"{op}<kernel_shape={kernel}, strides={strides}, pads={begin + end}{extra}>({x})")


def join(draw: Draw, net: Net, x: str) -> None:
    others = [name for name in net.pictures() if net.shapes[name][1:] == net.shapes[x][1:]]
    parts = [x, *draw(st.lists(st.sampled_from(others), min_size=1, max_size=2))]
    if sum(net.shapes[p][0] for p in parts) <= 12:
        net.add(f"Concat<axis={draw(st.sampled_from([1, -3]))}>({', '.join(parts)})")


def split(draw: Draw, net: Net, x: str) -> None:
    """Both parts are used, or one of them only."""
    c = net.shapes[x][0]
    if c > 1:
        first = draw(st.integers(1, c - 1))
        parts = net.add(f"Split<axis=1>({x}, {net.constant(np.array([first, c - first]))})", 2)
        if draw(st.booleans()):
            net.add(f"Concat<axis=1>({', '.join(reversed(parts))})")


def cut(draw: Draw, net: Net, x: str) -> None:
    axis = draw(st.integers(1, 3))
    size = net.shapes[x][axis - 1]
    step = draw(st.sampled_from([1, 2, -1]))
    bounds = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
    start, end = (bounds[0], bounds[1]) if step > 0 else (bounds[1] - 1, bounds[0] - 1 if bounds[0] else -size - 1)
    numbers = ", ".join(net.constant(np.array([n])) for n in (start, end, axis, step))
    net.add(f"Slice({x}, {numbers})")


def pad(draw: Draw, net: Net, x: str) -> None:
    mode = draw(st.sampled_from(["constant", "reflect", "edge"]))
    most = [min(2, n - 1) if mode == "reflect" else 2 for n in net.shapes[x][1:]]
    sides = [draw(st.integers(0, m)) for m in most * 2]
    if max(net.shapes[x][1:]) <= 8:
        net.add(f'Pad<mode="{mode}">({x}, {net.constant(np.array([0, 0, *sides[:2], 0, 0, *sides[2:]]))})')


def resize(draw: Draw, net: Net, x: str) -> None:
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    where = draw(st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]))
    if max(net.shapes[x][1:]) <= 6:
        scales = net.constant(np.float32([1, 1, draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 3]))]))
        net.add(f'Resize<mode="{mode}", coordinate_transformation_mode="{where}">({x}, , {scales})')


def shuffle(draw: Draw, net: Net, x: str) -> None:
    """Channels in another order: by index, with repetitions, or as ShuffleNet does."""
    c, h, w = net.shapes[x]
    if c % 2 == 0 and draw(st.booleans()):
        (y,) = net.add(f"Reshape({x}, {net.constant(np.array([-1, 2, c // 2, h, w]))})")
        (y,) = net.add(f"Transpose<perm=[0,2,1,3,4]>({y})")
        net.add(f"Reshape({y}, {net.constant(np.array([-1, c, h, w]))})")
    else:
        index = draw(st.lists(st.integers(-c, c - 1), min_size=1, max_size=4))
        net.add(f"Gather<axis=1>({x}, {net.constant(np.array(index))})")


def largest(draw: Draw, net: Net, x: str) -> None:
    """The largest entries along an axis: which they are, only the running model knows."""
    axis = draw(st.integers(1, 3))
    k = net.constant(np.array([draw(st.integers(1, net.shapes[x][axis - 1]))]))
    net.add(f"TopK<axis={axis}, largest={draw(st.integers(0, 1))}>({x}, {k})", 2)


def transpose(draw: Draw, net: Net, x: str) -> None:
    net.add(f"Transpose<perm={[0, *draw(st.permutations([1, 2, 3]))]}>({x})")


def blocks(draw: Draw, net: Net, x: str) -> None:
    c, h, w = net.shapes[x]
    if c % 4 == 0:
        net.add(f'DepthToSpace<blocksize=2, mode="{draw(st.sampled_from(["DCR", "CRD"]))}">({x})')
    elif h % 2 == w % 2 == 0:
        net.add(f"SpaceToDepth<blocksize=2>({x})")


def tokens(draw: Draw, net: Net, x: str) -> None:
    """Cells as tokens: a map with a bias of its own, attention over them at will, and back."""
    c, h, w = net.shapes[x]
    (flat,) = net.add(f"Reshape({x}, {net.constant(np.array([0, c, h * w]))})")
    (rows,) = net.add(f"Transpose<perm=[0,2,1]>({flat})")
    (y,) = net.add(f"MatMul({rows}, {net.weight(c, c)})")
    (y,) = net.add(f"Add({y}, {net.weight(c)})")
    if draw(st.booleans()):
        (turned,) = net.add(f"Transpose<perm=[0,2,1]>({rows})")
        (scores,) = net.add(f"MatMul({rows}, {turned})")
        (weights,) = net.add(f"Softmax<axis=-1>({scores})")
        (y,) = net.add(f"MatMul({weights}, {y})")
    if draw(st.booleans()):
        (y,) = net.add(f"LayerNormalization<epsilon=0.1>({y}, {net.weight(c, low=0.5)}, {net.weight(c)})")
    (y,) = net.add(f"Transpose<perm=[0,2,1]>({y})")
    net.add(f"Reshape({y}, {net.constant(np.array([0, c, h, w]))})")


def spread(draw: Draw, net: Net, x: str) -> None:
    """Reduced and repeated again."""
    c, h, w = net.shapes[x]
    op = draw(st.sampled_from(["ReduceMean<axes=[-1]>", "ReduceMax<axes=[2]>", "ReduceL2<axes=[3]>"]))
    (y,) = net.add(f"{op}({x})")
    net.add(f"Expand({y}, {net.constant(np.array([1, c, h, w]))})")


def tile(draw: Draw, net: Net, x: str) -> None:
    if max(net.shapes[x][1:]) <= 4:
        net.add(f"Tile({x}, {net.constant(np.array([1, 1, 1, 2]))})")


def choice(draw: Draw, net: Net, x: str) -> None:
    """Where a constant mask, or a comparison, says."""
    zero = net.constant(np.float32(0.1))
    mask = net.constant(np.random.default_rng(0).random(net.shapes[x][1:]) > 0.5)
    condition = net.add(f"Greater({x}, {zero})")[0] if draw(st.booleans()) else mask
    net.add(f"Where({condition}, {x}, {zero})")


GROW: tuple[Callable[[Draw, Net, str], None], ...] = (
    *(conv, conv, same_conv, activation, two, pool, join, smooth_gate),  # what most networks are made of comes first
    *(transposed, clip, prelu, pooled_sum, constant_operand, batchnorm, normalisation, split, cut, pad, resize),
    *(largest, shuffle, transpose, blocks, tokens, spread, tile, choice),
)


def head(draw: Draw, net: Net) -> None:
    c, h, w = net.shapes[net.last]
    how = draw(st.sampled_from(["gap", "mean", "max", "flatten", "conv"]))
    size = c
    if how == "gap":
        (f,) = net.add(f"Flatten({net.add(f'GlobalAveragePool({net.last})')[0]})")
    elif how == "mean":
        (f,) = net.add(f"ReduceMean<axes=[2,3], keepdims=0>({net.last})")
    elif how == "max":
        (f,) = net.add(f"ReduceMax<axes=[2,3], keepdims=0>({net.last})")
    elif how == "conv":
        (y,) = net.add(f"Conv({net.last}, {net.weight(CLASSES, c, 1, 1)}, {net.weight(CLASSES)})")
        net.add(f"Flatten({net.add(f'GlobalAveragePool({y})')[0]})")
        return
    else:
        (f,), size = net.add(f"Flatten({net.last})"), c * h * w
    form = draw(st.sampled_from(["gemm", "matmul", "bare"]))
    if form == "gemm":
        net.add(f"Gemm<transB=1, alpha=0.5>({f}, {net.weight(CLASSES, size)}, {net.weight(CLASSES)})")
    else:
        (y,) = net.add(f"MatMul({f}, {net.weight(size, CLASSES)})")
        if form == "matmul":
            net.add(f"Add({net.weight(CLASSES)}, {y})")


@dataclass(frozen=True)
class Case:
    """A network with what is asked of it."""

    net: Net
    layers: tuple[str, ...]
    folded: bool
    targets: int
    runtime: str  # the composite that ONNX Runtime runs too

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        how = "canonised" if self.folded else "as written"
        return f"{self.net}\nlayers {self.layers}, {how}, {self.targets} targets, {self.runtime} in ONNX Runtime"


@st.composite
def cases(draw: Draw) -> Case:
    shape = (draw(st.integers(1, 4)), draw(st.integers(3, 6)), draw(st.integers(3, 6)))
    net = Net(draw(st.booleans()), 17, shape)
    for grow in draw(st.lists(st.sampled_from(GROW), min_size=1, max_size=6)):
        # Mostly from the last tensor, now and then from an earlier one: so there are branches, and dead ends too.
        pictures = net.pictures()
        before = draw(st.sampled_from([0, 0, 0, 1, 2]))
        grow(draw, net, pictures[max(-1 - before, -len(pictures))])
        if np.prod(net.shapes[net.last]) > 400:
            break
    head(draw, net)
    inner = [name for name in net.pictures() if name != "x"]
    chosen = draw(st.lists(st.sampled_from(inner), max_size=2, unique=True)) if inner else []
    return Case(net, ("x", *chosen), draw(st.booleans()), draw(st.sampled_from([1, 3])), draw(st.sampled_from(NAMES)))


def graph_of(case: Case) -> Graph:
    model = case.net.model(case.net.last)
    return canonised(model, keep=frozenset(case.layers)) if case.folded else as_written(model)


def inputs(case: Case) -> np.ndarray:
    return np.random.default_rng(1).uniform(-2, 2, (IMAGES, *case.net.shape)).astype(np.float32)


def start_of(case: Case) -> np.ndarray:
    """One-hot rows and one that is dense, (T, N, classes)."""
    start = np.random.default_rng(2).standard_normal((case.targets, IMAGES, CLASSES))
    start[0] = np.eye(CLASSES)[[1, 3]]
    return start.astype(np.float32).astype(np.float64)


def apart(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over largest reference value, or over 1e-2 where next to nothing is left of starts around 1:
    the mean of what is normalised, say, has a gradient of zero and so one of rounding only."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max(initial=0.0) / max(np.abs(reference).max(initial=0.0), 1e-2))


SETTINGS = settings(max_examples=EXAMPLES, deadline=None, derandomize="ONNXCAM_EXAMPLES" not in os.environ)


@SETTINGS
@given(case=cases())
def test_what_is_recorded_is_what_the_array_engine_computes(case: Case) -> None:
    graph, start, logits = graph_of(case), start_of(case), case.net.last
    walker = Walker(graph, case.layers, logits)
    values = walker.forward({"x": inputs(case)})
    assume(all(np.isfinite(v).all() for v in values.values()))
    for name in NAMES:
        want = walker.back(values, start, rules(name)).flow
        recorded = RecordedWalk(graph, {logits: start.shape}, case.layers, rules(name))
        got = recorded(values, {logits: start})
        assert set(got.relevance) == set(want.relevance)
        for layer, r in want.relevance.items():
            assert apart(got.relevance[layer], r) <= 1e-9, (name, layer)
        for ours, theirs in zip(got.balances, want.balances, strict=True):
            assert apart(ours.handed, theirs.handed) <= 1e-9, (name, theirs.node)


@SETTINGS
@given(case=cases())
def test_onnx_runtime_gives_it_in_float32_too(case: Case) -> None:
    graph, start, x, logits = graph_of(case), start_of(case), inputs(case), case.net.last
    composite, walker = rules(case.runtime), Walker(graph, case.layers, logits)
    want = walker({"x": x}, start, composite).flow.relevance
    got = RecordedWalk(graph, {logits: start.shape}, case.layers, composite, "float32")({"x": x}, {logits: start})
    rounding = np.random.default_rng(3)
    moved = [
        walker({"x": x * (1 + 1e-6 * rounding.standard_normal(x.shape))}, start, composite).flow.relevance
        for _ in range(4)
    ]
    for layer, r in want.items():
        assert apart(got.relevance[layer], r) <= 1e-5 + 20 * max(apart(other[layer], r) for other in moved), layer


@SETTINGS
@given(case=cases())
def test_the_gradient_is_the_slope_of_the_logits(case: Case) -> None:
    graph, start, x, logits = graph_of(case), start_of(case), inputs(case).astype(np.float64), case.net.last
    walker = Walker(graph, ["x"], logits)
    walk = walker({"x": x}, start, COMPOSITES["gradient"])
    assume("x" in walk)
    direction = np.random.default_rng(4).standard_normal(x.shape)
    got = (walk["x"] * direction).reshape(case.targets, -1).sum(1)
    scale = np.abs(walk["x"] * direction).reshape(case.targets, -1).sum(1) + 1e-4

    def slope(step: float) -> np.ndarray:
        ends = [walker.forward({"x": x + sign * step * direction})[logits] for sign in (1, -1)]
        return ((ends[0] - ends[1]) / (2 * step) * start).reshape(case.targets, -1).sum(1)

    coarse, fine = slope(2e-5), slope(1e-5)
    assume((np.abs(coarse - fine) <= 1e-7 * scale).all())
    assert (np.abs(got - fine) <= 1e-5 * scale).all()


@SETTINGS
@given(case=cases())
def test_the_canonised_graph_computes_what_the_file_computes(case: Case) -> None:
    """Oracle: ONNX Runtime on the file as it is. Sums of float32 in another order: 1e-5, scaled with the tensors."""
    model, logits = case.net.model(case.net.last), case.net.last
    taps = [name for name in (*case.layers, logits) if name != "x"]
    want = RuntimeSession(expose(as_written(model), taps), taps).run({"x": inputs(case)})
    got = RuntimeSession(expose(canonised(model, keep=frozenset(taps)), taps), taps).run({"x": inputs(case)})
    for name in taps:
        assert np.abs(got[name] - want[name]).max() <= 1e-5 * max(1.0, np.abs(want[name]).max()), name
