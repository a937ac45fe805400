"""What of onnxcam is measured: a column is a name and what it asks of `compile`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import onnxcam
from benchmarks.models import picture
from onnxcam.composites import COMPOSITES, ZENNIT_EPS, Composite
from onnxcam.rules import Epsilon

INPUT = "input"  # stands for the model's input, whatever its name


def epsilon_everywhere() -> Composite:
    """`epsilon_plus` with the epsilon rule in place of z-plus: LRP-epsilon, as captum does it."""
    base, rule = COMPOSITES["epsilon_plus"], Epsilon(ZENNIT_EPS)
    return replace(base, name="epsilon", rules={**base.rules, "linear": rule, "averaging": rule}, by_op={})


@dataclass(frozen=True)
class Column:
    """One way to compile.

    Attributes:
        title: as it stands in the table.
        layers: what `compile` gets.
        targets, batch: how many of each.
        options: more for `compile`.
        stages: for ResNets only.
    """

    title: str
    layers: tuple[str, ...]
    targets: int = 1
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: bool = False


COLUMNS = {
    "last": Column("last layer", ("auto",)),
    "stages": Column("four stages", ("-4", "-3", "-2", "-1"), stages=True),
    "suggested": Column("all suggested layers", ("suggested",)),
    "lrp-epsilon-plus": Column(
        "LRP to the input, epsilon-plus",
        (INPUT,),
        options={"method": "lrp", "start": "logit", "composite": "epsilon_plus"},
    ),
    "lrp-epsilon": Column(
        "LRP to the input, epsilon",
        (INPUT,),
        options={"method": "lrp", "start": "logit", "composite": epsilon_everywhere()},
    ),
    "batch8": Column("last layer, batch 8", ("auto",), batch=8),
    "targets5": Column("last layer, 5 targets", ("auto",), targets=5),
}


def compiled(model: onnxcam.Model, column: Column) -> onnxcam.Compiled:
    """The explanation that a column stands for, as a model."""
    layers = [model.spec.name if layer == INPUT else layer for layer in column.layers]
    return onnxcam.compile(model, layers, slots=column.targets, **column.options)


def session(model: bytes | str, threads: int = 2) -> ort.InferenceSession:
    """A session as a user would make it, with so many threads."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(model: onnx.ModelProto, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a model is run on: a random picture of `shape`, and the predicted class where targets are asked for."""
    weights = {t.name for t in model.graph.initializer}
    image, *rest = [i for i in model.graph.input if i.name not in weights]
    filled = {image.name: picture(shape)}
    for wanted in rest:  # `targets`, (N, T)
        filled[wanted.name] = np.full((shape[0], wanted.type.tensor_type.shape.dim[1].dim_value), -1, np.int64)
    return filled


def runner(model: onnx.ModelProto, shape: tuple[int, ...], threads: int = 2) -> Callable[[], list[np.ndarray]]:
    """A call that runs the model once on a random picture."""
    made, given = session(model.SerializeToString(), threads), feeds(model, shape)
    return lambda: made.run(None, given)
