"""AffineGrid, whose body in the specification is a branch over the number of axes, as one product of matrices."""

from __future__ import annotations

import numpy as np

from onnxcam.canonise.expansion.body import Body, Operand, Refused, Unknown
from onnxcam.canonise.expansion.table import expansion


@expansion("AffineGrid", domain="", into="MatMul, Transpose, Reshape")
def _affine_grid(b: Body) -> Operand:
    """theta (N, d, d + 1) applied to the points of a regular grid: (N, *sizes, d), the last axis of the image first."""
    sizes = _sizes(b)
    aligned = bool(b.attr("align_corners", 0))
    axes = [np.linspace(-1, 1, n) if aligned else (2 * np.arange(n) + 1) / n - 1 for n in sizes]
    points = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(sizes)], -1).reshape(-1, len(sizes) + 1)
    moved = b("MatMul", b.number(points), b.transpose(b.input(0), 0, 2, 1))
    return b.reshape(moved, 0, *sizes, len(sizes))


def _sizes(b: Body) -> list[int]:
    """Height and width (and depth before them) of the grid: from the constant that says so, else from its shape."""
    given = b.constant(1)
    if given is not None:
        return [int(n) for n in given[2:]]
    shape = b.node.outputs[0].shape
    if shape is None:
        raise Unknown("the sizes of the grid are computed in the graph")
    sizes = [int(n) for n in shape[1:-1] if isinstance(n, (int, np.integer))]
    if len(sizes) < len(shape) - 2:
        raise Refused("AffineGrid whose sizes are computed in the graph")
    return sizes
