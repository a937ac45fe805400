"""python reference_run.py WORK: pure NumPy, so that nothing but the onnx package is needed; slow."""

import sys

import onnx
from agreement import measure
from onnx.reference import ReferenceEvaluator

evaluator = ReferenceEvaluator(f"{sys.argv[1]}/explained.onnx")

measure(
    f"onnx.reference {onnx.__version__}",
    lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True)),
    repeat=0,
)
