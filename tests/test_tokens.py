"""Tokens, windows and channels last as maps: their form, the layers of transformers, and what is suggested there.

Two oracles. Coded pictures: each pixel says where it lies, so that what ONNX Runtime computes for a tensor of layout
ops says where each entry comes from. And PyTorch: hooks and autograd on small transformers, their tokens reshaped by
hand as users of other tools do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from walking import network

from onnxcam.engines.array import ArrayOps
from onnxcam.engines.onnx import RecorderOps, Symbol
from onnxcam.engines.session import RuntimeSession
from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.maps import Maps
from onnxcam.model import Model, load
from onnxcam.taps import expose

H, W, C, N = 8, 12, 4, 3
OPS = ArrayOps(np, "float32")


# -- forms, by coded pictures --------------------------------------------------------------------------------------


def coded(axis: int) -> np.ndarray:
    """Pictures whose pixels hold 1000 times the image's number plus their row (axis 0) or column (axis 1)."""
    pixels = np.arange((H, W)[axis], dtype=np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    numbers = 1000 * np.arange(N, dtype=np.float32).reshape(N, 1, 1, 1)
    return np.ascontiguousarray(np.broadcast_to(numbers + pixels, (N, C, H, W)))


def layout(body: str, batch: str = "N") -> onnx.ModelProto:
    """A network that moves entries about: `x` comes in, `t` is the tensor to be read. Names such as c1x2xm3 are
    constants, the vector 1, 2, -3 here; i4 is the number 4."""
    constants: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(re.findall(r"\b(?:c(?:m?\d+x?)+|i\d+)\b", body)):
        if name.startswith("i"):
            constants[name] = np.array(int(name[1:]), np.int64)
        else:
            constants[name] = np.array([int(n.replace("m", "-")) for n in name[1:].split("x")], np.int64)
    return network(f"(float[{batch},{C},{H},{W}] x) => (float t) {{ {body} }}", **constants)


# The mean over all tokens stands for a class token: it has no place either.
TOKENS = "f = Reshape(x, c0x4xm1) k = Transpose<perm=[0,2,1]>(f) token = ReduceMean<axes=[1]>(k)"
LAST = "l = Transpose<perm=[0,2,3,1]>(x)"
# Windows of 4 x 4 of a picture rolled by 2, as Swin has them.
ROLLED = f"""{LAST} a = Slice(l, c2, c8, c1) b = Slice(l, c0, c2, c1) r = Concat<axis=1>(a, b)
    d = Slice(r, c2, c12, c2) e = Slice(r, c0, c2, c2) s = Concat<axis=2>(d, e)"""
WINDOWS = """v = Reshape({0}, cm1x2x4x3x4x4) w = Transpose<perm=[0,1,3,2,4,5]>(v)"""

LAYOUTS = {
    "channels first": "t = Identity(x)",
    "channels last": "t = Transpose<perm=[0,2,3,1]>(x)",
    "tokens": f"{TOKENS} t = Identity(k)",
    "tokens behind their channels": "t = Reshape(x, c0x4xm1)",
    "tokens first": "f = Reshape(x, c0x4xm1) t = Transpose<perm=[2,0,1]>(f)",
    "class token": f"{TOKENS} t = Concat<axis=1>(token, k)",
    "class token and one at the end": f"{TOKENS} t = Concat<axis=1>(token, k, token)",
    "class token dropped": f"{TOKENS} g = Concat<axis=1>(token, k) t = Slice(g, c1, c97, c1)",
    "heads": f"{TOKENS} g = Reshape(k, c0x96x2x2) t = Transpose<perm=[0,2,1,3]>(g)",
    "heads of tokens with a class token": f"""{TOKENS} q = Concat<axis=1>(token, k) g = Reshape(q, c0x97x2x2)
        t = Transpose<perm=[0,2,1,3]>(g)""",
    "windows": f"{LAST} {WINDOWS.format('l')} t = Reshape(w, cm1x16x4)",
    "windows of a rolled picture": f"{ROLLED} {WINDOWS.format('s')} t = Reshape(w, cm1x4x4x4)",
    "rolled": f"{ROLLED} t = Identity(s)",
    "strips": f"{LAST} v = Reshape(l, cm1x2x4x12x4) w = Transpose<perm=[0,2,1,3,4]>(v) t = Reshape(w, cm1x24x4)",
    "turned": "t = Transpose<perm=[0,1,3,2]>(x)",
    "flat": f"{TOKENS} t = Reshape(k, cm1x4)",
    "gathered": f"{TOKENS} g = Concat<axis=1>(token, k) s = Slice(g, c1, c97, c1) t = Reshape(s, c0x8x12x4)",
    "upside down": "t = Slice(x, cm1, cm9, c2, cm1)",
}


def read(proto: onnx.ModelProto, *xs: np.ndarray) -> tuple[Graph, Maps, list[np.ndarray]]:
    """The graph, its maps, and the values of `t` for each of some pictures, by ONNX Runtime."""
    graph = Graph(gs.import_onnx(onnx.shape_inference.infer_shapes(proto, data_prop=True)))
    session = RuntimeSession(expose(graph, ["t"]), ["t"])
    return graph, Maps(graph, {"x": (2, 3)}), [session.run({"x": x})["t"] for x in xs]


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("batch", ["N", "3", "1"])
def test_every_cell_of_a_map_lies_where_its_pixel_does(case, batch):
    """Oracle: ONNX Runtime on pictures of coordinates; numbers come back exactly."""
    pictures = [coded(axis)[: 1 if batch == "1" else N] for axis in (0, 1)]
    _, maps, values = read(layout(LAYOUTS[case], batch), *pictures)
    form = maps.form("t")
    assert form is not None, maps.why_none("t")
    assert (form.grid, form.channels) == ((H, W), C)
    for x, value in zip(pictures, values, strict=True):
        np.testing.assert_array_equal(form.activation(OPS, value), x)
        np.testing.assert_array_equal(form.relevance(OPS, np.stack([value, -value])), np.stack([x, -x]))


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("batch", ["N", "3"])
def test_the_recorder_spreads_as_the_arrays_do(case, batch):
    """The same lines record ONNX nodes, with an axis of targets, or without where there is one."""
    x = coded(0)
    graph, maps, (value,) = read(layout(LAYOUTS[case], batch), x)
    form = maps.form("t")
    assert form is not None
    surgeon = gs.Graph(opset=17)
    dims = [n if isinstance(n, int) else "N" for n in graph.shape("t") or ()]
    one, two = gs.Variable("one", np.float32, dims), gs.Variable("two", np.float32, [2, *dims])
    surgeon.inputs = [one, two]
    ops = RecorderOps(surgeon)
    symbols = {
        "activation": form.activation(ops, Symbol(ops, one, tuple(dims))),
        "bare": form.relevance(ops, Symbol(ops, one, (1, *dims), bare=True)),
        "targets": form.relevance(ops, Symbol(ops, two, (2, *dims))),
    }
    for name, symbol in symbols.items():
        surgeon.outputs.append(gs.Variable(name, np.float32))
        surgeon.nodes.append(gs.Node("Identity", name, inputs=[symbol.tensor], outputs=surgeon.outputs[-1:]))
    session = RuntimeSession(gs.export_onnx(surgeon, do_type_check=False), list(symbols))
    out = session.run({"one": value, "two": np.stack([value, -value])})
    np.testing.assert_array_equal(out["activation"], x)
    np.testing.assert_array_equal(out["bare"], x)
    np.testing.assert_array_equal(out["targets"], np.stack([x, -x]))


def test_merged_patches_lie_in_the_middle_of_what_they_merge():
    """Swin's patch merging: four slices joined along channels, mixed by a linear map; here their mean."""
    corners = [f"h{i} = Slice(l, c{i // 2}x{i % 2}, c8x12, c1x2, c2x2)" for i in range(4)]
    body = f"{LAST} {' '.join(corners)} j = Concat<axis=3>(h0, h1, h2, h3) t = MatMul(j, mean)"
    for axis in (0, 1):
        proto = layout(body)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((16, 8), 1 / 16, np.float32), "mean"))
        x = coded(axis)
        _, maps, (value,) = read(proto, x)
        form = maps.form("t")
        assert form is not None, maps.why_none("t")
        assert form.grid == (4, 6)
        means = x[:, :1].reshape(N, 1, 4, 2, 6, 2).mean((3, 5))
        np.testing.assert_allclose(form.activation(OPS, value), np.broadcast_to(means, (N, 8, 4, 6)), rtol=1e-6)


