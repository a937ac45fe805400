"""python openvino_run.py WORK"""

import sys

import openvino
from agreement import measure

# In float32: what OpenVINO takes by itself is bfloat16 on some processors, in which maps lose their digits.
model = openvino.Core().compile_model(f"{sys.argv[1]}/explained.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

measure(
    f"OpenVINO {openvino.__version__.split('-')[0]}",
    lambda feeds: {output.get_any_name(): value for output, value in model(feeds).items()},
)
