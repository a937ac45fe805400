"""Places that only the running model knows: index arithmetic, picking and putting back, as nodes of an ONNX graph.

By GatherElements and ScatterElements: every runtime has them, and adding by ScatterElements is neither racy nor wrong
(spec 3.0). A known index is recorded so too where the batch is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcam.engines.places import Index, Places
from onnxcam.engines.symbols import Dim, Symbol


class RecordedPlaces(Places):
    """`Places` for an index that may be a symbol. Axes count from the end, but from the start in what is recorded: the
    onnx package's evaluator wants it so."""

    if TYPE_CHECKING:
        record: Any
        zeros_like: Any
        ones_like: Any
        constant: Any

    def index_shaped(self, index: Index, shape: Sequence[Dim]) -> Index:
        if not isinstance(index, Symbol):
            return super().index_shaped(index, shape)
        sizes = np.array([n if isinstance(n, int) else -1 for n in shape], np.int64)
        return index if index.shape == tuple(shape) else self._int("Reshape", [index, sizes], tuple(shape))

    def index_repeated(self, index: Index, shape: Sequence[Dim]) -> Index:
        if not isinstance(index, Symbol) and all(isinstance(n, int) for n in shape):
            return super().index_repeated(index, shape)
        return self._repeated(self._symbol(index), tuple(shape))

    def _repeated(self, index: Symbol, shape: tuple[Dim, ...]) -> Symbol:
        if index.shape == shape:
            return index
        sizes = np.array([n if isinstance(n, int) else 1 for n in shape], np.int64)
        return self._int("Expand", [index, sizes], shape)

    def index_within(self, index: Index, size: int) -> Index:
        if not isinstance(index, Symbol):
            return super().index_within(index, size)
        return self._int("Mod", [index, np.array(size, np.int64)], index.shape)

    def index_of_coordinates(self, index: Index, sizes: Sequence[int]) -> Index:
        if not isinstance(index, Symbol):
            return super().index_of_coordinates(index, sizes)
        strides = np.array([prod(int(n) for n in sizes[i + 1 :]) for i in range(len(sizes))], np.int64)
        inside = self._int("Mod", [index, np.array([int(n) for n in sizes], np.int64)], index.shape)
        scaled = self._int("Mul", [inside, strides], index.shape)
        return self._int("ReduceSum", [scaled, np.array([-1], np.int64)], index.shape[:-1], keepdims=0)

    def get_elements(self, r: Symbol, index: Index, axis: int) -> Symbol:
        if not self._runs(index, r.shape[1:]):
            return super().get_elements(r, index, axis)
        index = self._for_targets(index, r)
        shape = (r.shape[0], *index.shape) if r.bare else index.shape
        return self.record(
            "GatherElements", [r, index], shape, bare=r.bare, positive=r.positive, axis=axis + r.ndim - r.bare
        )

    def put_elements(self, r: Symbol, index: Index, axis: int, x: Symbol) -> Symbol:
        if not self._runs(index, x.shape):
            return super().put_elements(r, index, axis, x)
        index, data = self._for_targets(index, r), self.zeros_like(x)
        if not r.bare:
            sizes = np.array([r.shape[0], *(1,) * len(x.shape)], np.int64)
            data = self.record("Expand", [data, sizes], (r.shape[0], *x.shape), positive=True)
        return self.record(
            "ScatterElements", [data, index, r], (r.shape[0], *x.shape), bare=r.bare, positive=r.positive,
            axis=axis + r.ndim - r.bare, reduction="add",
        )  # fmt: skip

    def untouched(self, index: Index, axis: int, x: Symbol) -> Symbol:
        if not self._runs(index, x.shape):
            return super().untouched(index, axis, x)
        index = self._symbol(index)
        nothing = self.zeros_like(index)
        return self.record(
            "ScatterElements", [self.ones_like(x), index, nothing], x.shape, positive=True, axis=axis + x.ndim
        )

    def _int(self, op: str, inputs: Sequence[Any], shape: tuple[Dim, ...], **attrs: Any) -> Symbol:
        return self.record(op, inputs, shape, dtype=np.int64, **attrs)

    def _symbol(self, index: Index) -> Symbol:
        if isinstance(index, Symbol):
            return index
        return Symbol(self, self.constant(np.asarray(index, np.int64)), np.shape(index))  # type: ignore[arg-type]

    @staticmethod
    def _runs(index: Index, shape: Sequence[Dim]) -> bool:
        return isinstance(index, Symbol) or not all(isinstance(n, int) for n in shape)

    def _for_targets(self, index: Index, r: Symbol) -> Symbol:
        """`index` repeated for each target of `r`, where `r` holds an axis of them."""
        index = self._symbol(index)
        return index if r.bare else self._repeated(index, (r.shape[0], *index.shape))
