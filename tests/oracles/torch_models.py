"""torchvision models with seeded weights, and their ONNX files: what the references in PyTorch and onnxcam both see."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from oracles.weights import seeded
from torch import nn


def load_seeded(model: nn.Module) -> nn.Module:
    """Put `weights.seeded` into every entry of the state dict; evaluation mode."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.as_tensor(seeded(name, tuple(tensor.shape))))
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
    """Merge, in place, each BatchNorm2d into the Conv2d of as many channels right before it among the modules.

    The merged weights are rounded to float32, so that a file in float32 and a reference in float64 are one function.
    """
    last: nn.Module | None = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (
                isinstance(child, nn.BatchNorm2d)
                and isinstance(last, nn.Conv2d)
                and last.out_channels == child.num_features
            ):
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


SIXTH = float(np.float32(1 / 6))


class _HardSigmoid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (SIXTH * x + 0.5).clamp(0, 1)


class _HardSwish(_HardSigmoid):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * super().forward(x)


def in_double(model: nn.Module) -> nn.Module:
    """A copy in float64 whose constants are those of the file: attributes of ONNX are float32, and 1/6 is none."""
    double = copy.deepcopy(model).double()
    for parent in list(double.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Hardsigmoid):
                setattr(parent, name, _HardSigmoid())
            if isinstance(child, nn.Hardswish):
                setattr(parent, name, _HardSwish())
    return double


def plain_pools(model: nn.Module) -> nn.Module:
    """No ceil_mode where the stride is 1, where it changes nothing; onnx 1.23's reference evaluator pads there."""
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d) and module.stride == 1:
            module.ceil_mode = False
    return model


def narrow_head(model: Any, features: int) -> nn.Module:
    """A small dense head instead of the wide one of AlexNet and VGG, and no adaptive pooling before it."""
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 10))
    return model


@dataclass(frozen=True)
class Trace:
    """One forward pass in float64, with the outputs of some modules."""

    x: torch.Tensor
    logits: torch.Tensor
    inner: dict[str, torch.Tensor]

    def back(self, start: np.ndarray) -> dict[str, np.ndarray]:
        """What autograd carries from `start` at the logits to "input" and to the inner modules' outputs."""
        grads = torch.autograd.grad(self.logits, [self.x, *self.inner.values()], torch.from_numpy(start))
        return {name: g.numpy() for name, g in zip(["input", *self.inner], grads, strict=True)}

    def tensors(self, values: Mapping[str, np.ndarray]) -> dict[str, str]:
        """For "input" and each inner module the tensor of the file with the same values, up to the order of sums."""
        found = {"input": "input"}
        for module, tensor in self.inner.items():
            wanted = tensor.detach().numpy()
            bound = 1e-9 * np.abs(wanted).max()
            found[module] = next(
                (k for k, v in values.items() if v.shape == wanted.shape and np.abs(v - wanted).max() <= bound), ""
            )
            assert found[module], f"no tensor of the file has the values of {module}"
        return found


def trace(model: nn.Module, x: np.ndarray, inner: Sequence[str]) -> Trace:
    modules, seen, handles = dict(model.named_modules()), {}, []
    for name in inner:
        keep = functools.partial(lambda name, _module, _inputs, output: seen.__setitem__(name, output), name)
        handles.append(modules[name].register_forward_hook(keep))
    leaf = torch.from_numpy(x).double().requires_grad_()
    try:
        logits = model(leaf)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(leaf, logits, seen)