ATTENTION = f"{TOKENS} a = MatMul(k, f) p = Softmax<axis=-1>(a) o = MatMul(p, k)"

NO_MAPS = {
    "attention matrix": (f"{TOKENS} t = MatMul(k, f)", "attention matrix"),
    "pooled": (f"{TOKENS} t = ReduceMean<axes=[1], keepdims=0>(k)", "each of its values sees many places"),
    "class token alone": (f"{TOKENS} g = Concat<axis=1>(token, k) t = Gather<axis=1>(g, i0)", "class token"),
    "each place twice": (f"{TOKENS} t = Concat<axis=1>(k, k)", "more than once"),
    "a part": (f"{LAST} t = Slice(l, c0, c4, c1)", "part of the picture"),
    "uneven": (f"{LAST} a = Slice(l, c0, c4, c1) b = Slice(l, c5, c8, c1) t = Concat<axis=1>(a, b)", "unevenly"),
    "strips": (f"{LAST} t = Slice(l, c1, c8, c1, c5)", "strips"),
    "channels against channels": (f"{TOKENS} t = MatMul(f, k)", "sees many places"),
    "images turned into tokens": ("f = Reshape(x, c4xm1x12) t = Transpose<perm=[1,0,2]>(f)", "so there is no map"),
}


@pytest.mark.parametrize("case", NO_MAPS)
def test_what_is_no_map_is_told_why(case):
    body, why = NO_MAPS[case]
    _, maps, _ = read(layout(body))
    assert maps.form("t") is None
    assert why in maps.why_none("t")


