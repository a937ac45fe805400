"""Explain pictures: forward with taps, start at the logits, walk back, combine. The one place where it all meets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onnxcam.check import why_no_logits
from onnxcam.compile import classes_in
from onnxcam.composites import Composite, composite as find_composite
from onnxcam.engines.array import array_ops
from onnxcam.engines.session import ProviderLike, Settings
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Conservation, Explanation, Picture
from onnxcam.input_spec import static
from onnxcam.layers import Layer, better_neighbour
from onnxcam.methods import Method, method as find_method
from onnxcam.model import Model, filled
from onnxcam.pictures import open_image
from onnxcam.preprocess import Prepared
from onnxcam.runners import ArrayRunner, Batch, Job, RecordedRunner, Runner
from onnxcam.starts import Start, softmax, start as find_start
from onnxcam.targets import Target, target_codes

Source = str | Path | Image.Image
ENGINES = ("onnx", "numpy", "cupy")


def explain(
    model: Model,
    images: Source | Sequence[Source] | np.ndarray,
    layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    method: str | Method = "relevance-cam",
    composite: str | Composite | None = None,
    start: str | Start | None = None,
    engine: str | None = None,
    dtype: str = "float32",
    providers: ProviderLike | Sequence[ProviderLike] = "cpu",
    threads: int | None = None,
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
        engine: onnx (the explanation as one recorded ONNX model), or numpy or cupy (the walk over arrays); by default
            onnx, and numpy for float64.
        dtype: float32; float64 with an array engine and the reference evaluator's forward pass (slow; for checks).
        providers: execution providers of ONNX Runtime, in order of preference: cpu, cuda, cuda:1, auto, full names,
            or (name, options). One that is not to be had is passed over, and a warning says so.
        threads: threads within one op; by default as many as ONNX Runtime likes.
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
    settings = Settings.of(providers, threads)
    chosen = find_method(method)
    rules = find_composite(composite or chosen.composite)
    begin = find_start(start or chosen.start)
    engine = engine or ("onnx" if dtype == "float32" else "numpy")
    if engine not in ENGINES:
        raise UsageError(f"no engine named {engine!r}: there are {', '.join(ENGINES)}")
    if engine == "onnx" and dtype != "float32":
        raise UsageError(f"engine onnx computes in float32; {dtype} needs engine numpy")

    pictures, inputs = _inputs(model, images)
    first = inputs(0, 1)
    size = _size(model, first.shape)
    canonical = model.canonical(size)
    if reason := why_no_logits(canonical.graph, canonical.logits):
        raise ModelError(reason)
    found = model.resolve(_layers(layers), size)
    if rules.needs_box:
        rules = _boxed(rules, model, inputs)
    runner = _runner(model, size, found, chosen, rules, begin, engine, dtype, settings)
    codes = target_codes(_listed(targets), classes_in(canonical), model.labels)

    parts: list[Batch] = []
    step = model.spec.batch or batch_size
    for begun in range(0, len(pictures), step):
        part = inputs(begun, begun + step)
        parts.append(runner.run(filled(part, model.spec.batch), codes).first(len(part)))
        if progress is not None:
            progress(begun + len(part), len(pictures))
    logits = np.concatenate([p.logits for p in parts])
    maps = {name: np.concatenate([p.maps[name] for p in parts]) for name in found}
    for name, heat in maps.items():
        if not np.isfinite(heat).all():
            raise ModelError(
                f"the map of layer {name!r} is not finite; engine numpy with float64 may tell where it overflows"
            )

    return Explanation(
        model=model,
        pictures=pictures,
        layers=found,
        maps=maps,
        targets=np.concatenate([p.targets for p in parts]),
        logits=logits.astype(np.float32),
        probabilities=_probabilities(logits, canonical.squash).astype(np.float32),
        conservation=Conservation.merge([p.conservation for p in parts]),
        options={
            "method": chosen.name,
            "composite": rules.name,
            "start": begin.name,
            "engine": engine,
            "dtype": dtype,
            "providers": runner.providers,
            "threads": threads,
            "preprocess": model.preprocess.name if pictures[0].drawable else None,
            "targets": [str(t) for t in _listed(targets)],
        },
        warnings=[
            *_signed(model, found, chosen, size),
            *_guessed(model, pictures),
            *_mislabelled(model, logits.shape[1]),
            *_folded_already(model, rules),
            *runner.notes,
        ],
    )


Inputs = Callable[[int, int], np.ndarray]  # (start, stop) -> that part of the model's input, (stop - start, ...)


def _inputs(model: Model, images: Any) -> tuple[list[Picture], Inputs]:
    """Pictures, and what makes the model's input of some of them; each is opened only when its turn comes."""
    if isinstance(images, np.ndarray):
        return _arrays(model, images)
    listed = [images] if isinstance(images, str | Path | Image.Image) else _list("pictures", images)
    if not listed:
        raise UsageError("there is no picture to explain")
    if model.spec.layout is None:
        raise UsageError(f"{model.spec.why_no_image}; from Python, pass the input as an array")
    preprocess, spec = model.preprocess, model.spec

    @lru_cache(maxsize=1)  # a single picture is wanted three times: for its size, to be explained, to be drawn on
    def prepare(i: int) -> Prepared:
        item = listed[i]
        return preprocess.apply(item if isinstance(item, Image.Image) else open_image(item), spec)

    pictures = []
    for i, item in enumerate(listed):
        if not isinstance(item, str | Path | Image.Image):
            raise UsageError(f"{type(item).__name__} is no picture: give paths, PIL pictures, or one array (N, ...)")
        name = f"image-{i}" if isinstance(item, Image.Image) else str(item)
        pictures.append(Picture(name, partial(prepare, i)))

    shapes: set[tuple[int, ...]] = set()

    def inputs(start: int, stop: int) -> np.ndarray:
        arrays = [prepare(i).array for i in range(start, min(stop, len(listed)))]
        shapes.update(a.shape for a in arrays)
        if len(shapes) > 1:
            raise UsageError("the pictures give inputs of different sizes: explain them one by one, or give a --size")
        return np.concatenate(arrays)

    return pictures, inputs


