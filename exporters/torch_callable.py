"""Any PyTorch classifier: `python -m exporters torch package.module:make -o model.onnx`.

`make` is a module of yours and a callable in it that returns a `torch.nn.Module`, or such a module itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from exporters.common import Export, called, finish, imported
from exporters.torch_common import add_torch_arguments, batch_of, import_torchvision, to_onnx
from onnxcam.errors import UsageError
from onnxcam.labels import read_labels
from onnxcam.preprocess import PRESETS, preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters torch`."""
    parser.add_argument("model", metavar="MODULE:CALLABLE", help="what returns the model; looked for here, too")
    parser.add_argument("--state", type=Path, metavar="FILE", help="a state_dict to load, as torch.save writes it")
    parser.add_argument("--preprocess", choices=PRESETS, default="imagenet", help="default: %(default)s")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names: text, JSON or CSV")
    add_torch_arguments(parser)


def export(args: argparse.Namespace) -> Export:
    """Export the model that `args` names and check it against PyTorch's own output."""
    model = load(args.model)
    if args.state is not None:
        try:
            state = torch.load(args.state, map_location="cpu", weights_only=True)
            model.load_state_dict(state.get("state_dict", state))
        except (OSError, RuntimeError, AttributeError, ValueError) as error:
            raise UsageError(f"{args.state} is no state of this model: {str(error).splitlines()[0]}") from error
    size = args.size or 224
    exported, sample, expected = to_onnx(
        model, size=size, batch=batch_of(args.batch), exporter=args.exporter, opset=args.opset,
        keep_batchnorm=args.keep_batchnorm,
    )  # fmt: skip
    return finish(
        exported, args.output, sample=sample, expected=expected,
        preprocess=preset(args.preprocess).override(size=(size, size)),
        labels=None if args.labels is None else list(read_labels(args.labels)),
        description=f"{args.model}, exported by torch ({args.exporter})",
    )  # fmt: skip


def load(name: str) -> nn.Module:
    """The model that `package.module:callable` names.

    Raises:
        UsageError: there is none.
    """
    import_torchvision()
    found = imported(name)
    model = found if isinstance(found, nn.Module) else called(name, found)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
