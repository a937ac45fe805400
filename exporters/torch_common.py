"""What the PyTorch exporters share: running torch's two exporters, random weights worth testing with, and torchvision.

PyPI's torchvision is built for CUDA. Beside a CPU build of PyTorch its extension does not load, and importing it fails
on two operators that only detection models need; `declare_torchvision_operators` fills them in.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from onnxcam.errors import UsageError

_libraries: list[torch.library.Library] = []  # a Library takes its definitions along when it is collected


def import_torchvision() -> ModuleType:
    """Import torchvision, whether or not its compiled extension loads."""
    declare_torchvision_operators()
    return importlib.import_module("torchvision")


def declare_torchvision_operators() -> None:
    """Declare the operators that torchvision's import asks for, where its compiled extension does not define them.

    To be called before torchvision is imported; does nothing where it already is, or where nothing is missing.
    """
    if "torchvision" in sys.modules or _extension_loads() or _libraries:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend: the import itself will say what is missing
    for extension in (path for pattern in ("_C*.so", "_C*.pyd") for path in Path(spec.origin).parent.glob(pattern)):
        with contextlib.suppress(OSError):
            torch.ops.load_library(extension)
            return True
    return False


def add_torch_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all exports by torch have."""
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo", help="default: %(default)s")
    parser.add_argument("--opset", type=int, default=18, help="default: %(default)s")
    parser.add_argument("--keep-batchnorm", action="store_true", help="do not fold BatchNorm (torchscript only)")
    parser.add_argument("--size", type=int, help="input height and width (default: the model's own, or 224)")
    parser.add_argument("--batch", default="dynamic", help="dynamic, or a fixed number (default: %(default)s)")


def batch_of(text: str) -> int | None:
    """The batch that `--batch` fixes, None for dynamic.

    Raises:
        UsageError: it is neither.
    """
    if text != "dynamic" and (not text.isdecimal() or int(text) < 1):
        raise UsageError(f"--batch {text}: 'dynamic' or a whole number from 1 is wanted")
    return None if text == "dynamic" else int(text)


def seed_weights(model: nn.Module, seed: int) -> nn.Module:
    """Fill `model` in place with reproducible weights that hide no mistake: no bias is 0, no normalisation identity.

    Convolutions and linear layers get He-normal weights and biases of 0.3 N(0, 1); normalisations get weights from
    U(0.5, 1.5), biases and running means of 0.3 N(0, 1), running variances from U(0.3, 2).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                _normal(module.bias, generator)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
                _uniform(module.weight, 0.5, 1.5, generator)
                _normal(module.bias, generator)
                _normal(getattr(module, "running_mean", None), generator)
                _uniform(getattr(module, "running_var", None), 0.3, 2.0, generator)
    return model


def _normal(tensor: torch.Tensor | None, generator: torch.Generator) -> None:
    if tensor is not None:
        tensor.normal_(0.0, 0.3, generator=generator)


def _uniform(tensor: torch.Tensor | None, low: float, high: float, generator: torch.Generator) -> None:
    if tensor is not None:
        tensor.uniform_(low, high, generator=generator)


def to_onnx(
    model: nn.Module,
    *,
    size: int,
    batch: int | None = None,
    exporter: str = "dynamo",
    opset: int = 18,
    keep_batchnorm: bool = False,
) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Export an image classifier; `batch` None keeps the batch symbolic.

    Returns the model, with input `input` (N, 3, size, size) and output `logits` (N, classes); a sample (N, 3, size,
    size), of another batch size than was traced where the batch is symbolic; and the framework's logits for it.
    """
    if keep_batchnorm and exporter == "dynamo":
        raise UsageError("the dynamo exporter always folds BatchNorm; use --exporter torchscript to keep it")
    model = model.eval()
    generator = torch.Generator().manual_seed(0)
    traced = torch.randn(batch or 2, 3, size, size, generator=generator)
    sample = traced if batch else torch.randn(3, 3, size, size, generator=generator)
    with torch.no_grad():
        expected = model(sample)
    if not isinstance(expected, torch.Tensor) or expected.ndim != 2:
        raise UsageError("the model does not return one (N, classes) tensor; only classifiers can be exported")

    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "opset_version": opset}
    with exporting():
        if exporter == "dynamo":
            shapes = None if batch else ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(model, (traced,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            assert program is not None
            exported = program.model_proto
        else:
            mode = torch.onnx.TrainingMode.PRESERVE if keep_batchnorm else torch.onnx.TrainingMode.EVAL
            axes = None if batch else {"input": {0: "batch"}, "logits": {0: "batch"}}
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder, "model.onnx"))  # above 2 GB, a Path is no path to the exporter
                torch.onnx.export(
                    model,
                    (traced,),
                    path,
                    dynamo=False,
                    dynamic_axes=axes,
                    training=mode,
                    do_constant_folding=not keep_batchnorm,
                    **names,
                )
                exported = onnx.load(path)
    return exported, sample.numpy(), expected.numpy()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Keep the chatter of the exporters off the terminal; their errors are exceptions and still come through.

    PyTorch is kept off its fused path of attention as well, which the TorchScript exporter has no operators for.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            torch.backends.mha.set_fastpath_enabled(fused)
