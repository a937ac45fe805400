"""What goes into a model: pictures or arrays for its main input, arrays for the others, batch by batch.

An input either goes image by image with the main one, or holds for all images alike. What holds for all, a switch, a
size, a prompt (`input_spec.is_setting`), becomes a constant of the graph: what depends on it alone is computed once and
takes no relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onnxcam.canonise.surgery import captured
from onnxcam.errors import UsageError
from onnxcam.explanation import Picture
from onnxcam.input_spec import Given, InputSpec, Setting, at_rest, is_setting, static
from onnxcam.model import Model, filled
from onnxcam.pictures import open_image
from onnxcam.preprocess import Prepared

Source = str | Path | Image.Image
Arrays = dict[str, np.ndarray]
Batches = Callable[[int, int], Arrays]  # (first image, image to stop before) -> the model's inputs


@dataclass(frozen=True)
class Feeds:
    """What is explained.

    Attributes:
        pictures: one for each image, or row of an array.
        batch: (start, stop) -> arrays by input; as many rows as there are images.
        given: what the graph is made for.
        notes: settings that were assumed.
    """

    pictures: list[Picture]
    batch: Batches
    given: Given
    notes: list[str]

    def filled(self, start: int, stop: int, model: Model) -> Arrays:
        """The same, filled up to the batch that the file fixes."""
        return {name: filled(a, model.spec.batch) for name, a in self.batch(start, stop).items()}


def feeds(model: Model, images: Any, inputs: Mapping[str, Any] | None = None) -> Feeds:
    """Everything that goes into `model`.

    Args:
        model: whose inputs are to be filled.
        images: pictures or an array for the main input, or arrays by input; None where `inputs` has them all.
        inputs: arrays (or pictures) for the other inputs by name: a row for each image, or one that holds for all.

    Raises:
        UsageError: something is missing, of another shape than the model wants, or not to be found in the model.
    """
    given = dict(inputs or {})
    if isinstance(images, Mapping):
        images, given = None, {**images, **given}
    main = model.spec
    for name in given:
        if name not in {spec.name for spec in model.inputs}:
            raise UsageError(f"the model has no input {name!r}; its inputs are {_listed(model.inputs)}")
    if main.name in given:
        if images is not None:
            raise UsageError(f"input {main.name!r} is given twice: by pictures or an array, and by name")
        images = given.pop(main.name)
        images = images if isinstance(images, Source) else np.asarray(images)
    elif images is None:
        raise UsageError(_missing(model, main, "pictures, or an array " if main.layout else "an array "))
    pictures, first = _arrays(model, images) if isinstance(images, np.ndarray) else _pictures(model, images)

    count = len(pictures)
    rows: Arrays = {}  # a row for each image
    settings: list[Setting] = []
    notes: list[str] = []
    for spec in model.inputs:
        if spec is main:
            continue
        if spec.name in given:
            value = given[spec.name]
            array = _drawn(model, spec, value) if isinstance(value, Source) else np.asarray(value)
            if is_setting(spec, main):
                settings.append(_setting(spec, array))
            else:
                rows[spec.name] = _fitting(spec, array, count)
        elif (value := at_rest(spec)) is not None:
            settings.append(Setting.of(spec.name, value))
            notes.append(f"input {spec.name!r} was set to {value.item()}: give another by --input {spec.name}=VALUE")
        elif _matters(model, spec):
            raise UsageError(_missing(model, spec))
        else:
            zeros = np.zeros([static(d) or 1 for d in spec.shape], spec.dtype)
            if is_setting(spec, main):
                settings.append(_setting(spec, zeros))
            else:
                rows[spec.name] = _fitting(spec, zeros[:1], count)

    def batch(start: int, stop: int) -> Arrays:
        return {main.name: first(start, stop)} | {name: a[start:stop] for name, a in rows.items()}

    many: int | str = main.batch if main.batch is not None else "N"
    sizes: dict[str, tuple[int | str, ...]] = {name: (many, *a.shape[1:]) for name, a in batch(0, 1).items()}
    return Feeds(pictures, batch, Given(tuple(sizes.items()), tuple(settings)), notes)


def _pictures(model: Model, images: Any) -> tuple[list[Picture], Callable[[int, int], np.ndarray]]:
    """Pictures, and what makes the model's input of some of them; each is opened only when its turn comes."""
    listed = [images] if isinstance(images, Source) else as_list("pictures", images)
    if not listed:
        raise UsageError("there is no picture to explain")
    if model.spec.layout is None:
        raise UsageError(
            f"{model.spec.why_no_image}; pass the input as an array: --input FILE.npy, in Python a NumPy array"
        )
    preprocess, spec = model.preprocess, model.spec

    @lru_cache(maxsize=1)  # a single picture is wanted three times: for its size, to be explained, to be drawn on
    def prepare(i: int) -> Prepared:
        item = listed[i]
        return preprocess.apply(item if isinstance(item, Image.Image) else open_image(item), spec)

    pictures = []
    for i, item in enumerate(listed):
        if not isinstance(item, Source):
            raise UsageError(f"{type(item).__name__} is no picture: give paths, PIL pictures, or one array (N, ...)")
        name = f"image-{i}" if isinstance(item, Image.Image) else str(item)
        pictures.append(Picture(name, partial(prepare, i)))

    shapes: set[tuple[int, ...]] = set()

    def some(start: int, stop: int) -> np.ndarray:
        arrays = [prepare(i).array for i in range(start, min(stop, len(listed)))]
        shapes.update(a.shape for a in arrays)
        if len(shapes) > 1:
            raise UsageError("the pictures give inputs of different sizes: explain them one by one, or give a --size")
        return np.concatenate(arrays)

    return pictures, some