def test_what_attention_puts_out_lies_where_its_queries_do():
    """Rows of an attention matrix are queries; a field that is carried along them, not along the keys."""
    form = read(layout(ATTENTION.replace("o = ", "t = ")))[1].form("t")
    assert form is not None
    assert form.grid == (H, W)
    turned = f"{TOKENS} a = MatMul(k, f) b = Transpose<perm=[0,2,1]>(a) p = Softmax<axis=-2>(b) t = MatMul(f, p)"
    form = read(layout(turned))[1].form("t")
    assert form is not None
    assert (form.grid, form.order[1:]) == ((H, W), (1, 2))


# -- transformers, by PyTorch --------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
nn: Any = torch.nn
F: Any = torch.nn.functional
PIXELS = (24, 40)  # patches of 8: a grid of 3 x 5, so that rows and columns cannot be mixed up unnoticed
GRID = (3, 5)


class Block(nn.Module):
    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Any) -> Any:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """With a class token and a register, or with the mean over all tokens in the end."""

    def __init__(self, mean: bool = False, blocks: int = 3, width: int = 12):
        super().__init__()
        self.mean, self.prefix = mean, 0 if mean else 2
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 2, width))
        self.position = nn.Parameter(torch.randn(1, 15 + self.prefix, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Any) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if not self.mean:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.position))
        return self.head(x.mean(1) if self.mean else x[:, 0])


