"""The reference session where it stands in for the evaluator of the onnx package, which goes wrong there.

Oracle: ONNX Runtime in float32, 1e-5; indices are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from walking import network, relative

from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession

W = np.random.default_rng(1).standard_normal((4, 2, 3, 2)).astype(np.float32)
CUTTING = np.array([0, 0, -1, 2, 0, 0, 1, -2])
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a maximum of stride 1": ("y, i = MaxPool<kernel_shape=[3,2], pads=[1,0,1,1]>(x)", {}),
    "a maximum of stride 2": ("y, i = MaxPool<kernel_shape=[3,2], strides=[2,2], dilations=[1,2]>(x)", {}),
    "response normalisation of more channels than images": ("y = LRN<size=3, alpha=0.5>(x)", {}),
    "a transposed convolution in groups": (
        "y = ConvTranspose<group=2, strides=[2,1], pads=[1,0,1,1], output_padding=[1,0], dilations=[1,2]>(x, w)",
        {"w": W},
    ),
    "statistics of training at opset 9": (
        "y = BatchNormalization<epsilon=0.01>(x, scale, shift, mean, variance)",
        {name: np.linspace(a, b, 4, dtype=np.float32) for name, a, b in
         (("scale", 0.5, 2), ("shift", -1, 1), ("mean", 0.2, -0.4), ("variance", 0.3, 2))},
    ),
    "pads that cut off": ("y = Pad(x, pads, fill)", {"pads": CUTTING, "fill": np.float32(3)}),
    "pads that cut off and reflect": ('y = Pad<mode="reflect">(x, pads)', {"pads": CUTTING}),
    "pads of some axes": ("y = Pad(x, pads, , axes)", {"pads": np.array([1, 0, 2, 3]), "axes": np.array([-1, 2])}),
    "pads as attributes at opset 9": ("y = Pad<pads=[0,0,1,-1,0,0,2,3], value=0.5>(x)", {}),
}  # fmt: skip


@pytest.mark.parametrize("what", BODIES)
def test_the_reference_computes_what_onnx_runtime_computes(what: str) -> None:
    body, weights = BODIES[what]
    names = ["y", "i"] if "i =" in body else ["y"]
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)
    outputs = ", ".join({"y": "float y", "i": "int64 i"}[name] for name in names)
    opset = 9 if "opset 9" in what else 18 if "axes" in weights else 17
    model = network(f"(float[2,4,5,6] x) => ({outputs}) {{ {body} }}", opset, **weights)
    got, want = (session(model, names).run({"x": x}) for session in (ReferenceSession, RuntimeSession))
    assert got["y"].dtype == np.float64
    assert relative(got["y"], want["y"]) <= 1e-5
    if "i" in names:
        np.testing.assert_array_equal(got["i"], want["i"])
