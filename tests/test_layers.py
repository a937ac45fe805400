"""Which layers are listed and suggested, and what a typed name means."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest
from walking import network

import onnxcam
from onnxcam.errors import ModelError, UsageError
from onnxcam.layers import better_neighbour, module_paths
from onnxcam.methods import Method
from onnxcam.model import Model, load
from small_nets import NETS, classifier, resnet, silu
from test_taps import in_the_file

X = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)

# What shows the sum over channels of a layer's values, whatever its relevance: (T, N, H, W).
VALUES = Method("values", lambda ops, a, r: ops.sum(0 * r + a, (-3,)), "relevance_cam", "contrast", False, "")

# The last layers of each resolution through which all evidence flows and which cannot be negative; where there is none
# of these, the best there is.
EXPECTED = {
    "resnet": ["r2", "r4"],
    "mobilenet": ["r2", "r3"],
    "inception": ["joined"],
    "silu": ["seen", "s1"],
    "densenet": ["r3", "r5"],
    "unet": ["r1", "r2"],
}


def suggested(model: Model) -> list[str]:
    return [row.tensor for row in model.layers() if row.suggested]


@pytest.mark.parametrize("net", NETS)
def test_the_layers_a_user_would_expect_are_suggested(net):
    assert suggested(load(NETS[net]())) == EXPECTED[net]


def test_a_layer_is_a_node_with_the_normalisation_and_activation_behind_it():
    rows = {row.node: row for row in load(resnet()).layers()}
    assert (rows["C0"].op, rows["C0"].tensor, rows["C0"].sign) == ("Conv", "r0", "nonnegative")
    assert rows["C2"].tensor == "n2"  # an Add follows, so no activation belongs to it
    assert rows["A2"].tensor == "r2"
    assert not {"N0", "R0", "R2"} & set(rows)


def test_layers_are_numbered_in_order_with_shapes_and_stages():
    rows = load(resnet()).layers()
    assert [row.index for row in rows] == list(range(len(rows)))
    assert {(row.shape[1:], row.stage) for row in rows} == {((8, 16, 16), 1), ((16, 8, 8), 2)}


def test_a_bottleneck_is_what_all_evidence_flows_through():
    """Of the residual net: between the shortcuts, not beside them."""
    assert [row.tensor for row in load(resnet()).layers() if row.bottleneck] == ["r0", "r2", "r4"]


def test_a_sigmoid_gate_is_no_layer():
    tensors = {row.tensor for row in load(silu()).layers()}
    assert not {"g0", "g1", "gate"} & tensors


@pytest.mark.parametrize(
    "gate", ["d = Add(c, c_three=3) g = Clip(d, c_zero=0, c_six=6)", "d = Softplus(c) g = Tanh(d)"]
)
def test_the_gate_of_an_activation_spelt_out_is_not_suggested(gate):
    """Clip(x + 3) and tanh(softplus(x)) cannot be negative, but are weights: hard swish and Mish of older opsets."""
    model = load(classifier(f"c = Conv(x, w8x3x3_0, b8_0) {gate} s = Mul(c, g)", "s#8"))
    assert suggested(model) == ["s"]
    assert [row.tensor for row in model.layers()] == ["s"]


def test_an_attention_branch_is_no_layer_and_what_it_weighs_is():
    """A mask and all that leads to nothing else: relevance goes past them, so `all` must do without."""
    body = """c = Conv(x, w8x3x3_0) r = Relu(c) k = Conv(r, w4x8x1_1) rk = Relu(k) l = Conv(rk, w1x4x1_2)
              mask = Sigmoid(l) m = Mul(r, mask)"""
    model = load(classifier(body, "m#8"))
    assert [row.tensor for row in model.layers()] == ["r", "m"]
    assert list(model.explain(X, "all").maps) == ["C", "M"]
    with pytest.raises(ModelError, match="no relevance reaches layer 'rk'"):
        model.explain(X, "rk")
    assert model.explain(X, "rk", composite="gradient").maps["rk"].any()


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_tensors_with_channels_last_are_maps_by_their_right_axes(engine):
    """As inside ConvNeXt. Oracle: ONNX Runtime's values of the file, transposed by hand."""
    body = """c = Conv(x, w8x3x3_0) t = Transpose<perm=[0,2,3,1]>(c) v = Mul(t, c_two=2) e = Exp(v)
              b = Transpose<perm=[0,3,1,2]>(e) d = Conv(b, w8x8x1_1) r = Relu(d)"""
    proto = classifier(body, "r#8")
    model = load(proto)
    row = next(row for row in model.layers() if row.tensor == "e")
    assert (row.shape[1:], row.spatial) == ((14, 14, 8), (14, 14))
    ours = model.explain(X, ["e"], [0], method=VALUES, composite="gradient", engine=engine).maps["e"][:, 0]
    (expected,) = in_the_file(proto, ["e"], X)
    np.testing.assert_allclose(ours, expected.sum(-1), rtol=1e-5)


