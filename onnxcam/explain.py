"""Explain pictures: forward with taps, start at the logits, walk back, combine. The one place where it all meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onnxcam.check import no_classifier, why_no_logits
from onnxcam.composites import Composite, composite as find_composite
from onnxcam.engines.array import ArrayOps, array_ops
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Conservation, Explanation, Picture
from onnxcam.input_spec import static
from onnxcam.layers import Layer, better_neighbour
from onnxcam.methods import Method, method as find_method
from onnxcam.model import Canonical, Model, as_batches
from onnxcam.pictures import open_image
from onnxcam.propagate import needed_taps, propagate
from onnxcam.starts import Start, softmax, start as find_start
from onnxcam.taps import expose
from onnxcam.targets import Target, choose_targets

Source = str | Path | Image.Image


def explain(
    model: Model,
    images: Source | Sequence[Source] | np.ndarray,
    layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    method: str | Method = "relevance-cam",
    composite: str | Composite | None = None,
    start: str | Start | None = None,
    engine: str = "numpy",
    dtype: str = "float32",
    providers: Sequence[str] = ("cpu",),
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Where did the model look?

    Args:
        model: from `onnxcam.load`.
        images: a path, a PIL picture, or several; or an array that is the model's input as it is, (N, ...).
        layers: what `--layer` accepts: node, tensor, `OpType_N`, module path, glob, index, auto, suggested, all.
        targets: class numbers, label texts, "top3" and the like, "predicted"; by default the predicted class.
        method: how relevance and activations are combined.
        composite: which LRP rule applies where; by default the method's.
        start: relevance at the logits; by default the method's.
        engine: numpy or cupy.
        dtype: float32, or float64 with the reference evaluator's forward pass (slow; for checks).
        providers: execution providers for the forward pass, in order of preference.
        batch_size: images at a time, where the file leaves its batch open.
        progress: called with (done, total) images.

    Returns:
        Maps of shape (images, targets, *spatial) at each layer's own resolution, raw, float32.

    Raises:
        UsageError: something that was asked for does not exist or does not fit the model.
        ModelError: the model cannot be explained there; the message names the node.
    """
    if dtype not in ("float32", "float64"):
        raise UsageError(f"relevance is float32 or float64, not {dtype!r}")
    if batch_size < 1:
        raise UsageError(f"a batch holds 1 image or more, not {batch_size}")
    providers = [providers] if isinstance(providers, str) else list(providers)
    chosen = find_method(method)
    rules = find_composite(composite or chosen.composite)
    begin = find_start(start or chosen.start)
    ops = array_ops(engine, dtype)

    pictures, arrays = _inputs(model, images)
    size = tuple(arrays[0].shape[2:]) if model.spec.layout != "NHWC" else tuple(arrays[0].shape[1:3])
    if model.spec.layout is None:
        size = tuple(arrays[0].shape[1:])
    canonical = model.canonical(size)
    if reason := why_no_logits(canonical.graph, canonical.logits):
        raise ModelError(reason)
    found = model.resolve(_layers(layers), size)
    plan = _plan(model, size, found, rules, dtype, providers)
    rules = _boxed(rules, model, np.concatenate(arrays))

    parts: list[_Part] = []
    total = sum(len(a) for a in arrays)
    for part, count in as_batches(np.concatenate(arrays), batch_size, model.spec.batch):
        parts.append(_explain_batch(model, plan, part, count, targets, found, chosen, rules, begin, ops))
        if progress is not None:
            progress(sum(p.count for p in parts), total)

    return Explanation(
        model=model,
        pictures=pictures,
        layers=found,
        maps={name: np.concatenate([p.maps[name] for p in parts]) for name in found},
        targets=np.concatenate([p.targets for p in parts]),
        logits=np.concatenate([p.logits for p in parts]),
        probabilities=np.concatenate([p.probabilities for p in parts]),
        conservation=Conservation.merge([p.conservation for p in parts]),
        options={
            "method": chosen.name,
            "composite": rules.name,
            "start": begin.name,
            "engine": engine,
            "dtype": dtype,
            "providers": plan.session.providers,
            "preprocess": model.preprocess.name if pictures[0].view is not None else None,
            "targets": [str(t) for t in _listed(targets)],
        },
        warnings=_warnings(model, found, chosen, size, pictures),
    )