class Windowed(nn.Module):
    """Attention in windows of 4 x 4, the picture rolled by 2, then patches merged: the parts of Swin."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, width, 2, 2), Block(width)
        self.merge, self.norm, self.head = nn.Linear(4 * width, width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Any) -> Any:
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        r = torch.roll(x, (-2, -2), (1, 2))
        r = r.reshape(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        r = self.block(r).reshape(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(r, (2, 2), (1, 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.norm(self.merge(x)).mean((1, 2)))


def exported(make: Callable[[], Any], size: tuple[int, int], dynamic: bool, opset: int = 17) -> tuple[Any, Model]:
    from oracles.torch_models import export

    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)  # so that attention is not uniform
    free = {"dynamic_axes": {"input": {0: "N"}, "logits": {0: "N"}}} if dynamic else {}
    proto = export(net, np.zeros((2, 3, *size), np.float32), opset_version=opset, **free)
    return net, load(proto)


def gradient_cam(net: Any, module: str, x: np.ndarray, target: int, spread: Callable[[Any], Any]) -> np.ndarray:
    """The channels of a module's output weighted by the mean of the logit's gradient over the cells, in float64."""
    net = net.double()
    seen: list[Any] = []
    handle = dict(net.named_modules())[module].register_forward_hook(lambda m, i, o: seen.append(o))
    logits = net(torch.from_numpy(x).double())
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), seen[0])
    a, g = spread(seen[0].detach()), spread(gradient)
    return (g.mean((2, 3), keepdim=True) * a).sum(1).numpy()


def unprefixed(x: Any) -> Any:
    return x[:, 2:].reshape(len(x), *GRID, -1).permute(0, 3, 1, 2)


def unwindowed(x: Any) -> Any:
    n, h, w = 2, 8, 12
    x = x.reshape(n, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
    return torch.roll(x, (2, 2), (1, 2)).permute(0, 3, 1, 2)


def options(engine: str) -> dict[str, Any]:
    return {"composite": "gradient", "start": "one-hot", "engine": engine}


@pytest.fixture(scope="module", params=[False, True], ids=["batch of two", "any batch"])
def vit(request) -> tuple[Any, Model]:
    return exported(ViT, PIXELS, request.param)


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_maps_of_a_vit_are_those_of_pytorch(vit, engine):
    """Gradient-weighted channels at the suggested layer and at others, typed as module paths; relative error 1e-4."""
    net, model = vit
    x = np.random.default_rng(0).normal(size=(2, 3, *PIXELS)).astype(np.float32)
    for layer, module in (
        ("auto", "blocks.2.norm1"),
        ("blocks.1", "blocks.1"),
        ("blocks.0.norm2", "blocks.0.norm2"),
    ):
        ours = model.explain(x, [layer], [3], **options(engine)).maps[layer][:, 0]
        theirs = gradient_cam(net, module, x, 3, unprefixed)
        assert ours.shape == (2, *GRID)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), layer


def test_of_a_class_token_the_layer_before_the_last_attention_is_suggested(vit):
    """Behind it the class token alone is read: the other tokens' relevance is zero, which the walk confirms."""
    _, model = vit
    rows = model.layers()
    assert [row.path for row in rows if row.suggested] == ["blocks.2.norm1"]
    dead = [row for row in rows if not row.reaches]
    assert [row.path for row in dead] == ["blocks.2", "blocks.2.norm2", "blocks.2", "norm"]
    x = np.random.default_rng(0).normal(size=(2, 3, *PIXELS)).astype(np.float32)
    e = model.explain(x, rows, [3], **options("numpy"))
    assert {name: bool(np.any(heat)) for name, heat in e.maps.items()} == {row.node: row.reaches for row in rows}
    (warning,) = [w for w in e.warnings if dead[-1].node in w]
    assert "has no map" in warning
    assert "blocks.2/norm1" in warning


def test_a_suggested_layer_draws_no_warning_of_signs(vit):
    _, model = vit
    x = np.zeros((2, 3, *PIXELS), np.float32)
    assert not any("negative" in w for w in model.explain(x, composite="gradient").warnings)


def test_of_a_mean_over_tokens_the_last_norm_is_suggested():
    _, model = exported(lambda: ViT(mean=True, blocks=1), PIXELS, True)
    rows = model.layers()
    assert all(row.reaches for row in rows)
    assert [(row.path, row.spatial) for row in rows if row.suggested] == [("norm", GRID)]


def test_the_listing_leaves_out_what_lies_inside_attention(vit):
    """Norms and sums of three blocks, the embedding and the last norm."""
    _, model = vit
    rows = model.layers()
    assert len(rows) <= 3 * 4 + 4
    assert {row.op for row in rows} <= {"Conv", "Add", "LayerNormalization", "Concat"}
    assert all(row.spatial == GRID for row in rows)


