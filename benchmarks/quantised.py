"""How far maps of quantised files are from those of the float file: `python -m benchmarks.quantised [-o FILE]`.

Both files hold the weights of one network. Each picture is explained by Relevance-CAM at every suggested layer, for the
class that the float file predicts, and the two maps of a layer are compared by rank correlation (Spearman). With the
maps goes what the files decide: how often the first class is the float file's, and the file's own in ONNX Runtime as it
comes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import onnxcam
from onnxcam.files import write_atomically
from onnxcam.pictures import open_image
from onnxcam.preprocess import PRESETS

ASSETS = Path(os.environ.get("ONNXCAM_ASSETS", "../shared/assets"))
WANTED = 0.95  # mean rank correlation at the last stage that issue 4 asks of these
ASKED = {"efficientnet-lite0-qdq-int8", "efficientnet-lite0-qoperator-u8s8", "efficientnet-lite0-fp16"}


@dataclass(frozen=True)
class Subject:
    """A file, its preprocessing, and the float file of the same weights with its own."""

    name: str
    preset: str
    reference: str
    reference_preset: str

    def load(self) -> tuple[onnxcam.Model, onnxcam.Model]:
        return _load(self.name, self.preset), _load(self.reference, self.reference_preset)


LITE = "efficientnet-lite0"
SUBJECTS = [
    *(Subject(f"{LITE}-{form}", "efficientnet-lite", LITE, "efficientnet-lite")
      for form in ("qdq-int8", "qoperator-u8s8", "fp16", "dynamic-u8")),
    Subject("mobilenet-v2-tflite-qdq-nhwc", "raw", "mobilenet-v2-float-nchw-logits", "tf"),
]  # fmt: skip

HEAD = """\
# Maps of quantised files

Written by `python -m benchmarks.quantised -o docs/quantised-agreement.md` on {date}, with onnxcam {onnxcam},
onnxruntime {ort}, onnx {onnx}, on {images} ImageNet validation pictures and {processor}.
Why the figures are what they are, and what is done with a quantised file, says [quantised.md](quantised.md).

Rank correlation (Spearman) of the Relevance-CAM maps of a file with those of the float file of the same weights, for
the class that the float file predicts: mean over the pictures, and in brackets the 5th percentile. Stage 1 is the
finest map.

| file | {stages} |
|---|{rules}|
"""

DECISIONS = """
How often the first class is that of the float file, and that of the file itself where ONNX Runtime runs it with the
options it comes with; and how often it is right.

| file | the float file's | its own in ONNX Runtime | right | the float file right |
|---|---|---|---|---|
"""


def _load(name: str, preset: str) -> onnxcam.Model:
    return onnxcam.load(ASSETS / "models" / f"{name}.onnx", preprocess=PRESETS[preset].override(resize="warp"))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank."""
    return float(np.corrcoef(_ranks(a.ravel()), _ranks(b.ravel()))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


@dataclass
class Found:
    """What was measured of one file: correlations (images, stages), and for each image who is right or agrees."""

    correlations: list[list[float]] = field(default_factory=list)
    like_float: list[bool] = field(default_factory=list)
    like_deployed: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    float_right: list[bool] = field(default_factory=list)


def measure(subject: Subject, pictures: Sequence[tuple[Path, int]]) -> Found:
    """Explain every picture by the file and by its reference, and compare."""
    ours, reference = subject.load()
    rows, floats = ([r for r in m.layers() if r.suggested] for m in (ours, reference))
    if [r.shape for r in rows] != [r.shape for r in floats]:
        raise SystemExit(f"{subject.name}: the suggested layers are not those of {subject.reference}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    deployed = ort.InferenceSession(
        str(ASSETS / "models" / f"{subject.name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    found = Found()
    for path, label in pictures:
        expected = reference.explain(path, "suggested")
        target = int(expected.targets[0, 0])
        mine = ours.explain(path, "suggested", [target])
        found.correlations.append(
            [spearman(mine.maps[a.node], expected.maps[b.node]) for a, b in zip(rows, floats, strict=True)]
        )
        classes = mine.logits.shape[1]
        right = label + classes - 1000  # MobileNet of TensorFlow has a background class first
        predicted = int(mine.logits[0].argmax())
        array = ours.preprocess.apply(open_image(path), ours.spec).array
        own = int(np.asarray(deployed.run(None, {ours.spec.name: array})[0]).reshape(-1).argmax())
        found.like_float.append(predicted == target)
        found.like_deployed.append(predicted == own)
        found.right.append(predicted == right)
        found.float_right.append(target == right)
    return found


def document(results: dict[str, Found]) -> str:
    """The figures as Markdown."""
    stages = max(len(f.correlations[0]) for f in results.values())
    text = HEAD.format(
        date=datetime.date.today().isoformat(),
        onnxcam=onnxcam.__version__,
        ort=ort.__version__,
        onnx=onnx.__version__,
        images=len(next(iter(results.values())).right),
        processor=_processor(),
        stages=" | ".join(f"stage {i + 1}" for i in range(stages)),
        rules="|".join("---" for _ in range(stages)),
    )
    for name, found in results.items():
        values = np.array(found.correlations)
        low = np.percentile(values, 5, axis=0)
        cells = [f"{m:.3f} ({p:.3f})" for m, p in zip(values.mean(0), low, strict=True)]
        text += f"| {name} | {' | '.join(cells)} |\n"
    text += DECISIONS
    for name, found in results.items():
        shares = (found.like_float, found.like_deployed, found.right, found.float_right)
        text += f"| {name} | {' | '.join(f'{np.mean(s):.0%}' for s in shares)} |\n"
    return text


def _processor() -> str:
    """What decides how integers are multiplied: whether the processor has VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "processor unknown"
    return "a processor with VNNI" if "vnni" in flags else "a processor without VNNI"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised", description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="how many pictures")
    parser.add_argument("--models", nargs="*", help="some of the files only")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there, else print them")
    given = parser.parse_args(arguments)
    with open(ASSETS / "labels.csv", newline="") as file:
        rows = [(ASSETS / "images" / row["file"], int(row["class_index"])) for row in csv.DictReader(file)]
    pictures = rows[:: max(1, len(rows) // given.images)][: given.images]
    results = {}
    for subject in SUBJECTS:
        if not given.models or subject.name in given.models:
            results[subject.name] = measure(subject, pictures)
            last = float(np.mean([c[-1] for c in results[subject.name].correlations]))
            print(f"{subject.name}: {last:.3f} at the last stage", file=sys.stderr)
    text = document(results)
    if given.output:
        write_atomically(given.output, lambda stream: stream.write(text.encode()))
    else:
        print(text)
    missed = [n for n, f in results.items() if n in ASKED and np.mean([c[-1] for c in f.correlations]) < WANTED]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