def test_attention_matrices_are_no_maps():
    """(N, heads, tokens, tokens) has the rank of a picture, and softmax is never negative."""
    body = """c = Conv<strides=[4,4]>(x, w8x3x4_0) f0 = Reshape(c, c_shape) k = Transpose<perm=[0,1,3,2]>(f0)
              q = MatMul(k, f0) a = Softmax<axis=-1>(q) v = MatMul(f0, a)"""
    proto = classifier(body, "v#2")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 2, 4, 16]), "c_shape"))
    model = load(proto)
    assert [row.tensor for row in model.layers()] == ["c"]
    with pytest.raises(UsageError, match=r"'a' .* so there is no map of it"):
        model.resolve(["a"])


@pytest.mark.parametrize("net", ["resnet", "mobilenet", "densenet", "silu"])
def test_a_tensor_asked_for_by_name_is_exactly_that_tensor(net):
    """Each tensor of the file, those that canonising folds away too; oracle: ONNX Runtime on the file, 1e-5."""
    proto = NETS[net]()
    names = [n.output[0] for n in proto.graph.node]
    spatial = [n for n, v in zip(names, in_the_file(proto, names, X), strict=True) if v.ndim == 4 and v.shape[-1] > 1]
    model = load(proto)
    for name, expected in zip(spatial, in_the_file(proto, spatial, X), strict=True):
        # By the gradient, which reaches gates as well.
        ours = model.explain(X, [name], [0], method=VALUES, composite="gradient").maps[name][:, 0]
        sums = expected.sum(1)
        np.testing.assert_allclose(ours, sums, rtol=0, atol=1e-5 * np.abs(expected).sum(1).max(), err_msg=name)


def test_folded_tensors_of_one_layer_can_be_asked_for_together():
    """The convolution's output, the normalised one and the activation differ, though one layer."""
    e = load(resnet()).explain(X, ["c0", "n0", "r0"], [0], method=VALUES)
    c0, n0, r0 = in_the_file(resnet(), ["c0", "n0", "r0"], X)
    for name, expected in (("c0", c0), ("n0", n0), ("r0", r0)):
        np.testing.assert_allclose(e.maps[name][:, 0], expected.sum(1), atol=1e-4)


# -- what a typed name means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "tensor"),
    [
        ("C0", "r0"),  # a node's name
        ("N0", "r0"),  # the normalisation in it
        ("R0", "r0"),  # the activation in it
        ("r0", "r0"),  # a tensor's name
        ("c0", "c0"),  # exactly that tensor
        ("Conv_0", "r0"),  # the first Conv of the file
        ("Conv_5", "m4"),
        ("Relu_4", "r4"),
        ("0", "r0"),  # the listing's first
        (0, "r0"),
        (3, "r2"),
        ("-1", "r4"),  # the last suggested
        (-2, "r2"),
        ("auto", "r4"),
        (" auto ", "r4"),
        ("A?2", None),
        ("A2", "r2"),
    ],
)
def test_a_layer_can_be_named_in_many_ways(typed, tensor):
    model = load(resnet())
    if tensor is None:
        with pytest.raises(UsageError, match="no layer matches"):
            model.resolve([typed])
    else:
        (layer,) = model.resolve([typed]).values()
        assert layer.tensor == tensor


def test_a_name_that_means_several_layers_reports_them_by_node():
    model = load(resnet())
    assert list(model.resolve(["C*"])) == ["C0", "C1", "C2", "C3", "C4"]
    assert list(model.resolve(["suggested"])) == ["A2", "A4"]
    assert len(model.resolve(["all"])) == len(model.layers())
    assert list(model.resolve(["A4", "auto"])) == ["A4", "auto"]


def test_a_layer_of_the_listing_can_be_passed_itself():
    model = load(resnet())
    listed = model.layers()
    assert list(model.resolve(listed).values()) == listed


def test_a_node_means_what_its_row_in_the_listing_says():
    """Also where its bias is an Add of its own, which canonising folds in."""
    body = "c = Conv(x, w8x3x3_0) b = Add(c, b8_0) r = Relu(b)"
    proto = classifier(body, "r#8")
    (bias,) = (t for t in proto.graph.initializer if t.name == "b8_0")
    bias.dims[:] = [8, 1, 1]
    (row,) = load(proto).layers()
    assert (row.node, row.tensor) == ("C", "r")
    assert load(proto).resolve(["C"])["C"].tensor == "r"
    assert load(proto).resolve(["B"])["B"].tensor == "r"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("c00", ["no layer is called 'c00'", "nearest names are", "c0"]),
        ("Conv_6", ["no layer is called 'Conv_6'"]),
        ("zzzz", ["none is like it"]),
        ("99", ["there is no layer 99", "0 to 7"]),
        ("-3", ["-1 to -2"]),
        ("y", ["'y' is the logits"]),
        ("p", ["'p' of shape (N, 16, 1, 1) has a single position"]),
        ("f", ["'f' of shape (N, 16) has no spatial axes"]),
        ("q*", ["no layer matches 'q*'"]),
        ("fc_w", ["no layer is called 'fc_w'"]),
    ],
)
def test_a_name_that_means_nothing_is_answered_with_what_there_is(typed, says):
    with pytest.raises(UsageError) as caught:
        load(resnet()).resolve([typed])
    for words in says:
        assert words in str(caught.value)


