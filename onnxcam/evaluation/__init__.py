"""Evaluation: methods and layers measured over a set of pictures, with what is known of them."""

from onnxcam.evaluation.examples import Example, examples
from onnxcam.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Example", "evaluate", "examples"]
