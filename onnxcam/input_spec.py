"""What a model's inputs want: their shapes as the file gives them, number types, and whether a picture fits into one.

`InputSpec.of` reads layout, channels and size off the shape. Preprocessing takes a spec and a picture and makes the
array; a spec without a layout says in `why_no_image` why a picture cannot be put in, and arrays can still be passed.
A model may have several inputs: `main_input` is the one that is explained first, `Given` is what is known about all of
them when a graph is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from onnxcam.errors import ModelError

Layout = Literal["NCHW", "NHWC"]
Dim = int | str | None

CHANNEL_AXIS: dict[str, int] = {"NCHW": 1, "NHWC": 3}
IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    `shape` stands as in the file: a number, the name of a symbolic dimension, or None. `layout` is None where the
    input holds no image, and `why_no_image` then says why. `channels`, `height`, `width` and `batch` are None where
    symbolic. `pixels` is the range of pixels that the graph itself scales, 255 or 1, where it begins with that.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: np.dtype
    layout: Layout | None = None
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    why_no_image: str = ""
    pixels: int | None = None

    @classmethod
    def of(cls, name: str, shape: Sequence[Dim], dtype: np.typing.DTypeLike) -> InputSpec:
        """The spec of input `name`: the layout is worked out from the shape, NCHW where both would do.

        Never fails: an input that holds no image (not rank 4, neither 1 nor 3 channels, not numbers) gets no layout.
        """
        shape, dtype = tuple(shape), np.dtype(dtype)
        sizes = [static(d) for d in shape]
        layout, why = _layout(sizes, dtype)
        if layout is None:
            return cls(name, shape, dtype, batch=sizes[0] if sizes else None, why_no_image=f"input {name!r} {why}")
        channel = CHANNEL_AXIS[layout]
        height, width = (sizes[axis] for axis in (1, 2, 3) if axis != channel)
        return cls(name, shape, dtype, layout, sizes[channel], height, width, sizes[0])

    @property
    def is_integer(self) -> bool:
        """True where the input takes whole numbers, as uint8 pixels."""
        return self.dtype.kind in "iu"

    @property
    def text(self) -> str:
        """The shape as it is said to a user, (N, 3, ?, ?) say."""
        return f"({', '.join(str(d) if d is not None else '?' for d in self.shape)})"

    def fits(self, shape: Sequence[int]) -> bool:
        """True where an array of that shape could be passed, whatever its batch."""
        sizes = zip(self.shape[1:], shape[1:], strict=False)
        return len(shape) == len(self.shape) and all(static(d) in (None, n) for d, n in sizes)

    def goes_with(self, main: InputSpec) -> bool:
        """True where the first axis counts images, as that of the main input does: of equal length, or of one name.

        Names that a converter made up tell nothing apart.
        """
        if not self.shape:
            return False
        ours, theirs = self.shape[0], main.shape[0] if main.shape else None
        if self.batch is not None or main.batch is not None:
            return self.batch == main.batch
        return ours == theirs or _made_up(ours) or _made_up(theirs)

    def broadcast(self, per_channel: np.ndarray) -> np.ndarray:
        """Values per channel (C,) as an array that broadcasts with the input: (1, C, 1, 1) or (1, 1, 1, C)."""
        return per_channel.reshape((1, 1, 1, -1) if self.layout == "NHWC" else (1, -1, 1, 1))


def static(dim: Dim) -> int | None:
    """The dimension where it is a fixed number; None where symbolic (some exporters write 0 or -1 for that)."""
    return int(dim) if isinstance(dim, (int, np.integer)) and dim > 0 else None


def _made_up(dim: Dim) -> bool:
    return not isinstance(dim, str) or dim.startswith("unk__") or "dynamic_axes" in dim


def read_inputs(graph: onnx.GraphProto) -> tuple[InputSpec, ...]:
    """The inputs of a file, in its order, without those that are weights of old files.

    Raises:
        ModelError: there is none, or one is no tensor.
    """
    weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    specs = []
    for value in graph.input:
        if value.name in weights:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input {value.name!r} is no tensor")
        kind = value.type.tensor_type
        dims: list[Dim] = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
        if not kind.HasField("shape"):
            dims = _told_by_weights(graph, value.name)
        specs.append(InputSpec.of(value.name, dims, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    if not specs:
        raise ModelError("the model has no input: there is nothing to explain")
    return tuple(specs)


def _told_by_weights(graph: onnx.GraphProto, name: str) -> list[Dim]:
    """The shape of an input that the file says none of, where it is convolved; else none."""
    weights = {t.name: t.dims for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[0] == name and node.input[1] in weights:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            _, channels, *kernel = weights[node.input[1]]
            return [None, channels * groups, *(None for _ in kernel)]
    return []


def main_input(specs: Sequence[InputSpec]) -> InputSpec:
    """The input that pictures go to: the first that holds an image; where none does, the first that is no setting."""
    images = [spec for spec in specs if spec.layout is not None]
    data = [spec for spec in specs if len(spec.shape) > 1]
    return (images or data or list(specs))[0]


# Settings that exporters leave among the inputs, by what their names contain, and the value they have at rest.
_AT_REST = {
    "learning_phase": 0, "training": 0, "is_train": 0, "phase_train": 0, "train_phase": 0, "keep_prob": 1,
    "dropout_rate": 0,
}  # fmt: skip


def at_rest(spec: InputSpec) -> np.ndarray | None:
    """The value of a setting that is known from its name: a switch for training is off. None for other inputs."""
    name = spec.name.lower()
    if any(static(n) != 1 for n in spec.shape):
        return None
    return next((np.full((1,) * len(spec.shape), v, spec.dtype) for k, v in _AT_REST.items() if k in name), None)


@dataclass(frozen=True)
class Setting:
    """An input of which one value holds for all images, as something hashable."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Setting:
        return cls(name, array.dtype.str, array.shape, array.tobytes())

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Given:
    """What is known about the inputs when a graph is made.

    Attributes:
        shapes: of the inputs, by name; a string is an axis left open.
        settings: inputs that are constants from here on.
        branches: conditions that are only known for the input at hand, by the name of their tensor.
    """

    shapes: tuple[tuple[str, tuple[int | str, ...]], ...]
    settings: tuple[Setting, ...] = ()
    branches: tuple[tuple[str, bool], ...] = ()