def test_a_tensor_beside_the_way_to_the_logits_is_refused():
    proto = classifier("c = Conv(x, w8x3x3_0) r = Relu(c) aside = Exp(c)", "r#8")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("aside", onnx.TensorProto.FLOAT, None))
    with pytest.raises(UsageError, match="does not lead to the logits"):
        load(proto).resolve(["aside"])


def test_unnamed_nodes_are_called_by_type_and_number():
    proto = resnet()
    for node in proto.graph.node:
        node.name = ""
    rows = load(proto).layers()
    assert [row.node for row in rows if row.suggested] == ["Add_0", "Add_1"]


def test_a_signed_layer_has_a_better_neighbour_of_its_resolution():
    rows = {row.tensor: row for row in load(resnet()).layers()}
    better = better_neighbour(rows["n4"], list(rows.values()))
    assert better is not None
    assert (better.sign, better.spatial) == ("nonnegative", rows["n4"].spatial)
    with_silu = {row.tensor: row for row in load(silu()).layers()}
    assert better_neighbour(with_silu["s1"], [with_silu["s0"]]) is None


# -- module paths --------------------------------------------------------------------------------------------------


def test_module_paths_are_read_from_names_and_from_metadata():
    scopes = {"pkg.torch.onnx.name_scopes": "['', 'layer4', 'layer4.1', 'layer4.1.conv2', 'conv2d_3']"}
    paths = module_paths(
        [("/layer4/layer4.1/conv2/Conv", {}), ("node_conv2d_3", scopes), ("Conv_3", {}), ("/Flatten", {})]
    )
    assert paths == {"/layer4/layer4.1/conv2/Conv": "layer4.1.conv2", "node_conv2d_3": "layer4.1.conv2"}
    nested = "/layers/layers.0/blocks/blocks.1/attn/Add"
    assert module_paths([(nested, {})]) == {nested: "layers.0.blocks.1.attn"}


def test_layers_of_a_torch_export_can_be_named_by_module_path():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(stage, nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the older exporter is the one whose names are paths
        torch.onnx.export(net.eval(), (torch.zeros(1, 3, 16, 16),), stream, dynamo=False, opset_version=13)
    model = onnxcam.load(stream.getvalue())
    first, second = model.layers()
    assert (first.path, second.path) == ("0.0", "1.0")
    assert model.resolve(["0"])["0"] == first  # a number is an index before it is a module
    assert model.resolve(["0.0"])["0.0"] == first
    assert model.resolve(["1"])["1"] == second
    assert model.resolve(["1.0"])["1.0"] == second
    assert model.resolve(["/1/1.0/Conv"])["/1/1.0/Conv"] == second


def test_what_relevance_does_not_come_to_is_not_suggested():
    """Pooled queries, as in Hiera and MViT, are maps that cannot be negative, and only weigh what is seen."""
    rng = np.random.default_rng(0)
    model = load(
        network(
            "(float[N,3,16,16] x) => (float[N,5] y) { c = Conv<pads=[1,1,1,1]>(x, w) h = Relu(c) "
            "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h) f = Reshape(p, fine) q = Transpose<perm=[0,2,1]>(f) "
            "k = Reshape(h, coarse) s = MatMul(q, k) a = Softmax<axis=-1>(s) v = Transpose<perm=[0,2,1]>(k) "
            "m = MatMul(a, v) t = Transpose<perm=[0,2,1]>(m) b = Reshape(t, back) r = Conv(b, u) e = Relu(r) "
            "g = GlobalAveragePool(e) l = Flatten(g) y = MatMul(l, d) }",
            w=rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
            u=rng.standard_normal((4, 4, 1, 1)).astype(np.float32) - 3,
            d=rng.standard_normal((4, 5)).astype(np.float32),
            fine=np.int64([0, 4, 64]),
            coarse=np.int64([0, 4, 256]),
            back=np.int64([0, 4, 8, 8]),
        )
    )
    assert "p" in {row.tensor for row in model.layers()}
    assert "p" not in suggested(model)
    assert set(model.explain(X, "suggested").maps)


def test_convolutions_lie_in_places_even_where_those_were_lost():
    """As behind the cosine transform of CSATv2, here a matrix that mixes all pixels."""
    rng = np.random.default_rng(0)
    model = load(
        network(
            "(float[N,3,16,16] x) => (float[N,5] y) { f = Flatten(x) m = MatMul(f, mix) i = Reshape(m, picture) "
            "c = Conv(i, w) h = Relu(c) a = GlobalAveragePool(h) l = Flatten(a) y = MatMul(l, d) }",
            mix=rng.standard_normal((768, 768)).astype(np.float32),
            w=rng.standard_normal((4, 48, 1, 1)).astype(np.float32),
            d=rng.standard_normal((4, 5)).astype(np.float32),
            picture=np.int64([0, 48, 4, 4]),
        )
    )
    assert suggested(model) == ["h"]
    assert model.explain(X, "auto").maps["auto"].shape == (2, 1, 4, 4)
