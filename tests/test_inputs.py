"""Inputs of every kind: features, signals, volumes, several at once, switches, conditions, numbers of other types.

Gradients are held against torch's autograd on the same weights. The start is one-hot, so what arrives at the input is
the derivative of a logit; float32 sums in another order differ by less than 1e-5 of the largest value.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from walking import network

from onnxcam.compile import compile
from onnxcam.errors import ModelError, UsageError
from onnxcam.input_spec import InputSpec
from onnxcam.model import Model, load

torch = pytest.importorskip("torch")
F = torch.nn.functional

RNG = np.random.default_rng(7)
SMALL = 1e-5
ENGINES = ("numpy", "onnx")
GRADIENT = {"method": "lrp", "composite": "gradient", "start": "one-hot"}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def close(ours: np.ndarray, reference: np.ndarray, tolerance: float = SMALL) -> None:
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def autograd(net, inputs: dict[str, np.ndarray], target: int) -> dict[str, np.ndarray]:
    """The gradient of one logit by every input, in float64."""
    tensors = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in inputs.items()}
    net(**tensors)[:, target].sum().backward()
    return {name: t.grad.numpy() for name, t in tensors.items()}


def double(array: np.ndarray):
    return torch.tensor(array, dtype=torch.float64)


# -- features ---------------------------------------------------------------------------------------------------------

MLP = {"w": normal(8, 16), "b": normal(16), "v": normal(16, 3), "d": normal(3)}
MLP_BODY = "h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, d)"
ROWS = normal(4, 8)


def mlp(kind: str = "float", body: str = MLP_BODY, out: str = "float[N,3] y", shape: str = "N,8") -> onnx.ModelProto:
    return network(f"({kind}[{shape}] x) => ({out}) {{ {body} }}", **MLP)


def mlp_in_torch(x):
    return torch.relu(x @ double(MLP["w"]) + double(MLP["b"])) @ double(MLP["v"]) + double(MLP["d"])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_of_an_mlp_is_autograds(engine: str) -> None:
    e = load(mlp()).explain(ROWS, "input", [0, 2], engine=engine, **GRADIENT)
    for t, target in enumerate((0, 2)):
        close(e.maps["input"][:, t], autograd(mlp_in_torch, {"x": ROWS}, target)["x"])
    assert e.is_vector("input")
    (best, most), *_ = e.top_features(count=3)
    assert most == e.maps["input"][0, 0, best] and abs(most) == np.abs(e.maps["input"][0, 0]).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_lrp_of_features_is_the_epsilon_rule_written_out(engine: str) -> None:
    """Oracle: R = x W (R / z) layer by layer in float64. Biases take their share (the composite is zennit's)."""
    options = {"method": "lrp", "composite": "epsilon_plus", "start": "logit"}
    e = load(mlp()).explain(ROWS, ["input", "r"], 1, engine=engine, **options)
    weights = {name: a.astype(np.float64) for name, a in MLP.items()}
    z1 = ROWS @ weights["w"] + weights["b"]
    r = np.maximum(z1, 0)
    z2 = r @ weights["v"] + weights["d"]
    start = np.zeros_like(z2)
    start[:, 1] = z2[:, 1]
    eps = 1e-6
    at_r = r * ((start / (z2 + eps * np.where(z2 < 0, -1, 1))) @ weights["v"].T)
    at_x = ROWS * ((at_r / (z1 + eps * np.where(z1 < 0, -1, 1))) @ weights["w"].T)
    close(e.maps["r"][:, 0], at_r, 1e-4)  # where a hidden unit is almost zero, its quotient is large
    close(e.maps["input"][:, 0], at_x, 1e-4)


def test_auto_is_the_input_where_nothing_has_a_map() -> None:
    model = load(mlp())
    np.testing.assert_array_equal(
        model.explain(ROWS, method="lrp").maps["auto"], model.explain(ROWS, "x", method="lrp").maps["x"]
    )


@pytest.mark.parametrize(("layer", "says"), [("auto", "no layer of this model has a map"), ("x", "no spatial axes")])
def test_a_method_that_needs_maps_says_which_does_not(layer: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"{says}.*--method lrp gives the relevance of each feature") as caught:
        load(mlp()).explain(ROWS, layer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("kind", "to"), [("int64", 1), ("int32", 1), ("uint8", 1), ("double", 1), ("float16", 1)])
def test_inputs_of_other_number_types_are_cast_in_the_graph_and_explained(kind: str, to: int, engine: str) -> None:
    rows = np.round(ROWS * 3 + 10)
    body = f"f = Cast<to={to}>(x) {MLP_BODY.replace('(x,', '(f,')}"
    e = load(mlp(kind, body)).explain(rows, "x", 1, engine=engine, **GRADIENT)
    close(e.maps["x"][:, 0], autograd(mlp_in_torch, {"x": rows}, 1)["x"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_in_float64_throughout_is_explained(engine: str) -> None:
    weights = {name: a.astype(np.float64) for name, a in MLP.items()}
    model = load(network(f"(double[N,8] x) => (double[N,3] y) {{ {MLP_BODY} }}", **weights))
    e = model.explain(ROWS, "input", 1, engine=engine, **GRADIENT)
    close(e.maps["input"][:, 0], autograd(mlp_in_torch, {"x": ROWS}, 1)["x"])


def test_open_sizes_are_those_of_the_array() -> None:
    """Features of unknown number: fixed by what is passed."""
    model = load(mlp(shape="N,K"))
    close(
        model.explain(ROWS, "input", 1, **GRADIENT).maps["input"],
        load(mlp()).explain(ROWS, "input", 1, **GRADIENT).maps["input"],
    )
    assert model.check().problems == []


def test_features_can_be_compiled() -> None:
    compiled = compile(load(mlp()), ["input"], [1], method="lrp")
    out = ort.InferenceSession(compiled.proto.SerializeToString()).run([compiled.maps["input"]], {"x": ROWS})[0]
    close(out, load(mlp()).explain(ROWS, "input", 1, method="lrp").maps["input"])


# -- signals and volumes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [(20,), (6, 7, 8)])
def test_the_gradient_of_signals_and_volumes_is_autograds(sizes: tuple[int, ...], engine: str) -> None:
    rank = len(sizes)
    weights = {"w": normal(4, 2, *(3,) * rank), "v": normal(4, 3)}
    shape = ",".join(map(str, ("N", 2, *sizes)))
    pool = f"m = MaxPool<kernel_shape={[2] * rank}, strides={[2] * rank}>(r)"
    body = f"c = Conv(x, w) r = Relu(c) {pool} g = GlobalAveragePool(m) f = Flatten(g) y = Gemm(f, v)"
    x = normal(2, 2, *sizes)
    conv, max_pool = ((F.conv1d, F.max_pool1d), None, (F.conv3d, F.max_pool3d))[rank - 1]

    def net(x):
        pooled = max_pool(torch.relu(conv(x, double(weights["w"]))), 2)
        return pooled.flatten(2).mean(2) @ double(weights["v"])

    model = load(network(f"(float[{shape}] x) => (float[N,3] y) {{ {body} }}", **weights))
    e = model.explain(x, ["input", "auto"], 1, engine=engine, **GRADIENT)
    close(e.maps["input"][:, 0], autograd(net, {"x": x}, 1)["x"].sum(1))
    assert e.maps["auto"].shape[2:] == tuple((n - 2) // 2 for n in sizes)


# -- several inputs ---------------------------------------------------------------------------------------------------

TWO = {"w": normal(4, 3, 3, 3), "u": normal(5, 4), "v": normal(8, 3)}
TWO_BODY = "c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) h = Gemm(m, u) s = Relu(h)"
TWO_BODY += " j = Concat<axis=1>(f, s) y = Gemm(j, v)"
IMAGES, FACTS = normal(3, 3, 9, 9), normal(3, 5)
BOTH = {"x": IMAGES, "m": FACTS}


def two(batch: str = "N", first: str = "x") -> Model:
    inputs = {"x": f"float[{batch},3,9,9] x", "m": f"float[{batch},5] m"}
    order = ", ".join(inputs[name] for name in sorted(inputs, key=lambda n: n != first))
    return load(network(f"({order}) => (float[{batch},3] y) {{ {TWO_BODY} }}", **TWO))


def two_in_torch(x, m):
    pooled = torch.relu(F.conv2d(x, double(TWO["w"]))).mean((2, 3))
    return torch.cat([pooled, torch.relu(m @ double(TWO["u"]))], 1) @ double(TWO["v"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", ["x", "m"])
def test_a_picture_and_facts_about_it_are_explained_together(engine: str, first: str) -> None:
    """Each input gets its own relevance, whichever the file names first."""
    e = two(first=first).explain(IMAGES, "input", 2, inputs={"m": FACTS}, engine=engine, **GRADIENT)
    expected = autograd(two_in_torch, BOTH, 2)
    close(e.maps["x"][:, 0], expected["x"].sum(1))
    close(e.maps["m"][:, 0], expected["m"])


def test_ways_to_hand_over_several_inputs_are_alike() -> None:
    model = two()
    reference = model.explain(IMAGES, inputs={"m": FACTS}).maps["auto"]
    for e in (model.explain(BOTH), model.explain(inputs=BOTH), model.explain({"x": IMAGES}, inputs={"m": FACTS})):
        np.testing.assert_array_equal(e.maps["auto"], reference)


def test_a_batch_of_several_inputs_equals_each_alone() -> None:
    model = two()
    both = model.explain(IMAGES, ["r", "m"], 1, inputs={"m": FACTS}, method="lrp")
    for i in range(3):
        alone = model.explain(IMAGES[i : i + 1], ["r", "m"], 1, inputs={"m": FACTS[i : i + 1]}, method="lrp")
        for name in both.maps:
            close(alone.maps[name][0], both.maps[name][i])
    for step in (1, 2):
        parts = model.explain(IMAGES, ["r", "m"], 1, inputs={"m": FACTS}, method="lrp", batch_size=step)
        close(parts.maps["m"], both.maps["m"])


@pytest.mark.parametrize("batch", ["1", "2"])
def test_a_fixed_batch_is_filled_up_in_every_input(batch: str) -> None:
    ours = two(batch).explain(IMAGES, ["r", "m"], 1, inputs={"m": FACTS}, method="lrp")
    reference = two().explain(IMAGES, ["r", "m"], 1, inputs={"m": FACTS}, method="lrp")
    for name in ours.maps:
        close(ours.maps[name], reference.maps[name])


def test_one_row_holds_for_all_images() -> None:
    ours = two().explain(IMAGES, inputs={"m": FACTS[:1]})
    close(ours.maps["auto"], two().explain(IMAGES, inputs={"m": np.repeat(FACTS[:1], 3, 0)}).maps["auto"])


def test_pictures_go_to_the_input_that_holds_an_image() -> None:
    model = two(first="m")
    assert model.spec.name == "x"
    picture = Image.fromarray(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    assert model.explain(picture, inputs={"m": FACTS[:1]}).overlay().width > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"images": IMAGES}, r"has 2 inputs, x \(N, 3, 9, 9\), m \(N, 5\): input 'm' \(N, 5\) is missing; give it by"),
        ({"inputs": {"m": FACTS}}, r"input 'x' \(N, 3, 9, 9\) is missing; give pictures, or an array by --input x="),
        ({"images": IMAGES, "inputs": {"k": FACTS}}, r"no input 'k'; its inputs are x \(N, 3, 9, 9\), m \(N, 5\)"),
        ({"images": IMAGES, "inputs": {"m": FACTS[:2]}}, "'m' was given 2 rows for 3 images"),
        ({"images": IMAGES, "inputs": {"m": FACTS[:, :4]}}, r"shape \(3, 4\), but input 'm' wants \(N, 5\)"),
        ({"images": IMAGES, "inputs": {"m": FACTS.astype(str)}}, "not numbers that input 'm' could take"),
        ({"images": IMAGES, "inputs": BOTH}, "'x' is given twice"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_with_the_way_out(given: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        two().explain(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_pictures_are_compared(engine: str) -> None:
    """A siamese net: the same weights see both, and each has a map of its own."""
    body = """c = Conv(a, w) r = Relu(c) g = GlobalAveragePool(r) d = Conv(b, w) s = Relu(d) h = GlobalAveragePool(s)
    k = Sub(g, h) f = Flatten(k) y = Gemm(f, v)"""
    weights = {"w": TWO["w"], "v": normal(4, 3)}
    model = load(network(f"(float[N,3,H,W] a, float[N,3,H,W] b) => (float[N,3] y) {{ {body} }}", **weights))
    a, b = normal(2, 3, 9, 9), normal(2, 3, 9, 9)

    def net(a, b):
        one, other = (torch.relu(F.conv2d(x, double(weights["w"]))).mean((2, 3)) for x in (a, b))
        return (one - other) @ double(weights["v"])

    e = model.explain({"a": a, "b": b}, "input", 1, engine=engine, **GRADIENT)
    expected = autograd(net, {"a": a, "b": b}, 1)
    for name in "ab":
        close(e.maps[name][:, 0], expected[name].sum(1))


def test_an_input_that_leads_nowhere_need_not_be_given() -> None:
    proto = network(
        f"(float[N,8] x, float[N,2] extra) => (float[N,3] y, float[N,2] z) {{ {MLP_BODY} z = Neg(extra) }}", **MLP
    )
    close(
        load(proto).explain(ROWS, "input", 1, **GRADIENT).maps["input"],
        load(mlp()).explain(ROWS, "input", 1, **GRADIENT).maps["input"],
    )


def test_a_float_that_holds_for_all_images_is_a_constant() -> None:
    """Prototypes (K, F), not a batch: they are weights, and what they weigh has all the relevance."""
    proto = network("(float[N,8] x, float[3,8] p) => (float[N,3] y) { t = Transpose<perm=[1,0]>(p) y = MatMul(x, t) }")
    prototypes = normal(3, 8)
    for engine in ENGINES:
        e = load(proto).explain(ROWS, "x", 1, inputs={"p": prototypes}, engine=engine, **GRADIENT)
        close(e.maps["x"][:, 0], np.repeat(prototypes[1:2], 4, 0))
    options = {"method": "lrp", "composite": "epsilon_plus", "start": "logit"}
    e = load(proto).explain(ROWS, "x", 1, inputs={"p": prototypes}, **options)
    close(e.maps["x"][:, 0], ROWS * prototypes[1], 1e-4)  # x_i w_i, but for the stabiliser
    compiled = compile(load(proto), ["x"], [1], inputs={"p": prototypes}, **options)
    session = ort.InferenceSession(compiled.proto.SerializeToString())
    assert [i.name for i in session.get_inputs()] == ["x"]
    close(session.run([compiled.maps["x"]], {"x": ROWS})[0], e.maps["x"])
    with pytest.raises(UsageError, match=r"the array has shape \(2, 8\), but input 'p' wants \(3, 8\)"):
        load(proto).explain(ROWS, "x", inputs={"p": prototypes[:2]}, method="lrp")
    with pytest.raises(UsageError, match="'x' goes image by image: it stays an input"):
        compile(load(proto), ["x"], [1], inputs={"x": ROWS}, **options)


# -- settings ---------------------------------------------------------------------------------------------------------


def switched() -> Model:
    body = "h = Gemm(x, w, b) half = Mul(h, two) t = Where(is_training, half, h) r = Relu(t) y = Gemm(r, v, d)"
    proto = network(f"(float[N,8] x, bool is_training) => (float[N,3] y) {{ {body} }}", two=np.float32(2), **MLP)
    for value in proto.graph.input:
        if value.name == "is_training":
            value.type.tensor_type.shape.SetInParent()
    return load(proto)


def test_a_switch_for_training_is_off_and_that_is_said() -> None:
    e = switched().explain(ROWS, "input", 1, **GRADIENT)
    close(e.maps["input"][:, 0], autograd(mlp_in_torch, {"x": ROWS}, 1)["x"])
    assert any("'is_training' was set to False" in w for w in e.warnings)
    on = switched().explain(ROWS, "input", 1, inputs={"is_training": True}, **GRADIENT)
    assert on.warnings == [] and np.abs(on.maps["input"] - e.maps["input"]).max() > 0.1
    assert switched().check().problems == []
    assert [i.name for i in compile(switched(), ["input"], [1], method="lrp").proto.graph.input] == ["x"]


@pytest.mark.parametrize("dims", [("batch", "texts"), ("N", "M")])
def test_a_prompt_holds_for_all_images_and_takes_no_relevance(dims: tuple[str, str]) -> None:
    """As in CLIP: token numbers of another length than the batch; their embeddings become the head's weights."""
    n, m = dims
    table = normal(10, 8)
    body = "e = Gather(table, ids) s = ReduceMean<axes=[1], keepdims=0>(e) t = Transpose(s) y = MatMul(x, t)"
    proto = network(f"(float[{n},8] x, int64[{m},L] ids) => (float[{n},{m}] y) {{ {body} }}", table=table)
    ids = np.array([[1, 2], [3, 4], [5, 6]])
    e = load(proto).explain(ROWS, "input", 2, inputs={"ids": ids}, **GRADIENT)
    close(e.maps["input"][:, 0], np.repeat(table[ids].mean(1)[2:3], 4, 0))


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_a_model_of_several_inputs_compiles_and_its_batch_stays_open() -> None:
    compiled = compile(two(), ["r", "m"], [1], method="lrp")
    session = ort.InferenceSession(compiled.proto.SerializeToString())
    assert {i.name for i in session.get_inputs()} == {"x", "m"}
    expected = two().explain(IMAGES, ["r", "m"], 1, inputs={"m": FACTS}, method="lrp")
    for n in (1, 3):
        out = session.run([compiled.maps["r"], compiled.maps["m"]], {name: a[:n] for name, a in BOTH.items()})
        for ours, name in zip(out, ("r", "m"), strict=True):
            close(ours, expected.maps[name][:n])


# -- conditions that are only known at run time -----------------------------------------------------------------------

BRANCHES = """
    s = ReduceSum<keepdims=0>(x) go = Greater(s, zero)
    h = If<then_branch = then_graph () => (float[N,16] t) { p = Gemm(x, w) t = Relu(p) },
           else_branch = else_graph () => (float[N,16] e) { q = Gemm(x, w2) e = Tanh(q) }>(go)
    y = Gemm(h, v)
"""


def branching() -> onnx.ModelProto:
    weights = {"w": MLP["w"], "w2": normal(8, 16), "v": MLP["v"], "zero": np.float32(0)}
    return network(f"(float[N,8] x) => (float[N,3] y) {{ {BRANCHES} }}", **weights)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_image_is_explained_along_the_branch_that_it_takes(engine: str) -> None:
    proto = branching()
    weights = {t.name: double(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer}
    rows = np.stack([np.abs(ROWS[0]), -np.abs(ROWS[1]), np.abs(ROWS[2])])

    def net(x):
        first, second = torch.relu(x @ weights["w"]), torch.tanh(x @ weights["w2"])
        return torch.where(x.sum(1, keepdim=True) > 0, first, second) @ weights["v"]

    e = load(proto).explain(rows, "input", 1, engine=engine, **GRADIENT)
    close(e.maps["input"][:, 0], autograd(net, {"x": rows}, 1)["x"])
    lrp = load(proto).explain(rows, "input", 1, engine=engine, method="lrp")
    assert lrp.conservation.nodes == []  # the ways differ


@pytest.mark.parametrize("known", [True, False])
def test_a_branch_may_be_all_that_reads_a_large_weight(known: bool) -> None:
    """Weights of this size are held beside the graph."""
    body = """
        go = Greater(s, zero)
        h = If<then_branch = then_graph () => (float[N,64] t) { t = Gemm(x, w) },
               else_branch = else_graph () => (float[N,64] e) { e = Gemm(x, w2) }>(go)
        y = Gemm(h, v)
    """
    weights = {"w": normal(32, 64), "w2": normal(32, 64) * 2, "v": normal(64, 3), "zero": np.float32(0)}
    front = "" if known else "s = ReduceMax<keepdims=0>(x)"
    if known:
        weights["s"] = np.float32(1)
    model = load(network(f"(float[N,32] x) => (float[N,3] y) {{ {front} {body} }}", **weights).SerializeToString())
    e = model.explain(np.abs(normal(1, 32)), "input", 1, **GRADIENT)
    close(e.maps["input"][0, 0], (weights["w"] @ weights["v"])[:, 1])


def test_branches_are_checked_along_both_and_not_compiled() -> None:
    model = load(branching())
    found = model.check()
    assert found.problems == []
    assert {"Relu", "Tanh"} <= {row.op_type for row in found.rows}
    with pytest.raises(ModelError, match=r"no operator for If.*`onnxcam explain` follows it, a compiled model cannot"):
        compile(model, ["input"], [1], method="lrp")


# -- what the graph does to pixels first ------------------------------------------------------------------------------

SCALED = {"w": normal(4, 3, 3, 3), "v": normal(4, 3)}
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
TAIL = "c = Conv<pads=[1,1,1,1]>(n, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v)"


def scaled(front: str, signature: str = "float[N,3,9,9] x", **constants: np.ndarray) -> Model:
    return load(network(f"({signature}) => (float[N,3] y) {{ {front} {TAIL} }}", **SCALED, **constants))


COLUMN = (1, 3, 1, 1)
NORMAL = {"m": MEAN.reshape(COLUMN), "s": STD.reshape(COLUMN)}
FRONTS = [
    # Keras: Rescaling(1/255); Rescaling(1/127.5, offset=-1)
    ("n = Mul(x, k)", {"k": np.float32(1 / 255)}, 255),
    ("q = Mul(x, k) n = Sub(q, o)", {"k": np.float32(1 / 127.5), "o": np.float32(1)}, 255),
    # a ToTensor and a Normalize that were exported along
    ("q = Div(x, k) p = Sub(q, m) n = Div(p, s)", {"k": np.float32(255), **NORMAL}, 255),
    ("p = Sub(x, m) n = Div(p, s)", NORMAL, 1),
    ("q = Mul(x, k) n = Sub(q, o)", {"k": np.float32(2), "o": np.float32(1)}, 1),
    ("n = Sub(x, m)", {"m": np.float32([103.9, 116.8, 123.7]).reshape(COLUMN)}, 255),
    ("n = Add(m, x)", {"m": -np.float32([103.9, 116.8, 123.7]).reshape(COLUMN)}, 255),
    (
        "n = BatchNormalization(x, one, zero, m, s)",
        {"one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32), "m": MEAN, "s": STD**2},
        1,
    ),
    # a first BatchNormalization over what is normalised already, as in MXNet's networks: nothing to be told from it
    (
        "n = BatchNormalization(x, one, zero, zero, one)",
        {"one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32)},
        None,
    ),
    ("n = Identity(x)", {}, None),
    ("n = Relu(x)", {}, None),
]


@pytest.mark.parametrize(("front", "constants", "pixels"), FRONTS, ids=[f"{f[0]}: {f[2]}" for f in FRONTS])
def test_a_model_that_scales_its_pixels_itself_gets_them_raw(front: str, constants: dict, pixels: int | None) -> None:
    model = scaled(front, **constants)
    assert model.spec.pixels == pixels
    assert model.preprocess.name == {255: "raw", 1: "unit", None: "imagenet+crop_fraction"}[pixels]
    if pixels:
        assert f"the model itself scales what 'x' holds, from pixels 0..{pixels} on" in model.preprocess_source


def test_pixels_in_bytes_and_channels_last_are_scaled_in_the_graph() -> None:
    model = scaled(IN_BYTES, "uint8[N,9,9,3] x", **RAW | {"o": np.float32(1)})
    assert (model.spec.layout, model.spec.pixels, model.preprocess.name) == ("NHWC", 255, "raw")
    picture = Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    ours = model.explain(picture, "r", 1).maps["r"]
    plain = scaled("n = Identity(x)")
    array = (np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5) - 1
    close(ours, plain.explain(array, "r", 1).maps["r"], 1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_relevance_passes_a_scaling_unchanged(engine: str) -> None:
    """LRP shares relevance, not slopes: what reaches the scaled pixel reaches the pixel."""
    front, constants, _ = FRONTS[2]
    model = scaled(front, **constants)
    x = RNG.uniform(0, 255, (2, 3, 9, 9)).astype(np.float32)
    e = model.explain(x, ["x", "n"], 1, method="lrp", engine=engine)
    close(e.maps["x"], e.maps["n"])


IN_BYTES = "a = Cast<to=1>(x) q = Div(a, k) t = Transpose<perm=[0,3,1,2]>(q) n = Sub(t, o)"
RAW = {"k": np.float32(127.5), "o": np.float32([0.9, 1, 1.1]).reshape(COLUMN)}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_box_of_the_first_layer_is_that_of_the_scaled_pixels(engine: str) -> None:
    """Oracle: the same network with the scaling done outside, by a preset that knows the box. The range follows the
    pixels through casts, scales and transposes."""
    model, plain = scaled(IN_BYTES, "uint8[N,9,9,3] x", **RAW), scaled("n = Identity(x)")
    plain.preprocess = plain.preprocess.override(
        resize="warp", crop_fraction=0.875, scale=1 / 127.5, mean=(0.9, 1.0, 1.1), std=(1.0,)
    )
    picture = Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    options = {"method": "lrp", "composite": "epsilon_gamma_box"}
    outside = plain.explain(picture, "x", 1, engine=engine, **options).maps["x"]
    ours = model.explain(picture, "t", 1, engine=engine, **options).maps["t"]
    close(ours, outside, 1e-4)
    compiled = compile(model, ["t"], [1], **options)
    run = ort.InferenceSession(compiled.proto.SerializeToString()).run
    close(run([compiled.maps["t"]], {"x": np.asarray(picture)[None]})[0], ours)
    assert compiled.proto.ByteSize() < 60_000  # one number for each channel, not one for each pixel


def test_a_box_without_a_range_is_refused_before_compiling() -> None:
    with pytest.raises(UsageError, match="needs the range of input 'm', which only pictures have"):
        compile(two(), ["r"], [1], method="lrp", composite="epsilon_gamma_box")
    e = two().explain(IMAGES, ["m"], 1, inputs={"m": FACTS}, method="lrp", composite="epsilon_gamma_box")
    assert np.isfinite(e.maps["m"]).all()


# -- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "main", "together"),
    [
        (("N", 5), ("N", 3, 9, 9), True),
        (("M", 5), ("N", 3, 9, 9), False),
        (("unk__7", 5), ("unk__6", 3, 9, 9), True),
        ((None, 5), ("N", 3, 9, 9), True),
        ((1, 5), (1, 3, 9, 9), True),
        ((4, 5), ("N", 3, 9, 9), False),
        ((4, 5), (1, 3, 9, 9), False),
        ((), ("N", 3, 9, 9), False),
    ],
)
def test_an_input_goes_with_the_images_where_its_first_axis_counts_them(shape, main, together) -> None:
    assert InputSpec.of("a", shape, np.float32).goes_with(InputSpec.of("x", main, np.float32)) == together