def assumed(specs: Sequence[InputSpec], main: InputSpec, shape: tuple[int | str, ...]) -> Given:
    """What holds before any array is at hand, where the main input has `shape`: settings that are known from their
    names, and what the names of axes and the size of the picture say about the other inputs."""
    known = {d: n for d, n in zip(main.shape, shape, strict=True) if isinstance(d, str) and isinstance(n, int)}
    shapes, settings = [(main.name, shape)], []
    for spec in specs:
        if spec is main:
            continue
        if (value := at_rest(spec)) is not None:
            settings.append(Setting.of(spec.name, value))
            continue
        sizes = [_size(d, known, f"{spec.name}.{i}") for i, d in enumerate(spec.shape)]
        if spec.goes_with(main):
            sizes[0] = shape[0]
        if spec.layout is not None and spec.layout == main.layout:
            sizes[1:] = [n if isinstance(n, int) else m for n, m in zip(sizes[1:], shape[1:], strict=True)]
        shapes.append((spec.name, tuple(sizes)))
    return Given(tuple(shapes), tuple(settings))


def _size(dim: Dim, known: Mapping[str, int], otherwise: str) -> int | str:
    if isinstance(dim, str) and dim:
        return known.get(dim, dim)
    return static(dim) or otherwise


def is_setting(spec: InputSpec, main: InputSpec) -> bool:
    """True for an input that holds for all images alike: a switch, a size, a prompt."""
    counted = spec.goes_with(main) and (len(spec.shape) > 1 or static(spec.shape[0]) is None)
    return spec is not main and not counted


def is_float(dtype: np.dtype) -> bool:
    """True for floating point numbers, bfloat16 (which NumPy knows only through ml_dtypes) included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _layout(sizes: Sequence[int | None], dtype: np.dtype) -> tuple[Layout | None, str]:
    if not (is_float(dtype) or dtype.kind in "iu"):
        return None, f"takes {dtype.name}, not numbers a picture could be turned into"
    if len(sizes) != 4:
        return None, f"has {len(sizes)} dimensions; an image needs 4, (N, C, H, W) or (N, H, W, C)"
    _, second, third, last = sizes
    if second in IMAGE_CHANNELS:
        return "NCHW", ""
    if last in IMAGE_CHANNELS:
        return "NHWC", ""
    if second is None:
        return "NCHW", ""
    if last is None and third is not None and second > 4:  # (N, 224, 224, ?): a size where NCHW has its channels
        return "NHWC", ""
    return None, f"has {second} channels (NCHW) or {last} (NHWC); a picture has 1 or 3"