def _arrays(model: Model, array: np.ndarray) -> tuple[list[Picture], Callable[[int, int], np.ndarray]]:
    if model.spec.name in model.alone and model.spec.fits((1, *array.shape)):
        array = array[None]  # as the file takes it
    if model.spec.fits(array.shape) and not len(array):
        raise UsageError("the array holds no image: its first axis is 0")
    array = _fitting(model.spec, array)
    return [Picture(f"array-{i}") for i in range(len(array))], lambda start, stop: array[start:stop]


def _drawn(model: Model, spec: InputSpec, picture: Source) -> np.ndarray:
    """A picture for another input than the main one, made ready as for that."""
    if spec.layout is None:
        raise UsageError(f"{spec.why_no_image}; pass it as an array: --input {spec.name}=FILE.npy")
    return model.preprocess.apply(picture if isinstance(picture, Image.Image) else open_image(picture), spec).array


def settled(model: Model, given: Given, inputs: Mapping[str, Any] | None) -> Given:
    """`given` with values for inputs that hold for all images.

    Raises:
        UsageError: an input goes image by image, or does not fit.
    """
    specs = {spec.name: spec for spec in model.inputs}
    for name, value in (inputs or {}).items():
        if name not in specs:
            raise UsageError(f"the model has no input {name!r}; its inputs are {_listed(model.inputs)}")
        if not is_setting(specs[name], model.spec):
            raise UsageError(f"input {name!r} goes image by image: it stays an input, and takes no value here")
        settings = [s for s in given.settings if s.name != name] + [_setting(specs[name], np.asarray(value))]
        shapes = tuple((n, shape) for n, shape in given.shapes if n != name)
        given = replace(given, shapes=shapes, settings=tuple(settings))
    return given


def _setting(spec: InputSpec, array: np.ndarray) -> Setting:
    if array.size == 1 and all(static(n) == 1 for n in spec.shape):
        array = array.reshape((1,) * len(spec.shape))
    if spec.shape and array.ndim and static(spec.shape[0]) not in (None, len(array)):
        raise UsageError(f"the array has shape {array.shape}, but input {spec.name!r} wants {spec.text}")
    return Setting.of(spec.name, _fitting(spec, array))


def _fitting(spec: InputSpec, array: np.ndarray, count: int | None = None) -> np.ndarray:
    """The array as the input takes it; with `count`, as many rows as there are images, or one for all of them."""
    if not spec.fits(array.shape):
        raise UsageError(f"the array has shape {array.shape}, but input {spec.name!r} wants {spec.text}")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"the array holds {array.dtype}, not numbers that input {spec.name!r} could take")
    if count is not None:
        if len(array) not in (1, count):
            raise UsageError(f"input {spec.name!r} was given {len(array)} rows for {count} images: give one or {count}")
        array = array if len(array) == count else np.repeat(array, count, axis=0)
    return np.ascontiguousarray(array.astype(spec.dtype)).reshape(array.shape)


def _matters(model: Model, spec: InputSpec) -> bool:
    """True where the input leads to what is explained, as far as the graph tells."""
    found = model.canonical()
    inside = any(spec.name in captured(node) for node in found.graph.surgeon.nodes)
    return inside or bool(found.graph.between([spec.name], found.logits))


def _missing(model: Model, spec: InputSpec, what: str = "it ") -> str:
    known = f"the model has {len(model.inputs)} inputs, {_listed(model.inputs)}: " if len(model.inputs) > 1 else ""
    return (
        f"{known}input {spec.name!r} {spec.text} is missing; give {what}by --input {spec.name}=FILE.npy, in Python by "
        f"inputs={{{spec.name!r}: array}}"
    )


def _listed(specs: Sequence[InputSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.text}" for spec in specs)


def as_list(what: str, given: Any) -> list[Any]:
    """`given` as a list.

    Raises:
        UsageError: it is nothing that could be listed.
    """
    if not isinstance(given, Iterable):
        raise UsageError(f"{what}: {given!r} is neither one of them nor a list of them")
    return list(given)