def test_relevance_reaches_tokens_by_both_engines_alike(vit):
    """Relevance-CAM itself at a tapped layer: no outside oracle here, but two engines and a class token left out."""
    _, model = vit
    x = np.random.default_rng(0).normal(size=(2, 3, *PIXELS)).astype(np.float32)
    one, two = (model.explain(x, "auto", [3], method="lrp", engine=e).maps["auto"] for e in ("numpy", "onnx"))
    assert one.shape == (2, 1, *GRID)
    assert np.abs(one - two).max() <= 1e-4 * np.abs(one).max()


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_windows_of_a_rolled_picture_are_those_of_pytorch(engine, dynamic):
    net, model = exported(Windowed, (16, 24), dynamic)
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    for layer, spread, size in (
        ("block", unwindowed, (8, 12)),
        ("block.norm2", unwindowed, (8, 12)),
        ("norm", lambda t: t.permute(0, 3, 1, 2), (4, 6)),
    ):
        ours = model.explain(x, [layer], [1], **options(engine)).maps[layer][:, 0]
        theirs = gradient_cam(net, layer, x, 1, spread)
        assert ours.shape == (2, *size)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), layer
    assert [row.spatial for row in model.layers() if row.suggested] == [(8, 12), (4, 6)]


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize(("make", "size"), [(ViT, PIXELS), (Windowed, (16, 24))])
def test_balances_are_kept_for_each_image_wherever_a_tensor_has_its_images(engine, make, size):
    """Behind windows, and behind query, key and value. Oracle: the images one by one; 1e-4 of what a node received, as
    matrix products of other sizes round otherwise."""
    _, model = exported(make, size, True)
    x = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    layer = model.layers()[0]
    both = model.explain(x, [layer], [1], method="lrp", engine=engine).conservation
    alone = [model.explain(x[i : i + 1], [layer], [1], method="lrp", engine=engine).conservation for i in (0, 1)]
    assert len(both.nodes) > 20
    for i, one in enumerate(alone):
        for ours, theirs in zip(both.nodes, one.nodes, strict=True):
            assert ours.received.shape == (2, 1), ours.node
            np.testing.assert_allclose(ours.magnitude[i], theirs.magnitude[0], rtol=1e-3, err_msg=ours.node)
            difference = np.abs(ours.received[i] - theirs.received[0])
            assert difference <= 1e-4 * theirs.magnitude[0] + 1e-30, ours.node


def test_a_tensor_inside_attention_is_a_map_when_it_is_named(vit):
    """Heads apart, and refused where it is a matrix of places with places."""
    _, model = vit
    values = [n for n in model.canonical().graph.nodes if n.op_type == "MatMul" and "blocks.1/MatMul_1" in n.name]
    x = np.zeros((2, 3, *PIXELS), np.float32)
    assert model.explain(x, [values[0].outputs[0]], [0], engine="numpy").maps[values[0].outputs[0]].shape[2:] == GRID
    with pytest.raises(UsageError, match="attention matrix"):
        model.resolve([values[0].inputs[0]])


# -- signals and volumes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20,), (6, 7, 8)])
def test_signals_and_volumes_have_maps_of_their_own_rank(size):
    """Tokens of a signal and of a volume: flattened, weighed channel by channel, one place left out."""
    rng = np.random.default_rng(0)
    cells = int(np.prod(size))
    w = rng.normal(size=(4, 2, *(1,) * len(size))).astype(np.float32)
    dims = ",".join(map(str, size))
    proto = network(
        f"""(float[N,2,{dims}] x) => (float[N,3] y) {{ c = Conv(x, w) f = Reshape(c, flat)
        k = Transpose<perm=[0,2,1]>(f) m = MatMul(k, v) r = Relu(m)
        p = ReduceMean<axes=[1], keepdims=0>(r) y = MatMul(p, u) }}""",
        w=w, flat=np.array([0, 4, -1]), v=rng.normal(size=(4, 5)).astype(np.float32),
        u=rng.normal(size=(5, 3)).astype(np.float32),
    )  # fmt: skip
    model = load(proto)
    (row,) = [row for row in model.layers() if row.suggested]
    assert (row.tensor, row.shape[1:], row.spatial) == ("r", (cells, 5), size)
    x = rng.normal(size=(2, 2, *size)).astype(np.float32)
    e = model.explain(x, ["auto"], [0], method="lrp")
    assert e.maps["auto"].shape == (2, 1, *size)
    with pytest.raises(UsageError, match="no picture"):
        e.overlay()
