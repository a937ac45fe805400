"""python python_onnxruntime.py WORK"""

import sys

import onnxruntime
from agreement import measure

session = onnxruntime.InferenceSession(f"{sys.argv[1]}/explained.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]

measure(
    f"onnxruntime {onnxruntime.__version__}",
    lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)),
)
