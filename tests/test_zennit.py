"""Composites against zennit 0.5.1, and the epsilon rule against captum, both in PyTorch and float64.

BatchNorm is merged into the convolutions beforehand and rounded to float32 (oracles/torch_models.py), because zennit
0.5.1 keeps the epsilon of the BatchNorm it has merged: so both sides see one and the same function. Tolerance 1e-5 is
what the project promises; both sides compute in float64 and agree far better. That holds for both engines: what the
recorder records is computed in float64 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import zennit.composites
import zennit.rules
from captum.attr import LRP
from captum.attr._utils.lrp_rules import EpsilonRule
from oracles.torch_models import export, load_seeded, merge_batchnorm, narrow_head, out_of_place, trace
from torch import nn
from torchvision import models
from walking import ENGINES, Walker, as_written, canonised, carry, relative
from zennit.torchvision import ResNetCanonizer
from zennit.types import Convolution

from onnxcam.composites import COMPOSITES
from onnxcam.rules import Epsilon, Flat, WSquare
from onnxcam.starts import STARTS

TOLERANCE = 1e-5
TARGETS = np.array([[3], [7]])
LOW, HIGH = -5.0, 5.0


class AveragePooling(nn.Sequential):
    """Strided, overlapping and padded average pooling, which the torchvision models do not have."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, 1),
            nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4),
            nn.BatchNorm2d(12),
            nn.LeakyReLU(0.125),
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(12, 16, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )


@dataclass(frozen=True)
class Case:
    """A model both sides know, its input, and the modules whose outputs are compared beside the input."""

    model: nn.Module
    x: np.ndarray
    inner: tuple[str, ...]
    walker: Walker
    tensors: dict[str, str]  # module -> tensor of the file
    values: dict[str, np.ndarray]

    def start(self) -> np.ndarray:
        return STARTS["contrast"](self.values["logits"], TARGETS)


BUILD = {
    "resnet18": (lambda: models.resnet18(num_classes=10), 64, ("layer1", "layer3")),
    "vgg11_bn": (lambda: narrow_head(models.vgg11_bn(), 512 * 2 * 2), 64, ("features.7", "features.20")),
    "average pooling": (AveragePooling, 49, ("2", "7")),
}


@pytest.fixture(scope="module", params=BUILD)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    build, size, inner = BUILD[request.param]
    model = out_of_place(merge_batchnorm(load_seeded(build())))
    x = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    graph = canonised(export(model, x))
    every = [name for node in graph.nodes for name in node.outputs]
    values = Walker(graph, ["input", *every], "logits").forward({"input": x})
    tensors = trace(model.double(), x, inner).tensors(values)
    yield Case(model, x, inner, Walker(graph, list(tensors.values()), "logits"), tensors, values)


def theirs(case: Case, composite: zennit.core.Composite) -> dict[str, np.ndarray]:
    """zennit's relevance, (1, *tensor.shape): what autograd finds in the place of gradients while its hooks are on."""
    with composite.context(case.model) as model:
        relevance = trace(model, case.x, case.inner).back(case.start()[0])
    return {module: r[None] for module, r in relevance.items()}


def first(rule: zennit.core.Hook) -> zennit.core.Composite:
    """zennit's EpsilonPlus with another rule for the first convolution."""
    return zennit.composites.SpecialFirstLayerMapComposite(
        layer_map=[
            *zennit.composites.layer_map_base(),
            (Convolution, zennit.rules.ZPlus()),
            (nn.Linear, zennit.rules.Epsilon()),
        ],
        first_map=[(Convolution, rule)],
        canonizers=[ResNetCanonizer()],
    )


# Name -> ours, zennit's. Biases of the first rules as zennit has them: w-square adds b^2, flat has none.
PAIRS = {
    "EpsilonPlus": (
        COMPOSITES["epsilon_plus"],
        lambda: zennit.composites.EpsilonPlus(canonizers=[ResNetCanonizer()]),
    ),
    "EpsilonAlpha2Beta1": (
        COMPOSITES["epsilon_alpha2_beta1"],
        lambda: zennit.composites.EpsilonAlpha2Beta1(canonizers=[ResNetCanonizer()]),
    ),
    "EpsilonGammaBox": (
        COMPOSITES["epsilon_gamma_box"].with_box(np.array(LOW), np.array(HIGH)),
        lambda: zennit.composites.EpsilonGammaBox(low=LOW, high=HIGH, canonizers=[ResNetCanonizer()]),
    ),
    "EpsilonPlusFlat": (
        replace(COMPOSITES["epsilon_plus"], first=Flat(eps=1e-6)),
        lambda: zennit.composites.EpsilonPlusFlat(canonizers=[ResNetCanonizer()]),
    ),
    "EpsilonAlpha2Beta1Flat": (
        replace(COMPOSITES["epsilon_alpha2_beta1"], first=Flat(eps=1e-6)),
        lambda: zennit.composites.EpsilonAlpha2Beta1Flat(canonizers=[ResNetCanonizer()]),
    ),
    "EpsilonPlus, w-square first": (
        replace(COMPOSITES["epsilon_plus"], first=WSquare("absorb", 1e-6)),
        lambda: first(zennit.rules.WSquare()),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_composite_gives_zennits_relevance_at_the_input_and_inside(
    within: Callable[..., None], name: str, case: Case
) -> None:
    mine, build = PAIRS[name]
    reference, starts = theirs(case, build()), {"logits": case.start()}
    for engine in ENGINES:
        got = carry(engine, case.walker.graph, case.values, starts, list(case.tensors.values()), mine).relevance
        for module, r in reference.items():
            within("lrp", "zennit", got[case.tensors[module]], r, TOLERANCE)


def test_the_file_and_the_torch_model_are_one_function(case: Case) -> None:
    """Without this the comparison would mean nothing; float64 on both sides."""
    assert relative(case.values["logits"], trace(case.model, case.x, ()).logits.detach().numpy()) <= 1e-9


@pytest.mark.parametrize("engine", ENGINES)
def test_epsilon_everywhere_gives_captums_relevance(engine: str) -> None:
    """captum's other rules differ from zennit's by definition (spec 2.1). Its start is the logit of the target."""
    model = out_of_place(
        load_seeded(
            nn.Sequential(
                nn.Conv2d(3, 6, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 8, 3, groups=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 10),
            )
        )
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 21, 21)).astype(np.float32)
    walker = Walker(as_written(export(model, x)), ["input"], "logits", engine=engine)
    epsilon = replace(
        COMPOSITES["epsilon_plus"],
        rules=dict(COMPOSITES["epsilon_plus"].rules) | {"linear": Epsilon(1e-9), "averaging": Epsilon(1e-9)},
        by_op={},
    )
    values = walker.forward({"input": x})
    ours = walker.back(values, STARTS["logit"](values["logits"], TARGETS), epsilon)["input"][0]
    for module in model:
        module.rule = EpsilonRule(epsilon=1e-9)
    reference = LRP(model.double()).attribute(torch.from_numpy(x).double(), target=torch.from_numpy(TARGETS[:, 0]))
    assert relative(ours, reference.detach().numpy()) <= TOLERANCE
