"""A QDQ file in PyTorch, read node by node from the proto: an oracle for gradients and relevance of quantised networks.

Nothing of onnxcam is used. Rounding is PyTorch's own fake quantisation; relevance is computed by autograd functions
whose backward pass is the rule: z-plus with the bias ignored for linear maps and averages, shares in proportion for
sums, rounding and ReLU passed.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper


class _Passed(torch.autograd.Function):
    """Any function of one tensor, backward the identity."""

    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, r):
        return r, None


class _ZPlus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, linear):
        ctx.save_for_backward(x, w)
        ctx.linear = linear
        return linear(x, w, b)

    @staticmethod
    def backward(ctx, r):
        x, w = ctx.saved_tensors
        given = torch.zeros_like(x)
        with torch.enable_grad():
            parts = [x.clamp(min=0).detach().requires_grad_(), x.clamp(max=0).detach().requires_grad_()]
            z = ctx.linear(parts[0], w.clamp(min=0), None) + ctx.linear(parts[1], w.clamp(max=0), None)
            s = torch.where(z.abs() > 1e-30, r / z, torch.zeros_like(r)).detach()
            for part, gradient in zip(parts, torch.autograd.grad((z * s).sum(), parts), strict=True):
                given += part * gradient
        return given.detach(), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx, r):
        a, b = ctx.saved_tensors
        near = a.abs() > 1e6 * (a + b).abs()
        ratio = torch.where(near, torch.full_like(a, 0.5), a / torch.where(a + b == 0, torch.ones_like(a), a + b))
        return r * ratio, r * (1 - ratio)


class QDQ:
    """The file as a function: tensors by name, in float64; every tensor keeps its gradient, or its relevance."""

    def __init__(self, proto: onnx.ModelProto, relevance: bool):
        self.proto, self.relevance = proto, relevance
        self.constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}

    def __call__(self, x: np.ndarray) -> dict[str, torch.Tensor]:
        self.values = {self.proto.graph.input[0].name: torch.tensor(x, dtype=torch.float64, requires_grad=True)}
        self.rounded = {}
        for node in self.proto.graph.node:
            attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            out = getattr(self, node.op_type)(node, attrs)
            if out is not None:
                if out.requires_grad:
                    out.retain_grad()
                self.values[node.output[0]] = out
        return self.values

    def _get(self, name):
        return self.values[name] if name in self.values else torch.tensor(self.constants[name])

    def QuantizeLinear(self, node, attrs):
        self.rounded[node.output[0]] = self.values[node.input[0]]

    def DequantizeLinear(self, node, attrs):
        q, s, z = node.input
        scale, zero = self.constants[s], self.constants[z]
        if q in self.constants:
            shape = [1] * self.constants[q].ndim
            if scale.size > 1:
                shape[attrs.get("axis", 1)] = -1
            integers = self.constants[q].astype(np.float64) - zero.astype(np.float64).reshape(shape)
            return torch.tensor(integers * scale.astype(np.float64).reshape(shape))
        info = np.iinfo(zero.dtype)

        def rounding(x):
            return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), int(info.min), int(info.max))

        x = self.rounded[q]
        return _Passed.apply(x, rounding) if self.relevance else rounding(x)

    def _linear(self, x, w, b, linear):
        return _ZPlus.apply(x, w, b, linear) if self.relevance else linear(x, w, b)

    def Conv(self, node, attrs):
        pads = attrs.get("pads", [0, 0, 0, 0])

        def linear(x, w, b):
            x = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
            return F.conv2d(
                x, w, b, attrs.get("strides", [1, 1]), 0, attrs.get("dilations", [1, 1]), attrs.get("group", 1)
            )

        return self._linear(*(self._get(name) for name in node.input), linear)

    def Gemm(self, node, attrs):
        assert attrs.get("transB", 0)
        return self._linear(*(self._get(name) for name in node.input), F.linear)

    def GlobalAveragePool(self, node, attrs):
        ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return self._linear(self._get(node.input[0]), ones, None, lambda x, w, b: w * x.mean((2, 3), keepdim=True))

    def Relu(self, node, attrs):
        x = self._get(node.input[0])
        return _Passed.apply(x, torch.relu) if self.relevance else torch.relu(x)

    def Add(self, node, attrs):
        a, b = (self._get(name) for name in node.input)
        return _Share.apply(a, b) if self.relevance else a + b

    def MaxPool(self, node, attrs):
        return F.max_pool2d(self._get(node.input[0]), attrs["kernel_shape"], attrs["strides"])

    def Flatten(self, node, attrs):
        return self._get(node.input[0]).flatten(1)
