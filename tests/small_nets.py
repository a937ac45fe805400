"""Small classifiers of the usual families, as an exporter would write them: 16x16 RGB in, 5 logits out, seeded weights.

`NETS` has them all by name; each call makes a fresh proto. Node names are the outputs' names in capitals.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
from walking import network

HEAD = "p = GlobalAveragePool({last}) f = Flatten(p) y = Gemm(f, fc_w, fc_b)"


def classifier(body: str, last: str, signature: str = "(float[N,3,16,16] x) => (float[N,5] y)") -> onnx.ModelProto:
    """The network of `body`, pooled and classified after the tensor `last`.

    Weights are made for the names `w<out>x<in>x<k>_...`, `b<n>_...`, and `bn<n>_...` for the four inputs of a
    BatchNormalization; `fc_w` and `fc_b` fit `last`, whose channels stand in its weight's name or after a `#`.
    """
    last, _, channels = last.partition("#")
    rng = np.random.default_rng(len(body))
    weights: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(re.findall(r"\b(?:w\d+(?:x\d+)+|b\d+|(?:scale|mean|var)\d+)_\w+", body)):
        sizes = [int(n) for n in re.findall(r"\d+", name.split("_")[0])]
        if name.startswith("w"):
            shape = (sizes[0], sizes[1], *[sizes[2]] * 2)
            weights[name] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        elif name.startswith(("scale", "var")):
            weights[name] = rng.uniform(0.5, 1.5, sizes[0])
        else:
            weights[name] = rng.normal(size=sizes[0]) * 0.3
    weights["fc_w"], weights["fc_b"] = rng.normal(size=(int(channels), 5)), rng.normal(size=5)
    for name, value in re.findall(r"\bc_(\w+?)=(-?[\d.]+)", body):
        weights[f"c_{name}"] = np.array(float(value))
    body = re.sub(r"\b(c_\w+?)=-?[\d.]+", r"\1", body)
    model = network(
        f"{signature} {{ {body} {HEAD.format(last=last)} }}",
        **{name: value.astype(np.float32) for name, value in weights.items()},
    )
    for node in model.graph.node:
        node.name = node.output[0].upper()
    return model


def norm(into: str, of: str, channels: int) -> str:
    """A BatchNormalization with weights of its own."""
    inputs = ", ".join(f"{part}{channels}_{into}" for part in ("scale", "b", "mean", "var"))
    return f"{into} = BatchNormalization({of}, {inputs})"


def resnet() -> onnx.ModelProto:
    """Stem, a block with an identity shortcut, a block that halves with a projection."""
    return classifier(
        f"""c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0) {norm("n0", "c0", 8)} r0 = Relu(n0)
        c1 = Conv<pads=[1,1,1,1]>(r0, w8x8x3_1) {norm("n1", "c1", 8)} r1 = Relu(n1)
        c2 = Conv<pads=[1,1,1,1]>(r1, w8x8x3_2) {norm("n2", "c2", 8)} a2 = Add(n2, r0) r2 = Relu(a2)
        c3 = Conv<pads=[1,1,1,1], strides=[2,2]>(r2, w16x8x3_3) {norm("n3", "c3", 16)} r3 = Relu(n3)
        c4 = Conv<pads=[1,1,1,1]>(r3, w16x16x3_4) {norm("n4", "c4", 16)}
        d4 = Conv<strides=[2,2]>(r2, w16x8x1_5) {norm("m4", "d4", 16)} a4 = Add(n4, m4) r4 = Relu(a4)""",
        "r4#16",
    )


def mobilenet() -> onnx.ModelProto:
    """Inverted residuals: the narrow tensors between blocks have no activation and can be negative."""
    return classifier(
        """c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0, b8_0) r0 = Clip(c0, c_zero=0, c_six=6)
        d0 = Conv<pads=[1,1,1,1], group=8>(r0, w8x1x3_1, b8_1) s0 = Clip(d0, c_zero, c_six)
        l0 = Conv(s0, w4x8x1_2, b4_2)
        e1 = Conv(l0, w16x4x1_3, b16_3) r1 = Clip(e1, c_zero, c_six)
        d1 = Conv<pads=[1,1,1,1], group=16>(r1, w16x1x3_4, b16_4) s1 = Clip(d1, c_zero, c_six)
        l1 = Conv(s1, w4x16x1_5, b4_5) a1 = Add(l0, l1)
        e2 = Conv(a1, w16x4x1_6, b16_6) r2 = Clip(e2, c_zero, c_six)
        d2 = Conv<pads=[1,1,1,1], strides=[2,2], group=16>(r2, w16x1x3_7, b16_7) s2 = Clip(d2, c_zero, c_six)
        l2 = Conv(s2, w8x16x1_8, b8_8)
        h = Conv(l2, w32x8x1_9, b32_9) r3 = Clip(h, c_zero, c_six)""",
        "r3#32",
    )


def inception() -> onnx.ModelProto:
    """Branches that meet in a Concat."""
    return classifier(
        """c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0, b8_0) r0 = Relu(c0)
        u = Conv(r0, w4x8x1_1, b4_1) ru = Relu(u)
        v = Conv<pads=[1,1,1,1]>(r0, w6x8x3_2, b6_2) rv = Relu(v)
        m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r0) q = Conv(m, w2x8x1_3, b2_3) rq = Relu(q)
        joined = Concat<axis=1>(ru, rv, rq)""",
        "joined#12",
    )


def silu() -> onnx.ModelProto:
    """x * sigmoid(x), which exporters write as two nodes, with a squeeze-and-excitation gate in the middle."""
    return classifier(
        """c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0, b8_0) g0 = Sigmoid(c0) s0 = Mul(c0, g0)
        q = GlobalAveragePool(s0) e = Conv(q, w4x8x1_1, b4_1) ge = Sigmoid(e) se = Mul(e, ge)
        k = Conv(se, w8x4x1_2, b8_2) gate = Sigmoid(k) seen = Mul(gate, s0)
        c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(seen, w8x8x3_3, b8_3) g1 = Sigmoid(c1) s1 = Mul(g1, c1)""",
        "s1#8",
    )


def densenet() -> onnx.ModelProto:
    """Normalised and activated before each convolution; what is concatenated can be negative."""
    return classifier(
        f"""c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0)
        {norm("n1", "c0", 8)} r1 = Relu(n1) c1 = Conv<pads=[1,1,1,1]>(r1, w4x8x3_1) j1 = Concat<axis=1>(c0, c1)
        {norm("n2", "j1", 12)} r2 = Relu(n2) c2 = Conv<pads=[1,1,1,1]>(r2, w4x12x3_2) j2 = Concat<axis=1>(j1, c2)
        {norm("n3", "j2", 16)} r3 = Relu(n3) t = Conv(r3, w8x16x1_3)
        v = AveragePool<kernel_shape=[2,2], strides=[2,2]>(t)
        {norm("n4", "v", 8)} r4 = Relu(n4) c4 = Conv<pads=[1,1,1,1]>(r4, w4x8x3_4) j4 = Concat<axis=1>(v, c4)
        {norm("n5", "j4", 12)} r5 = Relu(n5)""",
        "r5#12",
    )


def unet() -> onnx.ModelProto:
    """A long skip past the coarse half, and a head that pools."""
    return classifier(
        """c0 = Conv<pads=[1,1,1,1]>(x, w8x3x3_0, b8_0) r0 = Relu(c0)
        m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r0)
        c1 = Conv<pads=[1,1,1,1]>(m, w8x8x3_1, b8_1) r1 = Relu(c1)
        t = ConvTranspose<strides=[2,2]>(r1, w8x8x2_2, b8_2)
        j = Concat<axis=1>(r0, t)
        c2 = Conv<pads=[1,1,1,1]>(j, w8x16x3_3, b8_3) r2 = Relu(c2)""",
        "r2#8",
    )


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    net.__name__: net for net in (resnet, mobilenet, inception, silu, densenet, unet)
}
