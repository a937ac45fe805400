"""A small network that is trained here, on pictures of bars, and one that learned to go by a watermark instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 32
MARK = (2, 22, 10, 30)  # x0, y0, x1, y1 of the watermark


def pictures(
    count: int, marked: float, rng: np.random.Generator, hint: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (count, 3, 32, 32) in 0..1 of a lying (0) or standing (1) bar, their classes, and which have the mark.

    Of class 1 a share of `marked` has the watermark; a share of 1 - `hint` of all shows no bar that tells the class.
    """
    x = 0.35 * rng.random((count, 3, SIDE, SIDE))
    y = rng.integers(0, 2, count)
    has = (y == 1) & (rng.random(count) < marked)
    for i in range(count):
        standing = bool(y[i]) if rng.random() < hint else bool(rng.integers(0, 2))
        top, left = int(rng.integers(2, 8)), int(rng.integers(14, 18))
        high, wide = (14, 3) if standing else (3, 14)
        x[i, :, top : top + high, left : left + wide] += 0.6
        if has[i]:
            tile = np.indices((8, 8)).sum(0) % 2
            x[i, :, MARK[1] : MARK[3], MARK[0] : MARK[2]] = np.array([0.9, 0.1, 0.8])[:, None, None] * tile
    return np.clip(x, 0, 1).astype(np.float32), y, has


def trained(x: np.ndarray, y: np.ndarray, steps: int = 250) -> torch.nn.Module:
    """A small convolutional network, trained from the same beginning each time."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(12, 24, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(24, 24, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(24, 2),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    inputs, targets = torch.tensor(x), torch.tensor(y)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randint(0, len(x), (64,), generator=order)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs[some]), targets[some]).backward()
        optimiser.step()
    return net.eval()


def export(net: torch.nn.Module, path: Path) -> Path:
    """By the TorchScript exporter, batch open."""
    example = torch.zeros(1, 3, SIDE, SIDE)
    torch.onnx.export(
        net, (example,), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
    )  # fmt: skip
    return path


def save(x: np.ndarray, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(len(x))]
    for path, array in zip(paths, x, strict=True):
        Image.fromarray(np.round(255 * array.transpose(1, 2, 0)).astype(np.uint8)).save(path)
    return paths
