"""What every process of the coverage sweep needs, imported once, when the sweep begins, and inherited."""

import contextlib

import onnxcam
import onnxcam.check
import onnxcam.explain  # noqa: F401

with contextlib.suppress(Exception):  # only exports need these
    import onnxscript  # noqa: F401
    import torch.onnx  # noqa: F401

    from exporters.torch_common import import_torchvision

    import_torchvision()
    import timm  # noqa: F401
