"""Explain pictures: forward with taps, start at the logits, walk back, combine. The one place where it all meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from onnxcam.box import boxed
from onnxcam.check import why_no_logits
from onnxcam.compile import classes_in
from onnxcam.composites import Composite, composite as find_composite, suited
from onnxcam.conditions import branches_taken, open_branches
from onnxcam.engines.session import ProviderLike, Settings
from onnxcam.errors import ModelError, NotFiniteError, OpenBatchError, UsageError
from onnxcam.explanation import Conservation, Explanation, Picture
from onnxcam.feeds import Arrays, Feeds, Source, as_list, feeds as find_feeds
from onnxcam.input_spec import Given
from onnxcam.layers import Layer, better_neighbour
from onnxcam.means import Means, probabilities
from onnxcam.methods import INPUT, Method, method as find_method
from onnxcam.model import Canonical, Model
from onnxcam.runners import Batch, Job, Runner
from onnxcam.starts import Start, start as find_start
from onnxcam.targets import Target, target_codes

ENGINES = ("onnx", "numpy", "cupy")


def explain(
    model: Model,
    images: Source | Sequence[Source] | np.ndarray | Mapping[str, np.ndarray] | None = None,
    layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    method: str | Method = "relevance-cam",
    options: Mapping[str, Any] | None = None,
    concepts: Mapping[str | int, Sequence[int]] | None = None,
    composite: str | Composite | None = None,
    start: str | Start | None = None,
    attention: str | None = None,
    engine: str | None = None,
    dtype: str = "float32",
    providers: ProviderLike | Sequence[ProviderLike] = "cpu",
    threads: int | None = None,
    batch_size: int = 8,
    inputs: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[float, int], None] | None = None,
) -> Explanation:
    """Where did the model look?

    Args:
        model: from `onnxcam.load`.
        images: a path, a PIL picture, or several; or an array that is the model's input as it is, (N, ...); or arrays
            by the names of several inputs.
        layers: what `--layer` accepts: node, tensor, `OpType_N`, module path, glob, index, auto, suggested, all, input.
        targets: class numbers, label texts, "top3" and the like, "predicted"; by default the predicted class.
        method: how relevance and activations are combined; `METHODS` has them all.
        options: of the method, by name: how many samples, say.
        concepts: channels by layer: relevance goes through these only (concept-conditional relevance, Achtibat 2023).
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
        progress: called with (done, total) images; a part of an image, too, where one takes many passes.

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
    chosen = find_method(method).with_options(options or {})
    begin = find_start(start or chosen.start)
    engine = engine or ("onnx" if dtype == "float32" else "numpy")
    if engine not in ENGINES:
        raise UsageError(f"no engine named {engine!r}: there are {', '.join(ENGINES)}")
    if engine == "onnx" and dtype != "float32":
        raise UsageError(f"engine onnx computes in float32; {dtype} needs engine numpy")

    feeds = find_feeds(model, images, inputs)
    whole = model.canonical(feeds.given)
    rules = find_composite(composite) if composite else suited(chosen.composite, whole.graph, whole.logits)
    rules = rules.with_attention(attention)
    if concepts and not chosen.walks:
        raise UsageError(
            f"method {chosen.name} carries no relevance that could be kept to channels: leave concepts out"
        )
    typed = chosen.places(_layers(layers), model)
    share = _Share()
    plans = _Plans(
        model, feeds, typed, chosen, rules, begin, engine, dtype, settings, dict(concepts or {}), batch_size, share.tell
    )
    alone = whole.cache.setdefault("one by one", set())
    key = (chosen.name, rules.name, str(typed), engine)
    try:
        first, parts = _run(plans.one_by_one() if key in alone else plans, targets, share, progress)
    except OpenBatchError:
        if model.spec.batch is not None or key in alone:
            raise
        alone.add(key)  # so that the next call does not try in vain
        first, parts = _run(plans.one_by_one(), targets, share, progress)
    pictures, canonical, found, runner = feeds.pictures, first.canonical, first.layers, first.runner
    logits = np.concatenate([p.logits for p in parts])
    maps = {name: np.concatenate([p.maps[name] for p in parts]) for name in found}
    for name, heat in maps.items():
        if not np.isfinite(heat).all():
            raise NotFiniteError(
                f"the map of layer {name!r} is not finite; engine numpy with float64 may tell where it overflows"
            )

    return Explanation(
        model=model,
        pictures=pictures,
        layers=found,
        maps=maps,
        targets=np.concatenate([p.targets for p in parts]),
        logits=logits.astype(np.float32),
        probabilities=probabilities(logits, canonical.squash).astype(np.float32),
        conservation=Conservation.merge([p.conservation for p in parts]),
        options={
            "method": chosen.name,
            "method_options": chosen.options(),
            "per_channel": chosen.channels,
            "concepts": {str(layer): [int(c) for c in channels] for layer, channels in (concepts or {}).items()},
            "composite": rules.name if chosen.walks else None,
            "attention": rules.attention if chosen.walks else None,
            "start": begin.name if chosen.walks else None,
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


def _run(
    plans: _Plans,
    targets: Sequence[Target] | Target | None,
    share: _Share,
    progress: Callable[[float, int], None] | None,
) -> tuple[_Plan, list[Batch]]:
    """The plan for the first image, and what all come to, some at a time."""
    model, feeds, pictures = plans.model, plans.feeds, plans.feeds.pictures
    first = plans.at(0, 1)
    codes = target_codes(_listed(targets), classes_in(first.canonical), model.labels)
    parts: list[Batch] = []
    # A condition may hold for one image of a batch and not for another.
    step = model.spec.batch or (1 if plans.branching else plans.step)
    for begun in range(0, len(pictures), step):
        stop = min(begun + step, len(pictures))
        share.of(begun, stop, len(pictures), progress)
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
    return first, parts


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
    concepts: Mapping[str | int, Sequence[int]]
    step: int
    tick: Callable[[float], None]
    _made: dict[Given, _Plan] = field(default_factory=dict)

    def one_by_one(self) -> _Plans:
        """The same for images that come alone, so that all that depends on their number is known."""
        alone = tuple((name, tuple(n if isinstance(n, int) else 1 for n in s)) for name, s in self.feeds.given.shapes)
        feeds = replace(self.feeds, given=replace(self.feeds.given, shapes=alone))
        return replace(self, feeds=feeds, step=1, _made={})

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
        kept = {name: model.resolve([name], given, vectors=True)[str(name)] for name in self.concepts}
        tensors |= {layer.tensor for layer in kept.values()}
        canonical = model.canonical(given, frozenset(tensors - listed), self.rules.fold_batchnorm)
        rules = boxed(self.rules, canonical, *self._ranges()) if self.rules.needs_box else self.rules
        masks = {layer.tensor: channel_mask(name, layer, self.concepts[name]) for name, layer in kept.items()}
        job = Job(canonical, model.spec.name, layers, self.method, rules, self.start, masks)
        means = Means(
            job, self.engine, self.dtype, self.settings, model.spec.batch, self.step, model.disk,
            model.content if model.disk else "", model.layers(given), self._seen(given), self.tick,
        )  # fmt: skip
        return _Plan(given, canonical, layers, self.method.runner(means))

    def _seen(self, given: Given) -> Layer | str:
        """The input as a layer, or why it is none."""
        try:
            return next(iter(self.model.resolve([INPUT], given, vectors=True).values()))
        except UsageError as error:
            return str(error)

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


class _Share:
    """Tells progress of a batch as progress of the whole."""

    def __init__(self) -> None:
        self._tell: Callable[[float], None] | None = None

    def of(self, start: int, stop: int, total: int, progress: Callable[[float, int], None] | None) -> None:
        """The batch from `start` to `stop` is under way."""
        self._tell = None if progress is None else lambda part: progress(start + part * (stop - start), total)

    def tell(self, part: float) -> None:
        if self._tell is not None:
            self._tell(part)


def channel_mask(name: str | int, layer: Layer, channels: Sequence[int]) -> np.ndarray:
    """1 at these channels of a layer and 0 elsewhere, of a shape that broadcasts against its tensor.

    Raises:
        UsageError: it has no such channel, or its channels lie in several axes.
    """
    form, shape = layer.form, layer.shape
    axis = 1 if form is None or form.plain else len(shape) - 1
    count = shape[axis] if axis < len(shape) else None
    if not isinstance(count, int) or (form is not None and form.channels != count):
        raise UsageError(
            f"the channels of layer {layer.node!r} are not one axis of its tensor: name another for concepts"
        )
    wrong = [c for c in channels if not 0 <= int(c) < count]
    if wrong or not len(channels):
        raise UsageError(f"layer {str(name)!r} has channels 0 to {count - 1}, not {wrong[0] if wrong else 'none'}")
    mask = np.zeros(count, np.float32)
    mask[np.asarray(channels, int)] = 1
    return mask.reshape(-1, *(1,) * (len(shape) - axis - 1))


def _sizes(part: Batch) -> dict[str, tuple[int, ...]]:
    return {name: heat.shape[2:] for name, heat in part.maps.items()}


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