@dataclass(frozen=True)
class Plan:
    """What can be made before there is a picture, and is kept for the next one."""

    canonical: Canonical
    session: RuntimeSession | ReferenceSession


@dataclass(frozen=True)
class _Part:
    """The results of one batch; (count, T, ...)."""

    count: int
    maps: dict[str, np.ndarray]
    targets: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    conservation: Conservation


def _inputs(model: Model, images: Any) -> tuple[list[Picture], list[np.ndarray]]:
    """Pictures and the arrays (1, ...) made of them."""
    if isinstance(images, np.ndarray):
        return _arrays(model, images)
    listed = [images] if isinstance(images, str | Path | Image.Image) else _list("pictures", images)
    if not listed:
        raise UsageError("there is no picture to explain")
    if model.spec.layout is None:
        raise UsageError(f"{model.spec.why_no_image}; from Python, pass the input as an array")
    pictures, arrays = [], []
    for i, item in enumerate(listed):
        if not isinstance(item, str | Path | Image.Image):
            raise UsageError(f"{type(item).__name__} is no picture: give paths, PIL pictures, or one array (N, ...)")
        picture = item if isinstance(item, Image.Image) else open_image(item)
        prepared = model.preprocess.apply(picture, model.spec)
        name = f"image-{i}" if isinstance(item, Image.Image) else str(item)
        pictures.append(Picture(name, prepared.view))
        arrays.append(prepared.array)
    if len({a.shape for a in arrays}) > 1:
        raise UsageError("the pictures give inputs of different sizes: explain them one by one, or give a --size")
    return pictures, arrays


def _arrays(model: Model, array: np.ndarray) -> tuple[list[Picture], list[np.ndarray]]:
    expected = model.spec.shape
    text = f"({', '.join(str(d) if d is not None else '?' for d in expected)})"
    fits = len(array.shape) == len(expected) and all(
        static(d) in (None, n) for d, n in zip(expected[1:], array.shape[1:], strict=True)
    )
    if not fits:
        raise UsageError(f"the array has shape {array.shape}, but input {model.spec.name!r} wants {text}")
    if not len(array):
        raise UsageError("the array holds no image: its first axis is 0")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"the array holds {array.dtype}, not numbers that input {model.spec.name!r} could take")
    array = np.ascontiguousarray(array.astype(model.spec.dtype))
    return [Picture(f"array-{i}", None) for i in range(len(array))], [array]


def _plan(
    model: Model,
    size: tuple[int, ...],
    layers: dict[str, Layer],
    rules: Composite,
    dtype: str,
    providers: Sequence[str],
) -> Plan:
    tensors = list(dict.fromkeys(layer.tensor for layer in layers.values()))
    listed = {row.tensor for row in model.layers(size)}
    canonical = model.canonical(size, frozenset(tensors) - listed, rules.fold_batchnorm)
    key = ("plan", tuple(tensors), dtype, tuple(providers))
    if key not in canonical.cache:
        taps = needed_taps(canonical.graph, tensors, canonical.logits)
        exposed = expose(canonical.graph, taps)
        session = ReferenceSession(exposed, taps) if dtype == "float64" else RuntimeSession(exposed, taps, providers)
        canonical.cache[key] = Plan(canonical, session)
    plan: Plan = canonical.cache[key]
    return plan


def _boxed(rules: Composite, model: Model, array: np.ndarray) -> Composite:
    """Fill in the range of the input where a z-box rule needs it: from preprocessing, else from the data."""
    if not rules.needs_box:
        return rules
    if model.spec.layout is not None:
        return rules.with_box(*model.preprocess.bounds(model.spec))
    return rules.with_box(np.asarray(array.min()), np.asarray(array.max()))


