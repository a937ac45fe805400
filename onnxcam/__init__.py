"""onnxcam: explain deployed ONNX image models on the ONNX graph itself, with no training framework.

model = onnxcam.load("model.onnx", preprocess="imagenet")
e = model.explain("cat.jpg", layers=["Conv_42"], targets=[282])
e.maps["Conv_42"]      # (images, targets, h, w) float32
e.save("out/")
onnxcam.compile(model, layers=["auto"], targets=[282]).save("explained.onnx")
"""

from onnxcam.compile import Compiled, compile
from onnxcam.composites import COMPOSITES, Composite
from onnxcam.errors import ModelError, OnnxcamError, UsageError
from onnxcam.explanation import Explanation
from onnxcam.layers import Layer
from onnxcam.methods import METHODS, Method
from onnxcam.model import Model, load
from onnxcam.preprocess import PRESETS, Preprocess
from onnxcam.starts import STARTS, Start

__version__ = "0.1.0"

__all__ = [
    "COMPOSITES",
    "METHODS",
    "PRESETS",
    "STARTS",
    "Compiled",
    "Composite",
    "Explanation",
    "Layer",
    "Method",
    "Model",
    "ModelError",
    "OnnxcamError",
    "Preprocess",
    "Start",
    "UsageError",
    "compile",
    "load",
]