def _size(model: Model, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial part of an input's shape; all but the batch where the input is no image."""
    return {"NCHW": shape[2:], "NHWC": shape[1:3]}.get(model.spec.layout or "", shape[1:])


def _arrays(model: Model, array: np.ndarray) -> tuple[list[Picture], Inputs]:
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
    return [Picture(f"array-{i}") for i in range(len(array))], lambda start, stop: array[start:stop]


def _runner(
    model: Model,
    size: tuple[int, ...],
    layers: dict[str, Layer],
    method: Method,
    rules: Composite,
    start: Start,
    engine: str,
    dtype: str,
    settings: Settings,
) -> Runner:
    tensors = {layer.tensor for layer in layers.values()}
    listed = {row.tensor for row in model.layers(size)}
    canonical = model.canonical(size, frozenset(tensors - listed), rules.fold_batchnorm)
    job = Job(canonical, model.spec.name, layers, method, rules, start)
    if engine == "onnx":
        return RecordedRunner(job, settings, model.disk, model.content if model.disk else "")
    return ArrayRunner(job, array_ops(engine, dtype), dtype, settings)


def _boxed(rules: Composite, model: Model, inputs: Inputs) -> Composite:
    """Fill in the range of the input that a z-box rule needs: from preprocessing, else from the data."""
    if model.spec.layout is not None:
        return rules.with_box(*model.preprocess.bounds(model.spec))
    whole = inputs(0, sys.maxsize)
    return rules.with_box(np.asarray(whole.min()), np.asarray(whole.max()))


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
    if pictures[0].drawable and "guess" in model.preprocess_source:
        yield model.preprocess_source


def _mislabelled(model: Model, classes: int) -> Iterator[str]:
    if warning := model.labels.mismatch(max(classes, 2)):
        yield warning


def _folded_already(model: Model, rules: Composite) -> Iterator[str]:
    """Rules that want BatchNormalization kept do not mean the same where an exporter has folded it (spec 1.4)."""
    if not rules.fold_batchnorm and not any(n.op_type == "BatchNormalization" for n in model.names.raw.nodes):
        yield (
            f"composite {rules.name} is for files that keep their BatchNormalization and this one has none: where the "
            "exporter folded it, the biases are not what these rules take them for; relevance_cam is right there"
        )
