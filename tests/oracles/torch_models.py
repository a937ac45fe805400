"""torchvision models with seeded weights, and their ONNX files: what the references in PyTorch and onnxcam both see."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import torch
from oracles.weights import seeded
from torch import nn


def load_seeded(model: nn.Module) -> nn.Module:
    """Put `weights.seeded` into every entry of the state dict; evaluation mode."""
    state = {name: torch.from_numpy(seeded(name, tuple(t.shape))) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters' chatter stays off the terminal."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def export(model: nn.Module, x: np.ndarray, exporter: str = "torchscript", **options: Any) -> onnx.ModelProto:
    """The ONNX file of `model` for inputs of the shape of `x`, through one of torch's two exporters, batch static."""
    sample, names = (torch.from_numpy(x),), {"input_names": ["input"], "output_names": ["logits"]}
    with quiet(), torch.no_grad():
        if exporter == "dynamo":
            program = torch.onnx.export(model, sample, dynamo=True, verbose=False, **names, **options)
            return program.model_proto
        file = io.BytesIO()
        torch.onnx.export(model, sample, file, dynamo=False, **({"opset_version": 17} | names | options))
        return onnx.load_from_string(file.getvalue())


def export_keeping_batchnorm(model: nn.Module, x: np.ndarray) -> onnx.ModelProto:
    """The ONNX file with every BatchNormalization as a node of its own, in evaluation mode."""
    return export(model, x, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)


def merge_batchnorm(model: nn.Module) -> nn.Module:
    """Merge each BatchNorm2d into the Conv2d that comes right before it among the modules, in place.

    The merged weights are rounded to float32, so that a file in float32 and a reference in float64 are one function.
    """
    last: nn.Module | None = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(last, nn.Conv2d):
                scale = child.weight.double() / torch.sqrt(child.running_var.double() + child.eps)
                bias = 0 if last.bias is None else last.bias.double()
                shift = (bias - child.running_mean.double()) * scale + child.bias.double()
                with torch.no_grad():
                    last.weight.copy_((last.weight.double() * scale[:, None, None, None]).float())
                last.bias = nn.Parameter(shift.float().detach())
                setattr(parent, name, nn.Identity())
            if not list(child.children()):
                last = child
    return model


def out_of_place(model: nn.Module) -> nn.Module:
    """No activation overwrites its input, so that hooks see what the graph holds."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


def narrow_head(model: Any, features: int) -> nn.Module:
    """A small dense head instead of the wide one of AlexNet and VGG, and no adaptive pooling before it."""
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 10))
    return model


Build = Callable[[], nn.Module]
