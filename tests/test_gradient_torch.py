"""The gradient composite against torch's autograd, through both exporters.

Weights are float32 to the bit, BatchNorm is merged beforehand (where a convolution stands before it), and both sides
compute in float64: so the file and the torch model are one function, which the first assertion checks. Tolerance 1e-5
is what the project promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from oracles.torch_models import (
    Trace,
    export,
    in_double,
    load_seeded,
    merge_batchnorm,
    narrow_head,
    out_of_place,
    plain_pools,
    trace,
)
from torch import nn
from torchvision import models
from walking import Walker, canonised, carry, relative

from onnxcam.composites import COMPOSITES

TOLERANCE = 1e-5
GRADIENT = COMPOSITES["gradient"]
# What the recorder records is tried on networks that differ in kind, as recording and evaluating takes seconds each.
RECORDED = ("resnet18", "googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5")
TARGETS = (3, 7)


@dataclass(frozen=True)
class Net:
    """A torchvision model, the side of its input, two modules inside it, and the opset of its dynamo export."""

    build: Callable[[], nn.Module]
    size: int
    inner: tuple[str, str]
    opset: int


NETS = {
    "alexnet": Net(lambda: narrow_head(models.alexnet(), 256), 64, ("features.4", "features.9"), 18),
    "vgg11_bn": Net(lambda: narrow_head(models.vgg11_bn(), 512 * 4), 64, ("features.10", "features.27"), 20),
    "resnet18": Net(lambda: models.resnet18(num_classes=10), 65, ("layer2", "layer4"), 18),
    "googlenet": Net(
        lambda: plain_pools(models.googlenet(num_classes=10, aux_logits=False, init_weights=False)),
        64,
        ("inception3a", "inception5b"),
        20,
    ),
    "inception_v3": Net(
        lambda: models.inception_v3(num_classes=10, aux_logits=False, init_weights=False),
        75,
        ("Mixed_5c", "Mixed_7a"),
        18,
    ),
    "densenet121": Net(lambda: models.densenet121(num_classes=10), 64, ("features.transition1", "features.norm5"), 20),
    "squeezenet1_1": Net(lambda: models.squeezenet1_1(num_classes=10), 64, ("features.4", "features.12"), 18),
    "shufflenet_v2_x0_5": Net(lambda: models.shufflenet_v2_x0_5(num_classes=10), 64, ("stage2", "stage4"), 20),
    "mobilenet_v2": Net(lambda: models.mobilenet_v2(num_classes=10), 64, ("features.6", "features.17"), 18),
    "mobilenet_v3_small": Net(lambda: models.mobilenet_v3_small(num_classes=10), 64, ("features.4", "features.12"), 20),
    "mnasnet0_5": Net(lambda: models.mnasnet0_5(num_classes=10), 64, ("layers.9", "layers.16"), 18),
    "efficientnet_b0": Net(lambda: models.efficientnet_b0(num_classes=10), 64, ("features.3", "features.7"), 20),
    "regnet_y_400mf": Net(
        lambda: models.regnet_y_400mf(num_classes=10), 64, ("trunk_output.block2", "trunk_output"), 18
    ),
}


@dataclass(frozen=True)
class Reference:
    """What torch says of one net: a trace in float64 and the gradient of one logit of each image."""

    net: Net
    model: nn.Module
    x: np.ndarray
    start: np.ndarray
    trace: Trace
    gradients: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=NETS)
def reference(request: pytest.FixtureRequest) -> Iterator[Reference]:
    net = NETS[request.param]
    model = out_of_place(merge_batchnorm(load_seeded(net.build())))
    x = np.random.default_rng(0).standard_normal((2, 3, net.size, net.size)).astype(np.float32)
    start = np.eye(10)[list(TARGETS)]
    traced = trace(in_double(model), x, net.inner)
    yield Reference(net, model, x, start, traced, traced.back(start))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_gradient_is_torchs_at_the_input_and_inside(exporter: str, reference: Reference) -> None:
    opset = 17 if exporter == "torchscript" else reference.net.opset
    graph = canonised(export(reference.model, reference.x, exporter, opset_version=opset), fold_batchnorm=False)
    every = ["input", *(name for node in graph.nodes for name in node.outputs)]
    walker = Walker(graph, every, "logits")
    values = walker.forward({"input": reference.x})
    assert relative(values["logits"], reference.trace.logits.detach().numpy()) <= 1e-9

    gradients = {"numpy": walker.back(values, reference.start[None], GRADIENT).flow.relevance}
    tensors = reference.trace.tensors(values)
    if exporter == "dynamo" and reference.net in [NETS[name] for name in RECORDED]:
        recorded = carry("onnx", graph, values, {"logits": reference.start[None]}, [*tensors.values()], GRADIENT)
        gradients["onnx"] = recorded.relevance
    for engine, found in gradients.items():
        for module, tensor in tensors.items():
            assert relative(found[tensor][0], reference.gradients[module]) <= TOLERANCE, (engine, module)
