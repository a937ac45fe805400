"""The array engine: every primitive computed at once on NumPy arrays, or on any library with the same standard API.

This is the reference. It is written against the Python array API standard and nothing beyond it, so that CuPy runs the
same lines as NumPy. Two conventions carry the whole file. Axes are counted from the end, and a relevance array has one
more axis in front, the targets: `(T, *tensor.shape)`. A primitive therefore treats whatever stands before the axes it
works on as a batch, and every adjoint takes T targets in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from onnxcam.engines.places import FEW, Places, folds
from onnxcam.engines.window import Window
from onnxcam.errors import UsageError

Array = Any  # an array of the library at hand


class ArrayOps(Places):
    """The primitives over one array library.

    Args:
        xp: the library's namespace (`numpy`, `cupy`, or one that follows the array API standard).
        dtype: "float32" or "float64", the type all relevance is computed in.
        to_host: turns an array of the library into a NumPy array.
    """

    def __init__(self, xp: Any, dtype: str = "float32", to_host: Any = np.asarray):
        self.xp = xp
        self.dtype = getattr(xp, dtype)
        self.itemsize = np.dtype(dtype).itemsize
        self.to_host = to_host
        # Below this a sum of non-negative contributions counts as zero: its quotients would overflow.
        self.tiny = 1e-20 if dtype == "float32" else 1e-200

    # -- between the host and the library ------------------------------------------------------------------------

    def asarray(self, value: np.ndarray) -> Array:
        """A float array of the engine's type from a NumPy array of any real type."""
        floats = np.float64 if self.dtype == getattr(self.xp, "float64", None) else np.float32
        return self.xp.asarray(np.ascontiguousarray(np.asarray(value).astype(floats)))

    def index_of(self, x: Array) -> np.ndarray:
        """Whole numbers that were computed as floats, as an index."""
        return np.asarray(self.to_host(x)).astype(np.int64)

    def zeros(self, shape: Sequence[int]) -> Array:
        return self.xp.zeros(tuple(shape), dtype=self.dtype)

    def zeros_like(self, x: Array) -> Array:
        return self.xp.zeros_like(x)

    def ones_like(self, x: Array) -> Array:
        return self.xp.ones_like(x)

    # -- elementwise ---------------------------------------------------------------------------------------------

    def where(self, condition: Array, a: Array | float, b: Array | float) -> Array:
        return self.xp.where(condition, self._lift(a), self._lift(b))

    def stable_quotient(self, r: Array, z: Array, eps: float) -> Array:
        """r / z, with z pushed away from zero by `eps` in its own direction; sign(0) = +1."""
        return r / (z + self.where(z < 0, -eps, eps))

    def vanishes_below(self, r: Array, z: Array) -> bool:
        """Whether `r` is known to be 0 wherever `z` is not positive."""
        return not bool(self.xp.any(self.where(z > 0, 0.0, r) != 0))

    def positive(self, x: Array) -> Array:
        return self.where(x > 0, x, 0.0)

    def negative(self, x: Array) -> Array:
        return self.where(x < 0, x, 0.0)

    def any_negative(self, x: Array) -> bool:
        return bool(self.xp.any(x < 0))

    def mask(self, condition: Array) -> Array:
        """1 where the condition holds, else 0, as floats."""
        return self.xp.astype(condition, self.dtype)

    def abs(self, x: Array) -> Array:
        return self.xp.abs(x)

    def sign(self, x: Array) -> Array:
        return self.xp.sign(x)

    def exp(self, x: Array) -> Array:
        return self.xp.exp(x)

    def log(self, x: Array) -> Array:
        return self.xp.log(x)

    def sqrt(self, x: Array) -> Array:
        return self.xp.sqrt(x)

    def sin(self, x: Array) -> Array:
        return self.xp.sin(x)

    def cos(self, x: Array) -> Array:
        return self.xp.cos(x)

    def floor(self, x: Array) -> Array:
        return self.xp.floor(x)

    def round(self, x: Array) -> Array:
        """To the nearest whole number, halves to the even one."""
        return self.xp.round(x)

    def tanh(self, x: Array) -> Array:
        return self.xp.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        # tanh neither overflows nor underflows, unlike exp(-x).
        return 0.5 * (self.xp.tanh(0.5 * x) + 1.0)

    def power(self, x: Array, p: Array | float) -> Array:
        return self.xp.pow(x, self._lift(p))

    # -- reductions and layout -----------------------------------------------------------------------------------

    def sum(self, x: Array, axes: Sequence[int], keepdims: bool = False) -> Array:
        return self.xp.sum(x, axis=tuple(axes), keepdims=keepdims) if axes else x

    def mean(self, x: Array, axes: Sequence[int], keepdims: bool = False) -> Array:
        return self.xp.mean(x, axis=tuple(axes), keepdims=keepdims) if axes else x

    def prod(self, x: Array, axes: Sequence[int]) -> Array:
        return self.xp.prod(x, axis=tuple(axes), keepdims=True) if axes else x

    def min(self, x: Array, axes: Sequence[int]) -> Array:
        return self.xp.min(x, axis=tuple(axes), keepdims=True)

    def max(self, x: Array, axes: Sequence[int]) -> Array:
        return self.xp.max(x, axis=tuple(axes), keepdims=True)

    def reshape(self, r: Array, shape: Sequence[int]) -> Array:
        """`r` of shape (T, ...) as (T, *shape)."""
        return self.xp.reshape(r, (r.shape[0], *shape))

    def shaped(self, x: Array, shape: Sequence[int]) -> Array:
        """`x` reshaped whole, with no target axis set apart."""
        return self.xp.reshape(x, tuple(shape))

    def lifted(self, x: Array) -> Array:
        """A tensor as if it were relevance of one target."""
        return x[None, ...]

    def lowered(self, r: Array) -> Array:
        """Relevance of one target as a tensor."""
        return r[0, ...]

    def by_image(self, r: Array, images: int) -> Array:
        """`r` of shape (T, N*k, ...) as (T, N, k*...)."""
        return self.xp.reshape(r, (r.shape[0], images, -1))

    def permute(self, r: Array, perm: Sequence[int]) -> Array:
        """Permute the axes behind the first: `perm` as in ONNX Transpose, for the tensor without its target axis."""
        return self.xp.permute_dims(r, (0, *(p + 1 for p in perm)))

    def expand(self, r: Array, shape: Sequence[int]) -> Array:
        """Broadcast `r` of shape (T, ...) to (T, *shape)."""
        short = len(shape) - (r.ndim - 1)
        r = self.xp.reshape(r, (r.shape[0], *(1,) * short, *r.shape[1:]))
        return self.xp.broadcast_to(r, (r.shape[0], *shape))

    def unbroadcast(self, r: Array, shape: Sequence[int]) -> Array:
        """Adjoint of broadcasting a tensor of `shape`: sum (T, ...) over the axes that were repeated."""
        if tuple(r.shape[1:]) == tuple(shape):
            return r
        extra = r.ndim - 1 - len(shape)
        r = self.sum(r, tuple(range(1, 1 + extra)))
        repeated = tuple(i + 1 for i, n in enumerate(shape) if n == 1 and r.shape[i + 1] != 1)
        return self.sum(r, repeated, keepdims=True)

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return self.xp.concat(list(arrays), axis=axis)

    def slice(self, x: Array, axis: int, start: int, stop: int, step: int = 1) -> Array:
        return x[self._at(x, axis, slice(start, stop, step))]

    def take(self, x: Array, index: np.ndarray, axis: int) -> Array:
        """Entries `index` (1-D, non-negative, on the host) of `x` along `axis`."""
        return self.xp.take(x, self.xp.asarray(index), axis=axis)

    def scatter_add(self, r: Array, index: np.ndarray, axis: int, size: int) -> Array:
        """Adjoint of `take`: add the entries of `r` at the places `index` of an axis of `size`.

        An index below zero drops its entry. Written as a few gathers, one for each repetition of the most frequent
        index, because gathering is what every array library has and does in the same order each time; many entries of
        one place are first added up pair by pair.
        """
        index = np.asarray(index)
        kept = np.flatnonzero(index >= 0)
        if 0 < kept.size < index.size and kept[-1] - kept[0] + 1 == kept.size:
            r, index = self.slice(r, axis, int(kept[0]), int(kept[-1]) + 1), index[kept]
        if np.array_equal(index, np.arange(size)):
            return r
        steps = np.diff(index)
        if index.size and index[0] >= 0 and (index.size == 1 or (steps[0] > 0 and (steps == steps[0]).all())):
            step = int(steps[0]) if index.size > 1 else 1
            out = self.zeros([*self._replace(r.shape, axis, size)])
            out[self._at(out, axis, slice(int(index[0]), int(index[-1]) + 1, step))] = r
            return out
        if np.unique(index, return_counts=True)[1].max(initial=0) > FEW:
            rounds, index = folds(index)
            for one, other in rounds:
                padded = self.concat([r, self.zeros(self._replace(r.shape, axis, 1))], axis)
                r = self.take(padded, one, axis) + self.take(padded, other, axis)
        padded = self.concat([r, self.zeros(self._replace(r.shape, axis, 1))], axis)
        out = self.zeros(self._replace(r.shape, axis, size))
        positions = np.flatnonzero(index >= 0)
        while positions.size:
            places, first = np.unique(index[positions], return_index=True)
            source = np.full(size, index.size)
            source[places] = positions[first]
            out = out + self.take(padded, source, axis)
            positions = np.delete(positions, first)
        return out

    def matmul(self, a: Array, b: Array) -> Array:
        return self.xp.matmul(a, b)

    def swap(self, a: Array) -> Array:
        """The last two axes exchanged."""
        return self.xp.permute_dims(a, (*range(a.ndim - 2), a.ndim - 1, a.ndim - 2))

    def along(self, x: Array, matrix: Array, axis: int) -> Array:
        """Apply `matrix` (out, in) along `axis` (negative) of `x`."""
        if axis == -1:
            return self.xp.matmul(x, self.swap(matrix))
        if axis == -2:
            return self.xp.matmul(matrix, x)
        order = list(range(x.ndim))
        order[axis], order[-1] = order[-1], order[axis]
        moved = self.xp.matmul(self.xp.permute_dims(x, tuple(order)), self.swap(matrix))
        return self.xp.permute_dims(moved, tuple(order))

    # -- windows -------------------------------------------------------------------------------------------------

    def conv(self, x: Array, w: Array, window: Window, group: int = 1) -> Array:
        """Convolution without bias: x (..., C, *size), w (M, C/group, *kernel) -> (..., M, *output)."""
        lead, channels, size = self._split(x, window)
        output = window.output(size)
        m, per_group, cells = w.shape[0], w.shape[1], prod(window.kernel)
        x = self.xp.reshape(x, (prod(lead), channels, *size))
        if per_group == 1 and m == group and not window.pointwise:
            x = self._pad(x, window)
            weights = self.xp.reshape(w, (m, cells))
            y = None
            for k, tap in enumerate(window.taps(output)):
                term = self.xp.reshape(weights[:, k], (m, *(1,) * window.rank)) * x[(..., *tap)]
                y = term if y is None else y + term
            return self.xp.reshape(y, (*lead, m, *output))
        if window.pointwise:
            columns = x
        else:
            x = self._pad(x, window)
            columns = self.xp.stack([x[(..., *tap)] for tap in window.taps(output)], axis=2)
        columns = self.xp.reshape(columns, (prod(lead), group, per_group * cells, prod(output)))
        y = self.xp.matmul(self.xp.reshape(w, (group, m // group, per_group * cells)), columns)
        return self.xp.reshape(y, (*lead, m, *output))

    def conv_adjoint(self, r: Array, w: Array, window: Window, size: Sequence[int], group: int = 1) -> Array:
        """Adjoint of `conv` for an input of spatial `size`: r (..., M, *output) -> (..., C, *size)."""
        lead, m, output = self._split(r, window)
        per_group, cells = w.shape[1], prod(window.kernel)
        channels = per_group * group
        if per_group == 1 and m == group:
            weights = self.xp.reshape(w, (m, cells))
            r = self.xp.reshape(r, (prod(lead), m, *output))
            parts = [self.xp.reshape(weights[:, k], (m, *(1,) * window.rank)) * r for k in range(cells)]
        else:
            r = self.xp.reshape(r, (prod(lead), group, m // group, prod(output)))
            columns = self.xp.matmul(self.swap(self.xp.reshape(w, (group, m // group, per_group * cells))), r)
            if window.pointwise:
                return self.xp.reshape(columns, (*lead, channels, *size))
            columns = self.xp.reshape(columns, (prod(lead), channels, cells, *output))
            parts = [columns[:, :, k, ...] for k in range(cells)]
        x = self._overlay(parts, (prod(lead), channels), window, tuple(size), output)
        return self.xp.reshape(x, (*lead, channels, *size))

    def conv_weight_adjoint(self, r: Array, x: Array, window: Window, kernel: Sequence[int], group: int = 1) -> Array:
        """Adjoint of `conv` with respect to the weight: r (..., N, M, *output), x (..., N, C, *size), one of the two
        with an axis of targets in front -> (T, M, C/group, *kernel)."""
        rank, output = window.rank, tuple(r.shape[-window.rank :])
        m, c = r.shape[-rank - 1], x.shape[-rank - 1]
        rows = self.xp.reshape(r, (*r.shape[: -rank - 1], group, m // group, prod(output)))
        x = self._pad(x, window)
        parts = []
        for tap in window.taps(output):
            cells = self.xp.reshape(x[(..., *tap)], (*x.shape[: -rank - 1], group, c // group, prod(output)))
            parts.append(self.xp.sum(self.xp.matmul(rows, self.swap(cells)), axis=-4))
        w = self.xp.stack(parts, axis=-1)
        return self.xp.reshape(w, (w.shape[0], m, c // group, *kernel))

    def window_sum(self, x: Array, window: Window) -> Array:
        """Sum over each window; padding counts as zero."""
        output = window.output(self._split(x, window)[2])
        x = self._pad(x, window)
        return sum(x[(..., *tap)] for tap in window.taps(output))

    def window_sum_adjoint(self, r: Array, window: Window, size: Sequence[int]) -> Array:
        """Adjoint of `window_sum` for an input of spatial `size`."""
        output = tuple(r.shape[-window.rank :])
        return self._overlay([r] * prod(window.kernel), r.shape[: -window.rank], window, tuple(size), output)

    def window_max(self, x: Array, window: Window) -> Array:
        """Maximum over each window; padding never wins."""
        output = window.output(self._split(x, window)[2])
        x = self._pad(x, window, -float("inf"))
        best = None
        for tap in window.taps(output):
            cell = x[(..., *tap)]
            best = cell if best is None else self.where(cell > best, cell, best)
        return best

    def window_max_adjoint(self, r: Array, x: Array, y: Array, window: Window) -> Array:
        """Send each entry of `r` (T, ..., *output) to the cell of its window that won: the first that equals `y`."""
        size, output = tuple(x.shape[-window.rank :]), tuple(y.shape[-window.rank :])
        x = self._pad(x, window, -float("inf"))
        open_ = self.xp.ones(y.shape, dtype=self.xp.bool)
        parts = []
        for tap in window.taps(output):
            won = self.xp.logical_and(open_, x[(..., *tap)] == y)
            open_ = self.xp.logical_and(open_, self.xp.logical_not(won))
            parts.append(self.where(won, r, 0.0))
        return self._overlay(parts, r.shape[: -window.rank], window, size, output)

    # -- inside --------------------------------------------------------------------------------------------------

    def _lift(self, value: Array | float) -> Array:
        return self.xp.asarray(value, dtype=self.dtype) if isinstance(value, int | float) else value

    @staticmethod
    def _at(x: Array, axis: int, where: Any) -> tuple[Any, ...]:
        key: list[Any] = [slice(None)] * x.ndim
        key[axis] = where
        return tuple(key)

    @staticmethod
    def _replace(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
        out = list(shape)
        out[axis] = size
        return tuple(out)

    @staticmethod
    def _split(x: Array, window: Window) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        shape, n = tuple(x.shape), window.rank
        return shape[: -n - 1], shape[-n - 1], shape[-n:]

    def _pad(self, x: Array, window: Window, value: float = 0.0) -> Array:
        if not any(window.begin + window.end):
            return x
        size = tuple(x.shape[-window.rank :])
        out = self.xp.full((*x.shape[: -window.rank], *window.padded(size)), value, dtype=x.dtype)
        inside = tuple(slice(b, b + s) for b, s in zip(window.begin, size, strict=True))
        out[(..., *inside)] = x
        return out

    def _overlay(
        self,
        parts: Sequence[Array],
        lead: Sequence[int],
        window: Window,
        size: tuple[int, ...],
        output: tuple[int, ...],
    ) -> Array:
        """Add each kernel cell's part where that cell read the padded input, then drop the padding."""
        padded = self.zeros((*lead, *window.padded(size)))
        for part, tap in zip(parts, window.taps(output), strict=True):
            padded[(..., *tap)] = padded[(..., *tap)] + part
        inside = tuple(slice(b, b + s) for b, s in zip(window.begin, size, strict=True))
        return padded[(..., *inside)]


def array_ops(engine: str = "numpy", dtype: str = "float32") -> ArrayOps:
    """The primitives on NumPy or CuPy.

    Raises:
        UsageError: CuPy is asked for and not installed, or finds no device.
    """
    if engine == "numpy":
        return ArrayOps(np, dtype)
    if engine != "cupy":
        raise UsageError(f"unknown array engine {engine!r}: it is one of numpy, cupy")
    try:
        import cupy
        from array_api_compat import cupy as namespace

        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise UsageError(
            f"engine 'cupy' needs CuPy ({error}): pip install 'onnxcam[gpu]', or use --engine numpy"
        ) from error
    except Exception as error:  # CuPy raises its own CUDARuntimeError, which exists only where CuPy does
        raise UsageError(f"engine 'cupy' finds no CUDA device ({error}): use --engine numpy") from error
    return ArrayOps(namespace, dtype, cupy.asnumpy)
