"""Makes what the other scripts run: a compiled explanation, one input, and the maps they should give.

    python prepare.py MODEL PICTURE WORK

WORK gets `explained.onnx`; `input.f32` and `expected/NAME.f32`, raw little-endian floats; and `about.json`, which says
their shapes. The expected maps are the array engine's in float64, over the reference evaluator's forward pass, so that
no runtime under comparison has a part in them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import onnxcam

model_file, picture, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
(work / "expected").mkdir(parents=True, exist_ok=True)

model = onnxcam.load(model_file)
if model.spec.dtype != np.float32:
    sys.exit(f"{model_file} takes {model.spec.dtype}; these scripts pass float32")
compiled = onnxcam.compile(model, layers=["suggested"])  # the class is an input of the file: -1 is the predicted one
compiled.save(work / "explained.onnx")

array = model.preprocess.apply(Image.open(picture), model.spec).array
exact = model.explain(array, layers=["suggested"], engine="numpy", dtype="float64")

array.astype("<f4").tofile(work / "input.f32")
maps = {}
for layer, output in compiled.maps.items():
    exact.maps[layer].astype("<f4").tofile(work / "expected" / f"{output}.f32")
    maps[output] = list(exact.maps[layer].shape)
about = {"input": {"name": model.spec.name, "shape": list(array.shape)}, "maps": maps}
(work / "about.json").write_text(json.dumps(about, indent=1))
print(f"{work / 'explained.onnx'}: {', '.join(maps)}; class {int(np.squeeze(exact.targets))} is predicted")
