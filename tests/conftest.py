"""What every test shares: the files that ship, the real models and images, and a torchvision that imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


class BeforeTorchvision:
    """Readies PyTorch for torchvision when a test, or a library it uses, first imports it; finds no module itself.

    As a hook and not up front, so that tests which need no PyTorch do not wait for it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            from exporters.torch_common import declare_torchvision_operators

            declare_torchvision_operators()


sys.meta_path.insert(0, BeforeTorchvision())


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models and images, which the repository may not hold: `ONNXCAM_ASSETS`, else ../shared/assets."""
    path = Path(os.environ.get("ONNXCAM_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (path / "models").is_dir():
        pytest.skip(f"no real models and images at {path}; set ONNXCAM_ASSETS to their folder")
    return path


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """EfficientNet-Lite0, as it ships."""
    return ROOT / "models" / "efficientnet-lite0.onnx"


@pytest.fixture(scope="session")
def chelsea() -> Path:
    """A picture of a cat, as it ships."""
    return ROOT / "models" / "chelsea.png"


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`within(method, oracle, found, expected, near=1e-4)`: the largest difference relative to the largest value is not
    above `near`. It is written into the report, which `benchmarks.methods` makes its table from."""

    def check(method: str, oracle: str, found: np.ndarray, expected: np.ndarray, near: float = 1e-4) -> None:
        scale = float(np.abs(expected).max())
        assert scale > 0 and found.shape == expected.shape
        error = float(np.abs(found - expected).max()) / scale
        record_property(f"error of {method}", f"{error!r} by {oracle}")
        assert error <= near, error

    return check
