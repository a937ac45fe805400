"""A model that ONNX Runtime's optimisers have saved explains as the file that it was made from.

The oracle is onnxcam on the file before, whose maps are held against PyTorch elsewhere. What the optimiser fuses is
asserted too, so that no test passes on a file where nothing happened. Maps agree to 1e-4: both compute the same in
float32, in another order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import onnxcam
from onnxcam.errors import ModelError

IMAGE = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)


class Residual(nn.Module):
    """Convolutions with ReLU, and one whose sum with its input comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


class Squeezed(nn.Module):
    """SiLU, leaky ReLU, and a gate by squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        y = nn.functional.leaky_relu(self.conv(x), 0.1)
        y = x + y * self.gate(y.mean((2, 3), keepdim=True))
        return self.head(y.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous()
        return self.o(y.view(y.shape[0], y.shape[1], -1))


class Block(nn.Module):
    """Attention and two linear layers, each with its sum and its normalisation: before (ViT) or after it (BERT)."""

    def __init__(self, width: int, activation: nn.Module, first: bool):
        super().__init__()
        self.attention, self.first = Attention(width, 4), first
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x + self.attention(self.one(x))
            return x + self.mlp(self.two(x))
        x = self.one(self.attention(x) + x)
        return self.two(self.mlp(x) + x)


class Transformer(nn.Module):
    def __init__(self, activation: nn.Module, first: bool, blocks: int):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 16, 32))
        self.blocks = nn.Sequential(*(Block(32, activation, first) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "squeezed": Squeezed,
    "vit": lambda: Transformer(nn.GELU(), True, 2),
    "bert": lambda: Transformer(nn.GELU("tanh"), False, 1),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The path of a net's file, at an opset; each is written once."""
    folder = tmp_path_factory.mktemp("exported")

    def export(net: str, opset: int) -> Path:
        path = folder / f"{net}-{opset}.onnx"
        if not path.exists():
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    NETS[net]().eval(), torch.from_numpy(IMAGE), path, dynamo=False, opset_version=opset,
                    input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
                )  # fmt: skip
        return path

    return export


