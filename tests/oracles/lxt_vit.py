"""A small transformer whose relevance LXT computes, and which exports as any other: the reference for attention.

One code for both: `Plain` does the arithmetic, `AttnLrp` and `CpLrp` the same by LXT's explicit functions, whose
backward pass carries relevance instead of a gradient (Achtibat et al. 2024). Tokens come in as they are, (N, L, C).
"""

from __future__ import annotations

from typing import Any

import lxt.explicit.functional as lf
import lxt.explicit.rules as lr
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-12


class Plain:
    """PyTorch's own arithmetic, which is exported."""

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    def pointwise(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2)

    def mix(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1) @ v


class AttnLrp(Plain):
    """LXT's rules; what has no factor of its own keeps its relevance."""

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return lf.linear_epsilon(x, layer.weight, layer.bias, EPS)

    def pointwise(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        return lr.identity(function, x)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lf.add2(a, b, epsilon=EPS)

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lf.mul2(a, b)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return lf.mean(x, 1, False, EPS)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return lf.matmul(q, k.transpose(-1, -2), epsilon=EPS)

    def mix(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return lf.matmul(lf.softmax(scores, -1), v, epsilon=EPS)


class CpLrp(AttnLrp):
    """The attention matrix is a constant, and the epsilon rule shares among the values."""

    def mix(self, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = scores.softmax(-1).detach()
        return lr.epsilon_lrp(lambda v: weights @ v, EPS, v)


class Transformer(nn.Module):
    """Blocks of attention and a dense part behind LayerNorm, with relative positions, a gated branch, and a mask."""

    def __init__(self, width: int = 8, heads: int = 2, tokens: int = 5, blocks: int = 2, classes: int = 4):
        super().__init__()
        self.heads, self.arithmetic = heads, Plain()
        self.embed = nn.Linear(6, width)
        self.position = nn.Parameter(torch.zeros(tokens, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(heads, tokens, tokens), requires_grad=False)
        mask = torch.zeros(tokens, tokens)
        mask[0, -1] = float("-inf")
        self.register_buffer("mask", mask)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "fc1": nn.Linear(width, 2 * width),
                    "gate": nn.Linear(width, 2 * width),
                    "fc2": nn.Linear(2 * width, width),
                }
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if "bias" in name else 0.5)
                parameter.copy_(1 + drawn if "norm" in name and "weight" in name else drawn)

    def attention(self, block: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        do = self.arithmetic
        qkv = do.linear(block["qkv"], x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = do.scores(do.mul(q, torch.tensor((width // self.heads) ** -0.5)), k) + self.bias
        mixed = do.mix(torch.where(torch.isinf(self.mask), self.mask, scores), v)
        return do.linear(block["proj"], mixed.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        do = self.arithmetic
        x = do.linear(self.embed, x) + self.position
        for block in self.blocks:
            x = do.add(x, self.attention(block, do.pointwise(block["norm1"], x)))
            inner = do.pointwise(block["norm2"], x)
            inner = do.mul(do.pointwise(F.gelu, do.linear(block["fc1"], inner)), do.linear(block["gate"], inner))
            x = do.add(x, do.linear(block["fc2"], inner))
        return do.linear(self.head, do.mean(do.pointwise(self.norm, x)))


def relevance(model: Transformer, arithmetic: Plain, x: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What LXT carries from `start` at the logits back to `x`, in float64."""
    model = model.double()
    model.arithmetic = arithmetic
    leaf = torch.from_numpy(x).double().requires_grad_()
    model(leaf).backward(torch.from_numpy(start))
    model.arithmetic = Plain()
    assert leaf.grad is not None
    return leaf.grad.numpy()
