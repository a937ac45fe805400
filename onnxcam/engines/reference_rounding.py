"""QuantizeLinear and DequantizeLinear for the reference evaluator, which has none for opsets before 19."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxcam.dequantised import along, integer_range


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Scales or zero points so that they broadcast against a tensor of that shape."""
    if not block or values.ndim < 2:
        return along(values, len(shape), axis)
    whole = np.repeat(values, block, axis)
    return whole[tuple(slice(n) for n in shape)]


def rounding_ops() -> list[Any]:
    """The two as implementations that the evaluator takes, in the precision of their input or scale."""
    from onnx.reference.op_run import OpRun

    class QuantizeLinear(OpRun):
        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, x, y_scale, y_zero_point=None, axis=None, block_size=None, output_dtype=None, precision=None,
            saturate=None,
        ):  # fmt: skip
            if y_zero_point is None:
                kind = output_dtype or onnx.TensorProto.UINT8
                y_zero_point = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(kind))
            limits = integer_range(y_zero_point.dtype)
            if limits is None:
                raise NotImplementedError(f"rounding to {y_zero_point.dtype}")
            where = (x.shape, 1 if axis is None else axis, block_size or 0)
            q = np.rint(x / _spread(y_scale, *where)) + _spread(y_zero_point.astype(np.int32), *where)
            return (np.clip(q, *limits).astype(y_zero_point.dtype),)

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, x, x_scale, x_zero_point=None, axis=None, block_size=None, output_dtype=None
        ):
            where = (x.shape, 1 if axis is None else axis, block_size or 0)
            real = x.astype(x_scale.dtype)
            if x_zero_point is not None:
                real = real - _spread(x_zero_point.astype(x_scale.dtype), *where)
            return (real * _spread(x_scale, *where),)

    return [QuantizeLinear, DequantizeLinear]
