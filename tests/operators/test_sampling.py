"""GridSample, DeformConv and RoiAlign: what is sampled, and where.

Oracle for gradients: torch's autograd in float64, 1e-9 (DeformConv written there with grid_sample, cell by cell).
Oracle for values: ONNX Runtime, 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from walking import ENGINES, as_written, carry

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError
from tests.operators.single_node import Single, agree, build, check_map, check_moves, cotangents, runtime
from tests.operators.test_linear import normal

GRADIENT = COMPOSITES["gradient"]


def known(model: onnx.ModelProto, shape: Sequence[int], name: str = "o0") -> onnx.ModelProto:
    """With the output's shape, which inference does not tell in float64."""
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, shape))
    return model


def gradients(y: torch.Tensor, leaves: Sequence[torch.Tensor], start: np.ndarray) -> list[np.ndarray]:
    rows = [torch.autograd.grad(y, leaves, torch.from_numpy(u), retain_graph=True) for u in start]
    return [np.stack([row[i].numpy() for row in rows]) for i in range(len(leaves))]


def grid_of(*shape: int, reach: float = 1.3) -> np.ndarray:
    """Places inside and outside of the picture."""
    return np.random.default_rng(3).uniform(-reach, reach, shape)


GRIDS = [
    *product(["linear", "nearest", "cubic"], ["zeros", "border", "reflection"], [0, 1], [2]),
    *product(["linear", "nearest"], ["zeros", "border", "reflection"], [0, 1], [3]),
]
TORCH = {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode, padding, align, rank", GRIDS)
def test_the_gradient_of_grid_sample_is_that_of_torch(
    mode: str, padding: str, align: int, rank: int, engine: str
) -> None:
    """With respect to the picture, and to the grid."""
    x = normal(2, 3, 5, 6, *((4,) if rank == 3 else ())).astype(np.float64)
    grid = grid_of(2, 3, 4, *((2,) if rank == 3 else ()), rank)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, grid)]
    y = F.grid_sample(*leaves, TORCH[mode], padding, bool(align))
    model, feeds = build("GridSample", [x, grid], opset=20, mode=mode, padding_mode=padding, align_corners=align)
    start = cotangents(y.shape)
    values = feeds | {"o0": y.detach().numpy()}
    flow = carry(engine, as_written(known(model, y.shape)), values, {"o0": start}, ["i0", "i1"], GRADIENT)
    for name, want in zip(("i0", "i1"), gradients(y, leaves, start), strict=True):
        if np.any(want):
            agree(flow.relevance[name], want, 1e-9)
        else:
            assert not np.any(flow.relevance[name])


@pytest.mark.parametrize(
    "mode, padding, align", list(product(["bilinear", "nearest"], ["zeros", "border", "reflection"], [0, 1]))
)
def test_grid_sample_reads_what_onnx_runtime_reads(mode: str, padding: str, align: int) -> None:
    """The map that rules see, and its adjoint; before opset 20 modes have other names."""
    x, grid = normal(2, 3, 5, 6), grid_of(2, 3, 4, 2).astype(np.float32)
    model, feeds = build("GridSample", [x, grid], (1,), opset=16, mode=mode, padding_mode=padding, align_corners=align)
    check_map(model, feeds)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("computed", [False, True])
def test_relevance_of_grid_sample_goes_to_the_picture_alone(mode: str, computed: bool, engine: str) -> None:
    """All of it, where no sample lies outside; z-plus on a positive picture conserves."""
    x, grid = np.abs(normal(1, 3, 5, 6)).astype(np.float64), grid_of(1, 3, 4, 2, reach=0.6)
    model, feeds = build("GridSample", [x, grid], () if computed else (1,), opset=20, mode=mode)
    y = F.grid_sample(torch.from_numpy(x), torch.from_numpy(grid), TORCH[mode], align_corners=False).numpy()
    start = np.abs(cotangents(y.shape))
    graph = as_written(known(model, y.shape))
    flow = carry(engine, graph, feeds | {"o0": y}, {"o0": start}, graph.inputs, COMPOSITES["relevance_cam"])
    assert set(flow.relevance) == {"i0"}
    agree(flow.relevance["i0"].reshape(2, -1).sum(1), start.reshape(2, -1).sum(1), 1e-9)
    assert (flow.relevance["i0"] >= 0).all()


