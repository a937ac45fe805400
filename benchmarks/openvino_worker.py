"""Runs in the environment of openvino-xai, which is not onnxcam's: explains once for every line it reads."""

import json
import sys

import numpy as np
import openvino
import openvino_xai
from openvino_xai.explainer.explainer import ExplainMode

path, threads, shape = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
replies, sys.stdout = sys.stdout, sys.stderr
core = openvino.Core()
core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
model = core.read_model(path)
model.reshape(shape)
explainer = openvino_xai.Explainer(
    model=model,
    task=openvino_xai.Task.CLASSIFICATION,
    preprocess_fn=lambda x: x,
    explain_mode=ExplainMode.WHITEBOX,
    explain_method=openvino_xai.Method.RECIPROCAM,
)
x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
view = np.zeros((*shape[2:], 3), np.uint8)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    explainer(x, targets=[int(line)], original_input_image=view, resize=False, colormap=False, overlay=False)
    print("done", file=replies, flush=True)
