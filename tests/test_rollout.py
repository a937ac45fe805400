"""Attention rollout against the same products of attention matrices, taken from the module that was exported.

Oracle: hooks and autograd of torch in float64, and the papers' recursions in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from oracles.torch_models import export, load_seeded
from torch import nn

import onnxcam
from onnxcam.errors import UsageError

CLASSES = [1, 3]
SIDE, HEADS, WIDTH = 4, 2, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weights: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        self.weights = torch.softmax(q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5, -1)
        return self.out((self.weights @ v).transpose(1, 2).reshape(n, length, width))


class Vit(nn.Module):
    """Three blocks, with a class token or with the mean over tokens."""

    def __init__(self, token: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH)) if token else None
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


@cache
def setting(token: bool) -> tuple[onnxcam.Model, np.ndarray, Vit]:
    net = load_seeded(Vit(token))
    assert isinstance(net, Vit)
    x = np.random.default_rng(0).standard_normal((2, 3, 4 * SIDE, 4 * SIDE)).astype(np.float32)
    model = onnxcam.load(export(net, x, "torchscript"), preprocess="none")
    return model, x, net.double()


def attention(token: bool, target: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The weights of every block and their gradients, (N, heads, L, L)."""
    _, x, net = setting(token)
    logits = net(torch.from_numpy(x).double())
    weights = [block.weights for block in net.blocks]
    gradients = torch.autograd.grad(logits[:, target].sum(), weights)
    return [(w.detach().numpy(), g.numpy()) for w, g in zip(weights, gradients, strict=True)]


def read(rolled: np.ndarray, token: bool) -> np.ndarray:
    row = rolled[:, 0, 1:] if token else rolled.mean(1)
    return row.reshape(-1, SIDE, SIDE)


@pytest.mark.parametrize("token", [True, False])
def test_rollout_is_the_product_of_attention(within: Callable[..., None], token: bool) -> None:
    model, x, _ = setting(token)
    rolled = np.eye(SIDE**2 + token)
    for weights, _ in attention(token, 0):
        step = weights.mean(1) + np.eye(len(rolled[-1]) if rolled.ndim > 2 else len(rolled))
        rolled = (step / step.sum(-1, keepdims=True)) @ rolled
    e = model.explain(x, targets=CLASSES, method="rollout")
    (found,) = e.maps.values()
    assert found.shape == (2, 2, SIDE, SIDE)
    within("rollout", "hooks", found, np.stack([read(rolled, token)] * 2, 1))


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
@pytest.mark.parametrize("token", [True, False])
def test_gradient_rollout_adds_weighted_attention(within: Callable[..., None], token: bool, engine: str) -> None:
    model, x, _ = setting(token)
    expected = []
    for c in CLASSES:
        rolled = np.broadcast_to(np.eye(SIDE**2 + token), (2, SIDE**2 + token, SIDE**2 + token))
        for weights, gradients in attention(token, c):
            rolled = rolled + np.maximum(weights * gradients, 0).mean(1) @ rolled
        expected.append(read(rolled, token))
    (found,) = model.explain(x, targets=CLASSES, method="gradient-rollout", engine=engine).maps.values()
    within("gradient-rollout", "autograd", found, np.stack(expected, 1))


def test_rollout_needs_attention() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(UsageError, match="method rollout needs attention, and there is none"):
        onnxcam.load(export(net.eval(), x), preprocess="none").explain(x, method="rollout")