def saved(path: Path, level: str) -> Path:
    """What a session saves that optimises to that level."""
    out = path.with_name(f"{path.stem}-{level}.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def transformed(path: Path, kind: str, multi_head: bool = False) -> Path:
    """What the optimiser for transformers saves."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions(kind)
    options.use_multi_head_attention = multi_head
    model = optimizer.optimize_model(
        str(path), kind, num_heads=4, hidden_size=32, opt_level=0, optimization_options=options
    )
    out = path.with_name(f"{path.stem}-{kind}-{multi_head}.onnx")
    model.save_model_to_file(str(out))
    return out


def fused(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node if node.domain == "com.microsoft"}


def agree(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def explained(path: Path, layer: str, engine: str, **options: str) -> np.ndarray:
    (heat,) = onnxcam.load(path).explain(IMAGE, layer, 2, engine=engine, **options).maps.values()
    return np.asarray(heat)


GRADIENT = {"method": "lrp", "composite": "gradient", "start": "one-hot"}
LRP = {"method": "lrp", "composite": "epsilon_plus"}


@pytest.mark.parametrize(
    ("level", "engine"),
    [("ORT_ENABLE_BASIC", "onnx"), ("ORT_ENABLE_EXTENDED", "onnx"), ("ORT_ENABLE_EXTENDED", "numpy")],
)
@pytest.mark.parametrize(("net", "expected"), [("residual", {"FusedConv"}), ("squeezed", {"FusedConv", "QuickGelu"})])
def test_convolutional_nets_saved_by_a_session(exported, net, expected, level, engine):
    path = exported(net, 17)
    optimised = saved(path, level)
    assert fused(optimised) == (expected if level == "ORT_ENABLE_EXTENDED" else set())
    inside = onnxcam.load(path).layers()[0].tensor
    assert inside in {name for node in onnx.load(optimised).graph.node for name in node.output}
    for layer, options in ((inside, {}), ("x", GRADIENT), ("x", LRP)):
        agree(explained(optimised, layer, engine, **options), explained(path, layer, engine, **options))


@pytest.mark.parametrize(("net", "opset"), [("bert", 14), ("vit", 17)])
def test_transformers_saved_by_a_session(exported, net, opset):
    path = exported(net, opset)
    optimised = saved(path, "ORT_ENABLE_EXTENDED")
    assert "FusedMatMul" in fused(optimised)
    agree(explained(optimised, "x", "numpy", **GRADIENT), explained(path, "x", "numpy", **GRADIENT))
    for options in (GRADIENT, LRP):
        agree(explained(optimised, "x", "onnx", **options), explained(path, "x", "onnx", **options))


@pytest.mark.parametrize(
    ("net", "kind", "multi_head", "expected"),
    [
        ("vit", "vit", False, {"Attention", "SkipLayerNormalization", "BiasGelu"}),
        ("bert", "bert", False, {"Attention", "SkipLayerNormalization", "FastGelu"}),
        ("bert", "bert", True, {"MultiHeadAttention", "SkipLayerNormalization", "FastGelu"}),
    ],
)
def test_transformers_saved_by_the_optimiser_for_them(exported, net, kind, multi_head, expected):
    path = exported(net, 17)
    optimised = transformed(path, kind, multi_head)
    assert fused(optimised) == expected
    agree(explained(optimised, "x", "numpy", **GRADIENT), explained(path, "x", "numpy", **GRADIENT))
    for options in (GRADIENT, LRP):
        agree(explained(optimised, "x", "onnx", **options), explained(path, "x", "onnx", **options))


def test_fused_layers_go_by_their_names_and_so_do_the_parts_that_they_are_made_of(exported):
    path = exported("residual", 17)
    optimised = saved(path, "ORT_ENABLE_EXTENDED")
    node = next(n for n in onnx.load(optimised).graph.node if n.op_type == "FusedConv" and len(n.input) == 3)
    agree(explained(optimised, node.name, "onnx"), explained(path, node.output[0], "onnx"))
    model = onnxcam.load(optimised)
    listed = [layer.node for layer in model.layers()]
    assert node.name in listed
    for name in listed:
        assert model.resolve([name])[name].node == name


def test_a_file_laid_out_for_one_cpu_is_refused_with_the_reason():
    nodes = [
        helper.make_node("ReorderInput", ["x"], ["r"], "in", domain="com.microsoft.nchwc"),
        helper.make_node("Conv", ["r", "w"], ["c"], "conv", domain="com.microsoft.nchwc", activation="Relu"),
        helper.make_node("ReorderOutput", ["c"], ["o"], "out", domain="com.microsoft.nchwc", channels=16),
        helper.make_node("GlobalAveragePool", ["o"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["y"], "flat"),
    ]
    weight = np.ones((16, 16, 3, 3), np.float32)
    graph = helper.make_graph(
        nodes, "blocks", [helper.make_tensor_value_info("x", 1, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", 1, [1, 16])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft.nchwc", 1)]
    model = onnxcam.load(helper.make_model(graph, opset_imports=imports, ir_version=8))
    (problem,) = model.check().problems
    assert problem.node == "out"
    assert "ORT_ENABLE_EXTENDED instead of ORT_ENABLE_ALL" in problem.reason
    with pytest.raises(
        ModelError, match=r"'out': no operator for com\.microsoft\.nchwc\.ReorderOutput at opset 1: .* one CPU"
    ):
        model.explain(np.ones((1, 16, 8, 8), np.float32), "x", 0, method="lrp")


def test_an_optimised_transformer_that_was_quantised_after(exported):
    """Dynamic quantisation makes QAttention of Attention: its gradient is close to that of the float file."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = exported("bert", 17)
    optimised = transformed(path, "bert")
    quantised = optimised.with_name("quantised.onnx")
    quantization.quantize_dynamic(
        str(optimised), str(quantised), op_types_to_quantize=["Attention", "MatMul"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip
    assert {"QAttention", "FastGelu"} <= fused(quantised)
    for engine in ("numpy", "onnx"):
        got, expected = (explained(p, "x", engine, **GRADIENT) for p in (quantised, path))
        assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.99
