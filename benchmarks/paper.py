"""The tables of the Relevance-CAM paper on models at hand: `python -m benchmarks.paper [MODEL.onnx --layer L ...]`.

Table 1 is the time for one picture, Score-CAM against Relevance-CAM; table 2 the overlap of maps with ground-truth
boxes, cut at 25 % and at 75 % of the maximum, at the layer after the third max-pooling. The paper's networks are VGG-16
and ResNet-50 with torchvision's weights: where those can be had,

    python -m exporters torchvision vgg16 --weights DEFAULT -o vgg16.onnx
    python -m benchmarks.paper vgg16.onnx --preprocess imagenet --resize warp --images IMAGES --boxes BOXES.csv

Without a model it is run on SqueezeNet, which has three max-poolings too, of ONNXCAM_ASSETS (default ../shared/assets).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import onnxcam
from onnxcam.evaluation import examples
from onnxcam.methods.upsample import upsampled
from onnxcam.metrics.localisation import above, iou

ASSETS = Path(os.environ.get("ONNXCAM_ASSETS", "../shared/assets"))
METHODS = ("grad-cam", "grad-cam++", "score-cam", "relevance-cam", "contrast-map")
CUTS = (0.25, 0.75)
SLOW = "score-cam"


def third_pool(model: onnxcam.Model) -> str:
    """The output of the third max-pooling.

    Raises:
        SystemExit: there is none: name a layer.
    """
    pools = [n for n in model.names.raw.nodes if n.op_type in ("MaxPool", "QLinearMaxPool", "NhwcMaxPool")]
    if len(pools) < 3:
        raise SystemExit(f"{model.name} has {len(pools)} max-poolings, not three: name the layer by --layer")
    return pools[2].outputs[0]


def seconds(model: onnxcam.Model, picture: str, layer: str, method: str, runs: int) -> float:
    """The median time for one picture, sessions made before."""
    spent = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        model.explain(picture, [layer], method=method)
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent[1:]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ASSETS / "models" / "squeezenet-fp16-opset7.onnx")
    parser.add_argument("--layer", help="by default the output of the third max-pooling")
    parser.add_argument("--preprocess", help="a preset; by default what the file says, for SqueezeNet caffe")
    parser.add_argument("--resize", default="warp", help="boxes lie in the whole picture (default: warp)")
    parser.add_argument("--images", type=Path, default=ASSETS / "images")
    parser.add_argument("--boxes", type=Path, default=ASSETS / "boxes.csv")
    parser.add_argument("--count", type=int, default=50, help="pictures (default: 50)")
    parser.add_argument("--slow", type=int, default=10, help="pictures for Score-CAM (default: 10)")
    parser.add_argument("--runs", type=int, default=3, help="for times (default: 3)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    preset = arguments.preprocess or ("caffe" if arguments.model.name.startswith("squeezenet") else None)
    model = onnxcam.load(arguments.model, preprocess=preset)
    model.preprocess = model.preprocess.override(resize=arguments.resize)
    layer = arguments.layer or third_pool(model)
    listed = examples(sorted(arguments.images.iterdir())[: arguments.count], boxes=arguments.boxes)
    size = model.size
    overlap: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    shape = ""
    for i, example in enumerate(listed):
        for name in METHODS:
            if name == SLOW and i >= arguments.slow:
                continue
            e = model.explain(example.path, [layer], method=name)
            heat = next(iter(e.maps.values()))[0, 0]
            shape = "x".join(map(str, heat.shape))
            prepared = model.preprocess.apply(onnxcam.pictures.open_image(example.path), model.spec)
            truth, _ = example.seen(prepared.window, (size[0], size[1]))
            if truth is not None and truth.any():
                large = upsampled(heat.astype(np.float64), size)
                overlap[name].append([iou(above(large, cut), truth) for cut in CUTS])
    times = {n: seconds(model, listed[0].path, layer, n, 1 if n == SLOW else arguments.runs) for n in METHODS}
    out = [
        f"# {model.name} at {layer} ({shape})\n",
        "| method | seconds for one picture | of Relevance-CAM's | IoU 25 % | IoU 75 % | pictures |",
        "| --- " * 6 + "|",
    ]
    for name in METHODS:
        means = 100 * np.mean(overlap[name], axis=0)
        ratio = times[name] / times["relevance-cam"]
        numbers = f"{times[name]:.3f} | {ratio:.1f} | {means[0]:.1f} | {means[1]:.1f} | {len(overlap[name])}"
        out.append(f"| {name} | {numbers} |")
    text = "\n".join(out) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