def deform(
    x: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | None,
    a: dict[str, Any],
) -> torch.Tensor:
    """A deformable convolution by grid_sample: each cell of the kernel reads the whole picture, moved."""
    (n, c, h, wide), (m, per_group, kh, kw) = x.shape, w.shape
    oh, ow = offset.shape[2:]
    groups, strides, dilations, pads = a["offset_group"], a["strides"], a["dilations"], a["pads"]
    offset = offset.reshape(n, groups, kh * kw, 2, oh, ow)
    size = torch.tensor([h, wide], dtype=x.dtype)
    cells = []
    for k in range(kh * kw):
        base = [torch.arange(o, dtype=x.dtype) * s - p for o, s, p in zip((oh, ow), strides, pads[:2], strict=True)]
        rows = torch.stack(torch.meshgrid(*base, indexing="ij")) + torch.tensor(
            [(k // kw) * dilations[0], (k % kw) * dilations[1]], dtype=x.dtype
        ).reshape(2, 1, 1)
        read = []
        for g in range(groups):
            at = (rows + offset[:, g, k]).permute(0, 2, 3, 1)
            at = (2 * at / (size - 1) - 1).flip(-1)
            part = F.grid_sample(x[:, g * c // groups : (g + 1) * c // groups], at, "bilinear", "zeros", True)
            if mask is not None:
                part = part * mask.reshape(n, groups, kh * kw, 1, oh, ow)[:, g, k]
            read.append(part)
        cells.append(torch.cat(read, 1))
    columns = torch.stack(cells, 2).reshape(n, a["group"], per_group * kh * kw, oh * ow)
    y = w.reshape(a["group"], m // a["group"], -1) @ columns
    return y.reshape(n, m, oh, ow) + b.reshape(-1, 1, 1)


DEFORMED = [
    ({"group": 1, "offset_group": 1, "strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1]}, True),
    ({"group": 2, "offset_group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [0, 1, 1, 2]}, True),
    ({"group": 1, "offset_group": 4, "strides": [1, 2], "dilations": [1, 1], "pads": [0, 0, 0, 0]}, False),
]


def deformed(case: dict[str, Any], masked: bool) -> list[np.ndarray | None]:
    """Arguments of a DeformConv of x (2, 4, 6, 7) by a kernel of 3 x 2."""
    rng, (kh, kw) = np.random.default_rng(0), (3, 2)
    extents = [(k - 1) * d + 1 for k, d in zip((kh, kw), case["dilations"], strict=True)]
    pads = [case["pads"][i] + case["pads"][2 + i] for i in (0, 1)]
    out = [(n + p - e) // s + 1 for n, p, e, s in zip((6, 7), pads, extents, case["strides"], strict=True)]
    groups = case["offset_group"]
    offset = rng.uniform(-1.5, 1.5, (2, groups * kh * kw * 2, *out))
    mask = rng.uniform(0, 1, (2, groups * kh * kw, *out)) if masked else None
    w = rng.standard_normal((6, 4 // case["group"], kh, kw))
    return [rng.standard_normal((2, 4, 6, 7)), w, offset, rng.standard_normal(6), mask]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case, masked", DEFORMED)
def test_the_gradient_of_a_deformable_convolution(case: dict[str, Any], masked: bool, engine: str) -> None:
    """With respect to all five operands."""
    arrays = [a for a in deformed(case, masked) if a is not None]
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = deform(*leaves[:4], leaves[4] if masked else None, case)
    model, feeds = build("DeformConv", arrays, opset=19, **case)
    start = cotangents(y.shape)
    graph = as_written(known(model, y.shape))
    flow = carry(engine, graph, feeds | {"o0": y.detach().numpy()}, {"o0": start}, list(feeds), GRADIENT)
    for name, want in zip(feeds, gradients(y, leaves, start), strict=True):
        agree(flow.relevance[name], want, 1e-9)


@pytest.mark.parametrize("case, masked", DEFORMED)
def test_a_deformable_convolution_computes_what_onnx_runtime_computes(case: dict[str, Any], masked: bool) -> None:
    arrays = [None if a is None else a.astype(np.float32) for a in deformed(case, masked)]
    check_map(*build("DeformConv", arrays, range(1, 5), opset=19, **case))


@pytest.mark.parametrize("engine", ENGINES)
def test_relevance_of_a_deformable_convolution_goes_to_the_picture_alone(engine: str) -> None:
    """Bias apart, z-plus on a positive picture loses nothing; offsets and mask get none."""
    case = DEFORMED[0][0]
    x, w, offset, _, mask = deformed(case, masked=True)
    assert x is not None and w is not None and offset is not None and mask is not None
    arrays = [np.abs(x), np.abs(w), 0.3 * offset, np.zeros(6), mask]
    y = deform(*map(torch.from_numpy, arrays), case).numpy()
    model, feeds = build("DeformConv", arrays, (1, 3), opset=19, **case)
    graph, start = as_written(known(model, y.shape)), np.abs(cotangents(y.shape))
    flow = carry(engine, graph, feeds | {"o0": y}, {"o0": start}, graph.inputs, COMPOSITES["relevance_cam"])
    assert set(flow.relevance) == {"i0"}
    agree(flow.relevance["i0"].reshape(2, -1).sum(1), start.reshape(2, -1).sum(1), 1e-9)


ROIS = np.array([[0, 0, 3, 4], [1.2, 0.7, 5.9, 4.1], [-2, 1, 7, 9], [2, 2, 2.2, 2.1]], np.float32)


@pytest.mark.parametrize("opset, how", [(10, None), (16, "half_pixel"), (16, "output_half_pixel")])
@pytest.mark.parametrize("samples, scale", [(0, 1.0), (2, 0.5), (1, 1.3)])
def test_roi_align_averages_what_onnx_runtime_averages(opset: int, how: str | None, samples: int, scale: float) -> None:
    inputs = [normal(2, 3, 6, 5), ROIS, np.array([0, 1, 1, 0])]
    attributes: dict[str, Any] = {} if how is None else {"coordinate_transformation_mode": how}
    check_map(
        *build(
            "RoiAlign",
            inputs,
            (1, 2),
            opset=opset,
            output_height=3,
            output_width=2,
            sampling_ratio=samples,
            spatial_scale=scale,
            **attributes,
        )
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_roi_align_is_recorded_for_regions_of_the_file(engine: str) -> None:
    """Oracle: the adjoint identity with ONNX Runtime's values, which are float32: 1e-5."""
    inputs = [normal(2, 3, 6, 5), ROIS, np.array([0, 1, 1, 0])]
    model, feeds = build("RoiAlign", inputs, (1, 2), output_height=3, output_width=2)
    (y,) = runtime(model, feeds)
    graph, start = as_written(known(model, y.shape)), cotangents(y.shape)
    flow = carry(engine, graph, feeds | {"o0": y.astype(np.float64)}, {"o0": start}, ["i0"], GRADIENT)
    agree((flow.relevance["i0"] * feeds["i0"]).sum((1, 2, 3, 4)), (start * y).sum((1, 2, 3, 4)), 1e-5)


def test_roi_align_by_the_maximum_is_refused_by_name() -> None:
    model, _ = build("RoiAlign", [normal(1, 2, 6, 5), ROIS, np.zeros(4, np.int64)], mode="max")
    with pytest.raises(ModelError, match=r"node 'roialign'.*maximum.*onnxcam layers"):
        Single(model, {}, [])


@pytest.mark.parametrize("sizes", [None, [1, 2, 5, 5]])
def test_max_unpool_hands_back_from_where_it_put(sizes: list[int] | None) -> None:
    """Places count in the output as it is, as in ONNX Runtime."""
    x, places = normal(1, 2, 2, 2), np.array([[[[5, 7], [13, 10]], [[16, 20], [31, 28]]]])
    more = [] if sizes is None else [np.array(sizes)]
    check_moves(*build("MaxUnpool", [x, places, *more], (1, 2) if more else (1,), kernel_shape=[2, 2], strides=[2, 2]))
