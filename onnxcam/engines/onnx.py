"""The recorder engine: every primitive adds nodes to an ONNX graph instead of computing.

The same operators and rules that compute on arrays record, behind the user's graph, the graph of the explanation. This
file has the windows: convolutions, pools and their adjoints, in the forms that runtimes are quick at and right about;
`recorder.py` has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.engines.recorder import Recorder
from onnxcam.engines.symbols import BATCH, Dim, Shape, Symbol
from onnxcam.engines.window import Window
from onnxcam.errors import EngineError

__all__ = ["BATCH", "RecorderOps", "Symbol"]

MANY_TAPS = 6  # of a kernel, for each cell that a stride leaves one of


class RecorderOps(Recorder):
    """The primitives, recording into `graph`, whose default opset is `graph.opset` (17 or newer)."""

    def conv(self, x: Symbol, w: Symbol, window: Window, group: int = 1) -> Symbol:
        size = _sizes(x, window)
        if any(reader.op == "ConvTranspose" for reader in w.tensor.outputs):
            w = self._own_copy(w)
        folded, lead = self._folded(x, window)
        shape = (folded.shape[0] if not folded.bare else 1, w.shape[0], *window.output(size))
        y = self.record(
            "Conv", [folded, w], (*folded.shape[: -window.rank - 1], *shape[1:]), bare=folded.bare,
            positive=x.positive and w.positive, group=group, kernel_shape=list(window.kernel),
            strides=list(window.strides), dilations=list(window.dilations), pads=[*window.begin, *window.end],
        )  # fmt: skip
        return self._unfolded(y, lead, window)

    def conv_adjoint(self, r: Symbol, w: Symbol, window: Window, size: Sequence[int], group: int = 1) -> Symbol:
        folded, lead = self._folded(r, window)
        channels = int(w.shape[1]) * group
        positive = r.positive and w.positive
        shape = (*folded.shape[: -window.rank - 1], channels, *size)
        depthwise = w.shape[1] == 1 and w.shape[0] == group
        dense = replace(window, strides=(1,) * window.rank)
        if dense == window and (group == 1 or depthwise):
            y = self._conv_adjoint_as_conv(folded, w, window, shape, group, positive)
        elif group == 1 and prod(window.kernel) == 1:
            # A Conv where there is relevance, then the cells that were looked at.
            below = replace(dense, begin=(0,) * window.rank, end=(0,) * window.rank)
            here = (*shape[: -window.rank], *folded.shape[-window.rank :])
            y = self._spread(self._conv_adjoint_as_conv(folded, w, below, here, 1, positive), window, size)
        elif depthwise and prod(window.kernel) >= MANY_TAPS * prod(window.strides):
            # More cells than needed, and still quicker than runtimes are at a ConvTranspose by channel.
            below = replace(dense, kernel=(1,) * window.rank, strides=window.strides, dilations=(1,) * window.rank)
            below = replace(below, begin=(0,) * window.rank, end=(0,) * window.rank)
            y = self._spread(folded, below, dense.output(tuple(size)))
            y = self._conv_adjoint_as_conv(y, w, dense, shape, group, positive)
        else:
            y = self._transposed(folded, self._own_copy(w), window, shape, group, positive)
        return self._unfolded(y, lead, window)

    def _own_copy(self, w: Symbol) -> Symbol:
        """The same weight by a node that runtimes fold into memory of its own.

        OpenVINO mixes up the repacked weights of a Conv and a ConvTranspose that share memory, and sees through
        Identity, Mul by 1, Reshape and a Transpose back.
        """
        lowest = self._lift(np.finfo(np.float32).min)
        return self.record("Max", [w, lowest], w.shape, positive=w.positive)

    def _conv_adjoint_as_conv(
        self, r: Symbol, w: Symbol, window: Window, shape: Shape, group: int, positive: bool
    ) -> Symbol:
        """Stride 1: a Conv with the flipped weight, its channels swapped, beats ConvTranspose: two to three times for
        depthwise and 1x1 (spec 3.0), by a third for dense 3x3."""
        n = window.rank
        turned = w
        if prod(window.kernel) > 1:
            bounds = [np.full(n, v, np.int64) for v in (-1, -(2**31))]
            steps = np.full(n, -1, np.int64)
            turned = self.record("Slice", [w, *bounds, np.arange(2, 2 + n), steps], w.shape, positive=w.positive)
        if group == 1:
            turned = self.record(
                "Transpose", [turned], (w.shape[1], w.shape[0], *w.shape[2:]), positive=w.positive,
                perm=[1, 0, *range(2, 2 + n)],
            )  # fmt: skip
        begin = [x - 1 - b for x, b in zip(window.extent, window.begin, strict=True)]
        end = [x - 1 - e for x, e in zip(window.extent, window.end, strict=True)]
        crop = any(p < 0 for p in (*begin, *end))
        attrs: dict[str, Any] = {"group": group, "kernel_shape": list(window.kernel)}
        attrs["dilations"] = list(window.dilations)
        if not crop:
            return self.record(
                "Conv", [r, turned], shape, bare=r.bare, positive=positive, pads=[*begin, *end],
                strides=[1] * n, **attrs,
            )  # fmt: skip
        wide = tuple(int(s) + max(-b, 0) + max(-e, 0) for s, b, e in zip(shape[-n:], begin, end, strict=True))
        y = self.record(
            "Conv", [r, turned], (*shape[:-n], *wide), bare=r.bare, positive=positive, strides=[1] * n,
            pads=[max(p, 0) for p in (*begin, *end)], **attrs,
        )  # fmt: skip
        for i in range(n):
            start = max(-begin[i], 0)
            y = self.slice(y, i - n, start, start + int(shape[i - n]))
        return y

    def _spread(self, r: Symbol, window: Window, size: Sequence[int]) -> Symbol:
        """The cells of `r` back where a 1x1 window saw them, zeros between: quickest as a ConvTranspose of ones."""
        ones = self._ones_weight((int(r.shape[-window.rank - 1]), 1, *window.kernel))
        return self._transposed(r, ones, window, (*r.shape[: -window.rank], *size), ones.shape[0], r.positive)

    def _transposed(self, r: Symbol, w: Symbol, window: Window, shape: Shape, group: Dim, positive: bool) -> Symbol:
        """The pads that a stride leaves uncovered at the end come back as output padding (spec 3.0)."""
        size = shape[-window.rank :]
        extra = [
            (int(n) + b + e - x) % s
            for n, b, e, x, s in zip(size, window.begin, window.end, window.extent, window.strides, strict=True)
        ]
        return self.record(
            "ConvTranspose", [r, w], shape, bare=r.bare, positive=positive, group=group,
            kernel_shape=list(window.kernel), strides=list(window.strides), dilations=list(window.dilations),
            pads=[*window.begin, *window.end], output_padding=extra,
        )  # fmt: skip

    def conv_weight_adjoint(
        self, r: Symbol, x: Symbol, window: Window, kernel: Sequence[int], group: int = 1
    ) -> Symbol:
        """One Conv of `x` by `r`: images take the place of channels, strides and dilations that of one another."""
        rank, size, output = window.rank, _sizes(x, window), _sizes(r, window)
        images, channels, m = x.shape[-rank - 2], int(x.shape[-rank - 1]), int(r.shape[-rank - 1])
        left, right = channels // group, m // group
        # Each group sees its own channels of every image; targets join the channels of the side that has them.
        t_x, t_r = (int(a.shape[0]) if a.ndim > rank + 2 else 1 for a in (x, r))
        bare = x.bare or r.bare
        x = self._turned(x, (t_x, images, group, left, *size), (0, 3, 2, 1), (t_x * left, (group, images), *size))
        r = self._turned(r, (t_r, images, group, right, *output), (2, 0, 3, 1), (group * t_r * right, images, *output))
        wide = Window(output, window.dilations, window.strides, window.begin, window.end).output(size)
        w = self.record(
            "Conv", [x, r], (t_x * left, group * t_r * right, *wide), group=group, positive=x.positive and r.positive,
            strides=list(window.dilations), dilations=list(window.strides), pads=[*window.begin, *window.end],
        )  # fmt: skip
        for i in range(rank):
            w = self.slice(w, i - rank, 0, kernel[i])
        folded = (t_x, left, group, t_r, right, *kernel)
        order = (0, 3, 2, 4, 1, *range(5, 5 + rank))
        w = self.shaped(w, folded)
        w = self.record("Transpose", [w], tuple(folded[i] for i in order), positive=w.positive, perm=list(order))
        return self._reshaped(w, (t_x * t_r, m, left, *kernel), bare)

    def _turned(self, a: Symbol, shape: Shape, front: Sequence[int], folded: Sequence[Any]) -> Symbol:
        """`a` as `shape`, its leading axes reordered to `front`, as `folded`; a pair there is a product."""
        perm = [*front, *range(len(front), len(shape))]
        sizes = [n if isinstance(n, int) else -1 for n in shape]
        turned = tuple(shape[i] for i in perm)
        a = self.record("Reshape", [a, np.array(sizes, np.int64)], shape, positive=a.positive)
        a = self.record("Transpose", [a], turned, positive=a.positive, perm=perm)
        ends = [n if isinstance(n, int) or not isinstance(n, tuple) else _product(n) for n in folded]
        sizes = [n if isinstance(n, int) else -1 for n in ends]
        return self.record("Reshape", [a, np.array(sizes, np.int64)], tuple(ends), positive=a.positive)

    def window_sum(self, x: Symbol, window: Window) -> Symbol:
        channels = int(x.shape[-window.rank - 1])
        return self.conv(x, self._ones_weight((channels, 1, *window.kernel)), window, channels)

    def window_sum_adjoint(self, r: Symbol, window: Window, size: Sequence[int]) -> Symbol:
        channels = int(r.shape[-window.rank - 1])
        return self.conv_adjoint(r, self._ones_weight((channels, 1, *window.kernel)), window, size, channels)

    def _ones_weight(self, shape: tuple[int, ...]) -> Symbol:
        """Ones that the file holds as a node, as a large window would hold many."""
        one = gs.Constant(self._name("Constant"), np.ones(1, np.float32))
        return self.record("ConstantOfShape", [np.array(shape, np.int64)], shape, positive=True, value=one)

    def window_max_adjoint(self, r: Symbol, x: Symbol, y: Symbol, window: Window) -> Symbol:
        """By the Indices of a MaxPool over the same input: they are flat over all axes, and the first maximum wins."""
        n = window.rank
        places = self.record(
            "MaxPool", [x], y.shape, dtype=np.int64, outputs=2, kernel_shape=list(window.kernel),
            strides=list(window.strides), dilations=list(window.dilations), pads=[*window.begin, *window.end],
        )  # fmt: skip
        places.tensor.inputs[0].outputs[0].dtype = np.float32
        flat = np.array([-1], np.int64)
        zeros = self.record("Mul", [x, self._lift(0.0)], x.shape)
        if r.bare:
            data = self.record("Reshape", [zeros, flat], ("flat",))
            index = self.record("Reshape", [places, flat], ("flat",), dtype=np.int64)
            updates = self.record("Reshape", [r, flat], ("flat",))
            scattered = self.record("ScatterElements", [data, index, updates], ("flat",), axis=0, reduction="add")
        else:
            targets = r.shape[0]
            assert isinstance(targets, int)
            row = np.array([1, -1], np.int64)
            repeat = np.array([targets, 1], np.int64)
            data = self.record("Expand", [self.record("Reshape", [zeros, row], (1, "flat")), repeat], (targets, "flat"))
            index = self.record("Reshape", [places, row], (1, "flat"), dtype=np.int64)
            index = self.record("Expand", [index, repeat], (targets, "flat"), dtype=np.int64)
            updates = self.record("Reshape", [r, np.array([targets, -1], np.int64)], (targets, "flat"))
            scattered = self.record(
                "ScatterElements", [data, index, updates], (targets, "flat"), axis=1, reduction="add"
            )
        shape = (r.shape[0], *x.shape)
        sizes = [d if isinstance(d, int) else -1 for d in (x.shape if r.bare else shape)]
        assert n >= 1
        return self.record("Reshape", [scattered, np.array(sizes, np.int64)], shape, bare=r.bare, positive=r.positive)

    def _folded(self, x: Symbol, window: Window) -> tuple[Symbol, Shape]:
        """`x` with all axes before the channels made one, as Conv wants it, and what they were."""
        lead = x.shape[: -window.rank - 1]
        if x.bare or len(lead) == 1:
            return x, lead
        batch: Dim = prod(lead) if all(isinstance(n, int) for n in lead) else BATCH
        sizes = [n if isinstance(n, int) else -1 for n in (batch, *x.shape[-window.rank - 1 :])]
        folded = self.record(
            "Reshape", [x, np.array(sizes, np.int64)], (batch, *x.shape[-window.rank - 1 :]), positive=x.positive
        )
        return folded, lead

    def _unfolded(self, y: Symbol, lead: Shape, window: Window) -> Symbol:
        if y.bare or len(lead) == 1:
            return y
        shape = (*lead, *y.shape[-window.rank - 1 :])
        sizes = [n if isinstance(n, int) else -1 for n in shape]
        return self.record("Reshape", [y, np.array(sizes, np.int64)], shape, positive=y.positive)


def _product(pair: tuple[Dim, Dim]) -> Dim:
    a, b = pair
    return a * b if isinstance(a, int) and isinstance(b, int) else BATCH


def _sizes(x: Symbol, window: Window) -> tuple[int, ...]:
    size = x.shape[-window.rank :]
    if not all(isinstance(n, int) for n in size):
        raise EngineError(f"spatial size {size} is not known: give the input's size")
    return size  # type: ignore[return-value]
