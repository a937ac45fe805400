"""Seeded weights that anyone can rebuild: the same numbers for the same parameter name and shape, from NumPy alone."""

import zlib

import numpy as np


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the parameter `name` (a torchvision state-dict key); float32, except the batch counters."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_mean"):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith("running_var"):
        return rng.uniform(0.3, 2.0, shape).astype(np.float32)
    if len(shape) == 1 and name.endswith("weight"):  # BatchNorm scale, positive
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:  # bias
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)


def images(size: int) -> np.ndarray:
    """Input of the references, (2, 3, size, size) float32: size 96 for the ResNets, 224 for VGG."""
    return np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
