"""Explain pictures: forward with taps, start at the logits, walk back, combine. The one place where it all meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from onnxcam.box import boxed
from onnxcam.check import why_no_logits
from onnxcam.compile import classes_in
from onnxcam.composites import Composite, composite as find_composite, suited
from onnxcam.conditions import branches_taken, open_branches
from onnxcam.engines.array import array_ops
from onnxcam.engines.session import ProviderLike, Settings
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Conservation, Explanation, Picture
from onnxcam.feeds import Arrays, Feeds, Source, as_list, feeds as find_feeds
from onnxcam.input_spec import Given
from onnxcam.layers import Layer, better_neighbour
from onnxcam.methods import Method, method as find_method
from onnxcam.model import Canonical, Model
from onnxcam.runners import ArrayRunner, Batch, Job, RecordedRunner, Runner
from onnxcam.starts import SIGMOIDS, Start, softmax, start as find_start
from onnxcam.targets import Target, target_codes

ENGINES = ("onnx", "numpy", "cupy")


def explain(
    model: Model,
    images: Source | Sequence[Source] | np.ndarray | Mapping[str, np.ndarray] | None = None,
    layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    method: str | Method = "relevance-cam",
    composite: str | Composite | None = None,
    start: str | Start | None = None,
    attention: str | None = None,
    engine: str | None = None,
    dtype: str = "float32",
    providers: ProviderLike | Sequence[ProviderLike] = "cpu",
    threads: int | None = None,
    batch_size: int = 8,
    inputs: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Where did the model look?

    Args:
        model: from `onnxcam.load`.
        images: a path, a PIL picture, or several; or an array that is the model's input as it is, (N, ...); or arrays
            by the names of several inputs.
        layers: what `--layer` accepts: node, tensor, `OpType_N`, module path, glob, index, auto, suggested, all, input.
        targets: class numbers, label texts, "top3" and the like, "predicted"; by default the predicted class.
        method: how relevance and activations are combined.
        composite: which LRP rule applies where; by default the method's.
        start: relevance at the logits; by default the method's.
        attention: "cp" (relevance passes attention to the values alone, the default) or "attnlrp" (to queries and keys
            as well).
        engine: onnx (the explanation as one recorded ONNX model), or numpy or cupy (the walk over arrays); by default
            onnx, and numpy for float64.
        dtype: float32; float64 with an array engine and the reference evaluator's forward pass (slow; for checks).
        providers: execution providers of ONNX Runtime, in order of preference: cpu, cuda, cuda:1, auto, full names,
            or (name, options). One that is not to be had is passed over, and a warning says so.
        threads: threads within one op; by default as many as ONNX Runtime likes.
        batch_size: images at a time, where the file leaves its batch open.
        inputs: arrays for the model's other inputs, by name: with a row for each image, or one that holds for all.
        progress: called with (done, total) images.

    Returns:
        Maps of shape (images, targets, *spatial) at each layer's own resolution, raw, float32; for a layer of features
        (N, F), which `lrp` explains, of shape (images, targets, F).

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
    begin = find_start(start or chosen.start)
    engine = engine or ("onnx" if dtype == "float32" else "numpy")
    if engine not in ENGINES:
        raise UsageError(f"no engine named {engine!r}: there are {', '.join(ENGINES)}")
    if engine == "onnx" and dtype != "float32":
        raise UsageError(f"engine onnx computes in float32; {dtype} needs engine numpy")

    feeds = find_feeds(model, images, inputs)
    rules = find_composite(composite) if composite else suited(chosen.composite, model.canonical(feeds.given).graph)
    rules = rules.with_attention(attention)
    plans = _Plans(model, feeds, _layers(layers), chosen, rules, begin, engine, dtype, settings)
    first = plans.at(0, 1)
    codes = target_codes(_listed(targets), classes_in(first.canonical), model.labels)

    pictures, canonical, found, runner = feeds.pictures, first.canonical, first.layers, first.runner
    parts: list[Batch] = []
    # A condition may hold for one image of a batch and not for another.
    step = model.spec.batch or (1 if plans.branching else batch_size)
    for begun in range(0, len(pictures), step):
        stop = min(begun + step, len(pictures))
        plan = plans.at(begun, stop)
        part = plan.runner.run(feeds.filled(begun, stop, model), codes).first(stop - begun)
        if parts and _sizes(part) != _sizes(parts[0]):
            raise UsageError(
                f"{pictures[begun].name} takes another branch of the model than {pictures[0].name}, with maps of other "
                "sizes: explain them one by one"
            )
        parts.append(part)
        if progress is not None:
            progress(stop, len(pictures))
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
            "attention": rules.attention,
            "start": begin.name,
            "engine": engine,
            "dtype": dtype,
            "providers": runner.providers,
            "threads": threads,
            "preprocess": model.preprocess.name if pictures[0].drawable else None,
            "targets": [str(t) for t in _listed(targets)],
        },
        warnings=[
            *feeds.notes,
            *_unread(model, found, first.given),
            *_signed(model, found, chosen, first.given),
            *_guessed(model, pictures),
            *_mislabelled(model, logits.shape[1]),
            *_folded_already(model, rules),
            *runner.notes,
        ],
    )


@dataclass(frozen=True)
class _Plan:
    """A graph, the layers in it, and who runs it."""

    given: Given
    canonical: Canonical
    layers: dict[str, Layer]
    runner: Runner


@dataclass
class _Plans:
    """A plan for each way through the graph that an input takes: one, but for files with conditions."""

    model: Model
    feeds: Feeds
    typed: Sequence[Any]
    method: Method
    rules: Composite
    start: Start
    engine: str
    dtype: str
    settings: Settings
    _made: dict[Given, _Plan] = field(default_factory=dict)

    @cached_property
    def branching(self) -> bool:
        return bool(open_branches(self.model.canonical(self.feeds.given).graph))

    def at(self, start: int, stop: int) -> _Plan:
        """The plan for the images from `start` to `stop`."""
        given = self.feeds.given
        if self.branching:
            given = branches_taken(self.model, given, self.feeds.filled(start, stop, self.model))
        if given not in self._made:
            self._made[given] = self._make(given)
        return self._made[given]

    def _make(self, given: Given) -> _Plan:
        model = self.model
        plain = model.canonical(given)
        if reason := why_no_logits(plain.graph, plain.logits):
            raise ModelError(reason)
        layers = model.resolve(self.typed, given, self.method.vectors)
        self.method.require(plain.graph, layers, plain.logits)
        tensors = {layer.tensor for layer in layers.values()}
        listed = {row.tensor for row in model.layers(given)}
        canonical = model.canonical(given, frozenset(tensors - listed), self.rules.fold_batchnorm)
        rules = boxed(self.rules, canonical, *self._ranges()) if self.rules.needs_box else self.rules
        job = Job(canonical, model.spec.name, layers, self.method, rules, self.start)
        runner: Runner
        if self.engine == "onnx":
            runner = RecordedRunner(job, self.settings, model.disk, model.content if model.disk else "")
        else:
            runner = ArrayRunner(job, array_ops(self.engine, self.dtype), self.dtype, self.settings)
        return _Plan(given, canonical, layers, runner)

    def _ranges(self) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Arrays]:
        """The range of each input, from preprocessing or else from the data, and one batch of them all."""
        model, whole = self.model, self.feeds.filled(0, 1, self.model)
        ranges = {}
        for name in whole:
            if name == model.spec.name and model.spec.layout is not None:
                ranges[name] = model.preprocess.bounds(model.spec)
            else:
                data = self.feeds.batch(0, len(self.feeds.pictures))[name]
                ranges[name] = np.asarray(data.min()), np.asarray(data.max())
        return ranges, whole


def _sizes(part: Batch) -> dict[str, tuple[int, ...]]:
    return {name: heat.shape[2:] for name, heat in part.maps.items()}


def _probabilities(logits: np.ndarray, squash: str | None) -> np.ndarray:
    if squash in SIGMOIDS or logits.shape[1] == 1:
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return softmax(logits.astype(np.float64))


def _listed(targets: Sequence[Target] | Target | None) -> list[Target]:
    if targets is None:
        return ["predicted"]
    return [targets] if isinstance(targets, str | int | np.integer) else as_list("targets", targets)


def _layers(layers: Any) -> list[Any]:
    listed = [layers] if isinstance(layers, str | int | np.integer | Layer) else as_list("layers", layers)
    if not listed:
        raise UsageError("there is no layer to explain")
    return listed


def _signed(model: Model, layers: dict[str, Layer], method: Method, given: Given) -> Iterator[str]:
    for name, layer in layers.items():
        if not method.weighs_channels or layer.sign != "signed" or layer.suggested or not layer.reaches:
            continue
        better = better_neighbour(layer, model.layers(given))
        hint = ""
        if better:
            how = "cannot be" if better.sign == "nonnegative" else "is mostly positive"
            hint = f"; --layer {better.node} at the same resolution {how}"
        yield f"layer {name} can be negative, where channel-weighted maps mean little{hint}"


def _unread(model: Model, layers: dict[str, Layer], given: Given) -> Iterator[str]:
    for name, layer in layers.items():
        if not layer.reaches:
            read = [row for row in model.layers(given) if row.suggested and row.spatial == layer.spatial]
            hint = f"; --layer {read[-1].node} is the last that has one" if read else ""
            yield f"layer {name} has no map: from there on only the class token leads to the logits{hint}"


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