def _explain_batch(
    model: Model,
    plan: Plan,
    array: np.ndarray,
    count: int,
    wanted: Sequence[Target] | Target | None,
    layers: dict[str, Layer],
    method: Method,
    rules: Composite,
    start: Start,
    ops: ArrayOps,
) -> _Part:
    canonical = plan.canonical
    graph, logits_name = canonical.graph, canonical.logits
    taps = plan.session.run({model.spec.name: array})
    logits = _as_rows(taps[logits_name], len(array))
    if logits is None:
        raise ModelError(no_classifier(logits_name, taps[logits_name].shape))
    if not np.isfinite(logits).all():
        raise ModelError(f"the model's logits ({logits_name!r}) are not finite on this input: check the preprocessing")
    classes = choose_targets(_listed(wanted), logits, model.labels)

    relevance = start(logits, classes).reshape(classes.shape[1], *taps[logits_name].shape)
    tensors = list(dict.fromkeys(layer.tensor for layer in layers.values()))
    constants = canonical.cache.setdefault(("constants", type(ops), str(ops.dtype)), {})
    flow = propagate(graph, taps, {logits_name: relevance}, tensors, rules, ops, constants)

    maps = {}
    for name, layer in layers.items():
        if layer.tensor not in flow.relevance:
            raise ModelError(
                f"no relevance reaches layer {name!r} by the rules of {rules.name!r}: it weighs what is seen, as a "
                "gate or a statistic does; name a layer before or behind it"
            )
        combined = method.combine(ops, ops.asarray(taps[layer.tensor]), flow.relevance[layer.tensor])
        heat = np.moveaxis(np.asarray(ops.to_host(combined)), 0, 1)[:count].astype(np.float32)
        if not np.isfinite(heat).all():
            raise ModelError(f"the map of layer {name!r} is not finite; `dtype='float64'` may tell where it overflows")
        maps[name] = heat
    at_layers = {name: flow.relevance[layer.tensor] for name, layer in layers.items()}
    return _Part(
        count,
        maps,
        classes[:count],
        logits[:count].astype(np.float32),
        _probabilities(logits, canonical.squash)[:count].astype(np.float32),
        Conservation.of(flow, relevance, at_layers, ops, count),
    )


def _as_rows(logits: np.ndarray, images: int) -> np.ndarray | None:
    """Logits as (N, K), whatever axes of length 1 the file gives them; None where they are none of a classifier."""
    if logits.ndim >= 2 and logits.shape[0] == images and logits.size == images * max(logits.shape[1:]):
        return logits.reshape(images, -1)
    return logits[None] if logits.ndim == 1 and images == 1 else None


def _probabilities(logits: np.ndarray, squash: str | None) -> np.ndarray:
    if squash in ("Sigmoid", "HardSigmoid") or logits.shape[1] == 1:
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return softmax(logits.astype(np.float64))


def _listed(targets: Sequence[Target] | Target | None) -> list[Target]:
    if targets is None:
        return ["predicted"]
    return [targets] if isinstance(targets, str | int | np.integer) else _list("targets", targets)


def _layers(layers: Any) -> list[Any]:
    listed = [layers] if isinstance(layers, str | int | np.integer | Layer) else _list("layers", layers)
    if not listed:
        raise UsageError("there is no layer to explain")
    return listed


def _list(what: str, given: Any) -> list[Any]:
    if not isinstance(given, Iterable):
        raise UsageError(f"{what}: {given!r} is neither one of them nor a list of them")
    return list(given)


def _warnings(
    model: Model, layers: dict[str, Layer], method: Method, size: tuple[int, ...], pictures: Sequence[Picture]
) -> list[str]:
    return [*_signed(model, layers, method, size), *_guessed(model, pictures)]


def _signed(model: Model, layers: dict[str, Layer], method: Method, size: tuple[int, ...]) -> Iterator[str]:
    for name, layer in layers.items():
        if not method.weighs_channels or layer.sign != "signed":
            continue
        better = better_neighbour(layer, model.layers(size))
        hint = ""
        if better:
            how = "cannot be" if better.sign == "nonnegative" else "is mostly positive"
            hint = f"; --layer {better.node} at the same resolution {how}"
        yield f"layer {name} can be negative, where channel-weighted maps mean little{hint}"


def _guessed(model: Model, pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures[0].view is not None and "guess" in model.preprocess_source:
        yield model.preprocess_source
