"""Which rule carries positions through a node of which type. Nodes of other types lose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onnxcam.graph import Node
from onnxcam.positions.coordinates import Outcome
from onnxcam.positions.moves import (
    concat,
    expand,
    gather,
    pad,
    pointwise,
    reshape,
    same_place,
    slice_,
    split,
    tile,
    transpose,
)
from onnxcam.positions.products import attention, einsum, matmul, recurrent
from onnxcam.positions.windows import (
    conv,
    depth_to_space,
    global_pool,
    grid_sample,
    pool,
    reduce,
    resize,
    space_to_depth,
)

if TYPE_CHECKING:
    from onnxcam.positions.tracking import Positions

Rule = Callable[["Positions", Node], Outcome | Sequence[Outcome | None] | None]


def skip_norm(p: Positions, node: Node) -> list[Outcome | None]:
    """Normalised sum of the first two inputs, and the sum itself as the fourth output."""
    pair = pointwise(p, node)
    return [pair, None, None, pair]


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(
        pointwise,
        "Add Sub Mul Div Pow Max Min Mean Sum Where PRelu Mod Relu LeakyRelu Elu Selu Celu Softplus Softsign Sigmoid "
        "HardSigmoid HardSwish Swish Mish Gelu Tanh Erf Clip ThresholdedRelu Shrink Exp Log Sqrt Abs Neg Reciprocal "
        "Sign Floor Ceil Round Sin Cos Tan Atan Identity Cast CastLike Dropout QuantizeLinear DequantizeLinear And Or "
        "Not Equal Less Greater LessOrEqual GreaterOrEqual Xor IsNaN IsInf QLinearAdd QLinearMul QLinearSigmoid "
        "QLinearLeakyRelu QLinearSoftmax FastGelu BiasGelu QuickGelu BiasAdd BiasSplitGelu",
    ),
    **_named(
        same_place,
        "BatchNormalization InstanceNormalization GroupNormalization LayerNormalization RMSNormalization LRN "
        "LpNormalization MeanVarianceNormalization SimplifiedLayerNormalization GroupNorm Softmax LogSoftmax Hardmax "
        "CumSum Trilu RotaryEmbedding DynamicQuantizeLinear ScatterND ScatterElements Scatter",
    ),
    **_named(skip_norm, "SkipLayerNormalization SkipSimplifiedLayerNormalization"),
    **_named(reshape, "Reshape Flatten Squeeze Unsqueeze"),
    **_named(transpose, "Transpose"),
    **_named(slice_, "Slice"),
    **_named(split, "Split"),
    **_named(gather, "Gather"),
    **_named(concat, "Concat"),
    **_named(pad, "Pad"),
    **_named(expand, "Expand"),
    **_named(tile, "Tile"),
    **_named(conv, "Conv ConvTranspose ConvInteger QLinearConv FusedConv NhwcConv NhwcFusedConv DeformConv"),
    **_named(pool, "MaxPool AveragePool LpPool NhwcMaxPool QLinearAveragePool"),
    **_named(resize, "Resize Upsample"),
    **_named(depth_to_space, "DepthToSpace"),
    **_named(space_to_depth, "SpaceToDepth"),
    **_named(grid_sample, "GridSample MaxUnpool"),
    **_named(global_pool, "GlobalAveragePool GlobalMaxPool GlobalLpPool QLinearGlobalAveragePool"),
    **_named(
        reduce,
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceSumSquare ReduceLogSum "
        "ReduceLogSumExp",
    ),
    **_named(
        matmul, "MatMul Gemm MatMulInteger QLinearMatMul QGemm FusedMatMul FusedGemm MatMulNBits MatMulIntegerToFloat"
    ),
    **_named(einsum, "Einsum"),
    **_named(attention, "Attention MultiHeadAttention QAttention"),
    **_named(recurrent, "LSTM GRU RNN"),
}
