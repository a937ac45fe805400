"""From a picture to the numbers a model was trained on, and back to the region of the picture that it saw.

A `Preprocess` says how: how the picture is cut to size, the order of its channels, and value = (pixel * scale - mean)
/ std for pixels 0..255. It comes from a flag (a preset's name), from the metadata in the model file, or from a guess
that says it is one; layout, number type and size come from the model's `InputSpec`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from onnxcam.errors import UsageError
from onnxcam.input_spec import InputSpec
from onnxcam.pictures import INTERPOLATION, RESIZE, Box, Colour, open_image, to_rgb

__all__ = [
    "KEY",
    "PRESETS",
    "InputSpec",
    "Prepared",
    "Preprocess",
    "choose",
    "from_metadata",
    "guess",
    "open_image",
    "preset",
    "to_metadata",
]

KEY = "onnxcam.preprocess"
DEFAULT_SIZE = 224
CHANNEL_ORDERS = ("rgb", "bgr", "gray")
SMALL = 96  # models of thumbnails, as CIFAR's, are trained on whole pictures: their edges are not cut off
FEWEST_LEVELS = 100  # of 256: an integer input that would see fewer grey levels is being fed the wrong range

Numbers = tuple[float, ...]
Size = tuple[int, int]


class Prepared(NamedTuple):
    """A picture ready for the model.

    `array`: (1, C, H, W) or (1, H, W, C) in the input's own type. `view`: the region that the model saw as an RGB
    picture at the picture's own resolution, longest side at most 1024. `window`: that region in pixels of the upright
    picture, (left, top, right, bottom); it reaches beyond the picture where padded.
    """

    array: np.ndarray
    view: Image.Image
    window: Box


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input: value = (pixel * scale - mean) / std, pixel 0..255.

    `mean` and `std` are in units of pixel * scale (so for scale 1/255 they are the familiar 0.485, 0.456, 0.406) and
    in the model's channel order; one number serves all channels. `size` is (height, width) for a model whose file
    leaves it open, None for 224. `resize`: "warp" stretches the whole picture, "crop" scales it until it covers size
    / crop_fraction and takes the middle, "pad" keeps its proportions and fills the rest with `pad_colour` (RGB
    0..255), "exact" demands the model's size. `channel_order` "gray" gives luminance, in every channel that the model
    has.

    Raises UsageError for values that make no sense.
    """

    name: str
    size: Size | None = None
    resize: str = "warp"
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    channel_order: str = "rgb"
    scale: float = 1.0
    mean: Numbers = (0.0,)
    std: Numbers = (1.0,)
    pad_colour: Colour = (0, 0, 0)

    def __post_init__(self) -> None:
        _one_of("resize", self.resize, RESIZE)
        _one_of("interpolation", self.interpolation, INTERPOLATION)
        _one_of("channel order", self.channel_order, CHANNEL_ORDERS)
        set_field = object.__setattr__  # the dataclass is frozen; this is its constructor still
        set_field(self, "size", None if self.size is None else _size(self.size))
        set_field(self, "mean", _per_channel("mean", self.mean))
        set_field(self, "std", _per_channel("std", self.std))
        set_field(self, "pad_colour", _colour(self.pad_colour))
        if 0 in self.std:
            raise UsageError(f"std {_listed(self.std)} has a zero: every std must be a number other than 0")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(f"scale must be a number other than 0, not {self.scale}")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop fraction must be above 0 and at most 1, not {self.crop_fraction}")

    def override(self, **changes: Any) -> Preprocess:
        """A copy with other values; None leaves a field as it is, `size` may be one number.

        Another `channel_order` takes a preset's mean and std along, so that each stays with its colour; a mean or std
        given in the same call is in the new order. Raises UsageError as the constructor does.
        """
        changes = {field: value for field, value in changes.items() if value is not None}
        if not changes:
            return self
        if {self.channel_order, changes.get("channel_order", self.channel_order)} == {"rgb", "bgr"}:
            changes = {"mean": self.mean[::-1], "std": self.std[::-1]} | changes
        changed = replace(self, **changes)
        differing = [
            f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) != getattr(changed, f.name)
        ]
        return replace(changed, name="+".join([self.name, *differing]))

    def apply(self, image: Image.Image, spec: InputSpec) -> Prepared:
        """The picture as the input that `spec` describes, and the view of what the model sees of it.

        A picture of any mode will do (see `pictures.to_rgb`); a 1-channel model gets its luminance. Raises UsageError
        where the input is no image, the size contradicts the file, mean and channels do not fit, or the values do not
        fit an integer input.
        """
        self.check(spec)
        picture = to_rgb(image)
        placement = RESIZE[self.resize](picture.size, self._size_for(spec, picture), self.crop_fraction)
        drawn = placement.draw(picture, INTERPOLATION[self.interpolation], self.pad_colour)
        array = self.normalise(self._pixels(drawn, spec), spec).astype(spec.dtype)
        return Prepared(array, placement.view(picture, self.pad_colour), placement.window)

    def normalise(self, pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
        """(pixel * scale - mean) / std in float64, for pixels 0..255 in the layout of `spec`.

        Rounded where the input takes whole numbers.
        """
        mean, std = (spec.broadcast(np.array(values)) for values in (self.mean, self.std))
        values: np.ndarray = (pixels.astype(np.float64) * self.scale - mean) / std
        return np.round(values) if spec.is_integer else values

    def bounds(self, spec: InputSpec) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest value that a pixel can take, float32 (1, C, 1, 1) or (1, 1, 1, C).

        These are l and h of LRP's z-box rule at the first layer, (0 - mean) / std and (1 - mean) / std for pixels
        scaled to 0..1 (spec/relevance.md, section 2.4).
        """
        black, white = (
            self.normalise(spec.broadcast(np.full(self._channels_for(spec), pixel)), spec).astype(np.float32)
            for pixel in (0, 255)
        )
        return np.minimum(black, white), np.maximum(black, white)

    def check(self, spec: InputSpec) -> None:
        """Raise UsageError where pictures cannot become the input that `spec` describes in this way."""
        if spec.layout is None:
            raise UsageError(f"{spec.why_no_image}: pass the input as an array (.npy) instead of a picture")
        channels = self._channels_for(spec)
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UsageError(
                    f"preprocessing {self.name!r} has {len(values)} values of {what} and input {spec.name!r} has "
                    f"{channels} channel: give one with --{what}, or another --preprocess"
                )
        wanted, given = (spec.height, spec.width), self.size
        if given and any(have not in (None, want) for have, want in zip(wanted, given, strict=True)):
            raise UsageError(
                f"size {given[0]}x{given[1]} was asked for, but input {spec.name!r} is fixed to "
                f"{spec.height or '?'}x{spec.width or '?'} (height x width) in the file: leave the size out"
            )
        if spec.is_integer:
            self._check_range(spec)

    def _check_range(self, spec: InputSpec) -> None:
        lows, highs = self.bounds(spec)
        low, high, limits = float(lows.min()), float(highs.max()), np.iinfo(spec.dtype)
        if low < limits.min or high > limits.max or high - low < FEWEST_LEVELS:
            raise UsageError(
                f"input {spec.name!r} takes {spec.dtype.name} and preprocessing {self.name!r} gives whole numbers from "
                f"{low:g} to {high:g}: use --preprocess raw (0..255), or set --scale, --mean and --std"
            )

    def _channels_for(self, spec: InputSpec) -> int:
        return spec.channels or (1 if self.channel_order == "gray" else 3)

    def _pixels(self, picture: Image.Image, spec: InputSpec) -> np.ndarray:
        """The pixels 0..255 of an RGB picture in the channels and the layout of the input, uint8, with a batch axis."""
        channels = self._channels_for(spec)
        if channels == 1 or self.channel_order == "gray":
            pixels = np.repeat(np.asarray(picture.convert("L"))[..., None], channels, axis=2)
        else:
            pixels = np.asarray(picture)[..., :: -1 if self.channel_order == "bgr" else 1]
        return np.ascontiguousarray(pixels if spec.layout == "NHWC" else pixels.transpose(2, 0, 1))[None]

    def _size_for(self, spec: InputSpec, picture: Image.Image) -> Size:
        height, width = self.size or (
            (picture.height, picture.width)
            if self.resize == "exact"
            else (spec.height or spec.width or DEFAULT_SIZE, spec.width or spec.height or DEFAULT_SIZE)
        )
        return spec.height or height, spec.width or width

    def to_json(self) -> str:
        """The preset's name, or all fields where it is none, as `from_metadata` reads it."""
        return json.dumps(self.name if PRESETS.get(self.name) == self else asdict(self))


def _one_of(what: str, name: Any, names: Sequence[str] | Mapping[str, Any]) -> None:
    if isinstance(name, str) and name in names:
        return
    nearest = difflib.get_close_matches(str(name), list(names), n=len(names), cutoff=0.5)
    known = [*nearest, *(n for n in names if n not in nearest)]
    raise UsageError(f"there is no {what} {name!r}; there is {', '.join(known)}")


def _size(value: Any) -> Size:
    sides = tuple(value) if np.iterable(value) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise UsageError(f"size must be one number of pixels or (height, width), not {value!r}")
    return int(sides[0]), int(sides[1])


def _per_channel(what: str, value: Any) -> Numbers:
    try:
        numbers = tuple(float(v) for v in (value if np.iterable(value) else (value,)))
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be numbers, not {value!r}") from None
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{what} must be one finite number or three, one per channel, not {value!r}")
    return numbers


def _colour(value: Any) -> Colour:
    colour = tuple(value) if np.iterable(value) else (value,) * 3
    if len(colour) != 3 or not all(isinstance(v, (int, np.integer)) and 0 <= v <= 255 for v in colour):
        raise UsageError(f"pad colour must be three numbers 0..255, not {value!r}")
    return int(colour[0]), int(colour[1]), int(colour[2])


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


# Geometry follows each family's usual evaluation: the middle of a slightly larger picture. Where a family has no habit
# ("unit", "raw"), the whole picture goes in, so that nothing is hidden from the model.
PRESETS: dict[str, Preprocess] = {
    p.name: p
    for p in (
        Preprocess(  # torchvision, timm, most of PyTorch
            "imagenet",
            resize="crop",
            scale=1 / 255,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        Preprocess("tf", resize="crop", scale=1 / 127.5, mean=(1.0,)),  # Keras MobileNet, Inception, Xception: -1..1
        Preprocess("efficientnet-lite", resize="crop", interpolation="bicubic", mean=(127.0,), std=(128.0,)),
        Preprocess("caffe", resize="crop", channel_order="bgr", mean=(103.939, 116.779, 123.68)),
        Preprocess("unit", scale=1 / 255),
        Preprocess(
            "clip",
            resize="crop",
            crop_fraction=1.0,
            interpolation="bicubic",
            scale=1 / 255,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        Preprocess("raw"),
        Preprocess("none", resize="exact"),
    )
}


def preset(name: str) -> Preprocess:
    """The preset of that name. Raises UsageError with the names there are, the nearest first."""
    key = name.strip().lower()
    _one_of("preprocessing", key, PRESETS)
    return PRESETS[key]


def choose(flag: str | Preprocess | None, metadata: Mapping[str, str], spec: InputSpec) -> tuple[Preprocess, str]:
    """The preprocessing to use and where it comes from: what was asked for, else the file's metadata, else a guess.

    The source is "asked for", "metadata KEY", or a sentence that begins with "guessed". Raises UsageError for an
    unknown preset and for malformed metadata of ours.
    """
    if isinstance(flag, Preprocess):
        return flag, "asked for"
    if flag:
        return preset(flag), "asked for"
    found = _find(metadata)
    return found if found else guess(spec)


def guess(spec: InputSpec) -> tuple[Preprocess, str]:
    """A guess by number type, channels and layout, and a sentence that says so and how to say it better."""
    if spec.layout is None:
        return PRESETS["none"], f"guessed none: {spec.why_no_image}, so only arrays can be passed, as they are"
    if spec.pixels is not None:
        # What happens to its input first in the graph tells the range, and nothing is left to do.
        name = "raw" if spec.pixels == 255 else "unit"
        return PRESETS[name], (
            f"guessed {name}: the model itself scales what {spec.name!r} holds, from pixels 0..{spec.pixels} on; if "
            "they were meant otherwise, say --preprocess NAME"
        )
    if spec.is_integer:
        what, found = f"takes {spec.dtype.name}", PRESETS["raw"]
        if spec.dtype == np.int8:  # quantised pixels, shifted by half the range
            found = found.override(mean=128)
    elif spec.channels == 1:
        what, found = "has one channel", PRESETS["unit"]
    elif spec.layout == "NHWC":
        what, found = f"is {spec.dtype.name} in NHWC layout, as from TensorFlow", PRESETS["tf"]
    else:
        what, found = f"is {spec.dtype.name} in NCHW layout, as from PyTorch", PRESETS["imagenet"]
    if found.resize == "crop" and max(spec.height or DEFAULT_SIZE, spec.width or DEFAULT_SIZE) < SMALL:
        found = found.override(crop_fraction=1.0)
    return found, (
        f"guessed {found.name}: the file does not say how pictures become its input, and {spec.name!r} {what}; "
        "if the model was trained otherwise, say --preprocess NAME"
    )


def from_metadata(metadata: Mapping[str, str]) -> Preprocess | None:
    """What the model file says about its pictures; None where it says nothing.

    Read are our key `onnxcam.preprocess` (a preset's name or all fields, as JSON), the image keys of the ONNX
    metadata proposal (docs/MetadataProps.md in onnx/onnx, used by Windows ML), and Ultralytics exports. Raises
    UsageError that names the key where ours is malformed.
    """
    found = _find(metadata)
    return found[0] if found else None


def to_metadata(how: Preprocess) -> dict[str, str]:
    """The entry to write into a model's metadata so that `from_metadata` reads the same again."""
    return {KEY: how.to_json()}


def _find(metadata: Mapping[str, str]) -> tuple[Preprocess, str] | None:
    for key, read in ((KEY, _ours), ("Image.NominalPixelRange", _image_keys), ("author", _ultralytics)):
        found = read(metadata)
        if found:
            return found, f"metadata {key}"
    return None


def _ours(metadata: Mapping[str, str]) -> Preprocess | None:
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        if text.strip().lower() in PRESETS:
            return preset(text)
        value = json.loads(text)
        if isinstance(value, str):
            return preset(value)
        if not isinstance(value, dict):
            raise UsageError("it must be a preset's name or an object of fields")
        for field in value:
            _one_of("field", field, [f.name for f in fields(Preprocess)])
        base = PRESETS.get(value.get("name", ""), Preprocess("metadata"))
        return replace(base, **value)
    except (ValueError, TypeError, UsageError) as error:
        raise UsageError(
            f"the model's metadata {KEY!r} cannot be used: {error}; pass --preprocess to go without it"
        ) from None


PIXEL_RANGES: dict[str, dict[str, Any]] = {
    "nominalrange_0_255": {},
    "normalized_0_1": {"scale": 1 / 255},
    "normalized_1_1": {"scale": 1 / 127.5, "mean": (1.0,)},
    "nominalrange_16_235": {"scale": 219 / 255, "mean": (-16.0,)},
}
PIXEL_FORMATS = {"gray8": "gray", "rgb8": "rgb", "bgr8": "bgr"}


def _image_keys(metadata: Mapping[str, str]) -> Preprocess | None:
    # Keys and values are case insensitive in the proposal. With either of the two missing, readers of these files
    # disagree about the default, so a guess is no worse.
    values = {key.lower(): value.lower() for key, value in metadata.items() if key.lower().startswith("image.")}
    pixel_range = PIXEL_RANGES.get(values.get("image.nominalpixelrange", ""))
    order = PIXEL_FORMATS.get(values.get("image.bitmappixelformat", ""))
    if pixel_range is None or order is None or values.get("image.colorspacegamma", "srgb") != "srgb":
        return None
    return Preprocess("image-metadata", channel_order=order, **pixel_range)


def _ultralytics(metadata: Mapping[str, str]) -> Preprocess | None:
    # Classifiers before 8.1 were normalised otherwise in some releases; those are left to the guess.
    if metadata.get("author") != "Ultralytics":
        return None
    unit = Preprocess("ultralytics", scale=1 / 255)
    if metadata.get("task") != "classify":
        return replace(unit, resize="pad", pad_colour=(114, 114, 114))
    version = metadata.get("version", "").split(".")
    if len(version) < 2 or not (version[0].isdecimal() and version[1].isdecimal()):
        return None
    recent = (int(version[0]), int(version[1])) >= (8, 1)
    return replace(unit, resize="crop", crop_fraction=1.0) if recent else None
