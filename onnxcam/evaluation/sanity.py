"""Sanity: does a method look at the model at all? Its maps while the weights are shuffled, layer by layer.

A method whose maps stay as they were when the model has forgotten everything explains the picture, not the model
(Adebayo et al. 2018). Weights are permuted, which keeps their distribution, from the logits down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods import INPUT, Method, method as find_method
from onnxcam.metrics.agreement import rank_correlation
from onnxcam.model import Model

STEPS = 4


@dataclass(frozen=True)
class Kept:
    """How much of a map is left.

    Attributes:
        method, layer: whose.
        shuffled: the part of the linear layers that were shuffled, counted from the logits.
        correlation: rank correlation of the map with that of the model as it is, mean over pictures.
    """

    method: str
    layer: str
    shuffled: float
    correlation: float


def cascade(
    model: Model,
    images: Any,
    methods: Sequence[str | Method],
    layers: Sequence[str | int] = ("suggested",),
    *,
    steps: int = STEPS,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> list[Kept]:
    """Maps of the predicted class, compared with those of models whose upper layers are shuffled.

    Args:
        model, images, layers: as for `explain`.
        methods: names or methods.
        steps: how many models are made; the last has every linear layer shuffled.
        seed: of the permutations.
        options: of methods, by name.
        progress: called with (done, total) models.

    Raises:
        UsageError: the model keeps no weights to shuffle, or as `explain`.
    """
    chosen = [find_method(m) for m in methods]
    weights = linear_weights(model)
    if not weights:
        raise UsageError("the model has no weights of linear layers that could be shuffled")
    whole = {m.name: _explained(model, images, m, layers, None, options, how) for m in chosen}
    targets = next(iter(whole.values())).targets
    found = []
    for step in range(1, steps + 1):
        count = round(len(weights) * step / steps)
        other = shuffled(model, weights[:count], seed)
        for m in chosen:
            e = _explained(other, images, m, layers, targets, options, how)
            for name, heat in whole[m.name].maps.items():
                found.append(Kept(m.name, name, count / len(weights), _correlation(heat, e.maps[name])))
        if progress is not None:
            progress(step, steps)
    return found


def _explained(
    model: Model,
    images: Any,
    method: Method,
    layers: Sequence[str | int],
    targets: np.ndarray | None,
    options: Mapping[str, Mapping[str, Any]] | None,
    how: Mapping[str, Any],
) -> Any:
    places = [INPUT] if method.at_input else list(layers)
    given = (options or {}).get(method.name)
    if targets is None:
        return model.explain(images, places, method=method, options=given, **how)
    wanted = sorted({int(c) for c in targets.ravel()})
    e = model.explain(images, places, wanted, method=method, options=given, **how)
    columns = np.array([[wanted.index(int(c)) for c in row] for row in targets])
    maps = {
        name: np.take_along_axis(heat, columns.reshape(*columns.shape, *(1,) * (heat.ndim - 2)), axis=1)
        for name, heat in e.maps.items()
    }
    return replace(e, maps=maps)


def linear_weights(model: Model) -> list[str]:
    """Names of the weights of linear nodes, those nearest to the logits first."""
    raw = model.names.raw
    kinds = {"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    found = []
    for node in reversed(raw.nodes):
        if node.op_type in kinds:
            found += [name for name in node.inputs if name in raw.constants and raw.constants[name].ndim >= 2]
    return list(dict.fromkeys(found))


def shuffled(model: Model, names: Sequence[str], seed: int = 0) -> Model:
    """The model with the entries of these weights permuted."""
    constants = model.names.raw.constants
    mixed = {}
    for k, name in enumerate(names):
        values = constants[name]
        mixed[name] = np.random.default_rng([seed, k]).permutation(values.ravel()).reshape(values.shape)
    return model.with_weights(mixed)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, mean over images and targets; a map that is constant has none with any other: 0."""
    values = []
    for one, other in zip(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]), strict=True):
        if np.ptp(one) == 0 or np.ptp(other) == 0:
            values.append(0.0)
            continue
        values.append(rank_correlation(one, other))
    return float(np.mean(values))
