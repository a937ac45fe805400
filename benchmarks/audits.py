"""Audits with known answers, their speed and memory: `python -m benchmarks.audits [-o docs/audits-measured.md]`.

EfficientNet-Lite0 against its float16, int8 and dynamically quantised files; against copies with one layer's channels
in another order, and with another preprocessing; MobileNet-V2 as int8 TFLite (NHWC) against its float twin. Models and
pictures are those of ONNXCAM_ASSETS (default ../shared/assets). Speed is a multiple of the time that plain inference of
both models takes on the same pictures, decoded and prepared each time, in the same process, runs alternating.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

import onnxcam
from onnxcam.audit import audit, findings
from onnxcam.evaluation import examples
from onnxcam.model import Model
from onnxcam.pictures import open_image

ASSETS = Path(os.environ.get("ONNXCAM_ASSETS", "../shared/assets"))
LITE = "efficientnet-lite0"
FILES = {
    "float16": f"{LITE}-fp16", "int8, QDQ": f"{LITE}-qdq-int8", "int8, QOperator": f"{LITE}-qoperator-u8s8",
    "dynamic": f"{LITE}-dynamic-u8", "another exporter": f"{LITE}-torchscript-op13",
}  # fmt: skip
PERMUTED = (5, 20, 40)  # layers, in the listing, whose output channels change places


def load(name: str, preprocess: str = "efficientnet-lite") -> Model:
    return onnxcam.load(ASSETS / "models" / f"{name}.onnx", preprocess=preprocess)


def pictures(count: int) -> list[str]:
    listed = [str(p) for p in sorted((ASSETS / "images").iterdir())]
    return [listed[i % len(listed)] for i in range(count)]


def permuted(model: Model, layer: int) -> tuple[Model, str]:
    """The model with the output channels of one convolution in another order, and that layer's name."""
    row = [r for r in model.layers() if r.op == "Conv"][layer]
    raw = model.names.raw
    node = next(n for n in raw.nodes if n.name == row.node)
    name = node.inputs[1]
    order = np.random.default_rng(0).permutation(len(raw.constants[name]))
    return model.with_weights({name: np.ascontiguousarray(raw.constants[name][order])}), row.node


def cases(count: int) -> list[tuple[str, str, Model, Model, int]]:
    """(what, what is expected, first, second, pictures)."""
    original = load(LITE)
    found = [(what, "same reasons", original, load(name), count) for what, name in FILES.items()]
    for layer in PERMUTED:
        changed, name = permuted(original, layer)
        found.append((f"channels permuted at {name}", f"other reasons, from {name}", original, changed, count))
    found.append(("preprocessing of ImageNet", "other, from the input", original, load(LITE, "imagenet"), count))
    raw = load("mobilenet-v2-tflite-qdq-nhwc", "raw")
    found.append(
        ("MobileNet-V2, int8 TFLite (NHWC)", "same reasons", load("mobilenet-v2-float-nchw-logits", "tf"), raw, count)
    )
    return found


def known_answers(count: int) -> str:
    out = [
        "| second model | expected | rank correlation, last layer | 5 % are below | predictions agree | verdict "
        "| part ways at |",
        "| --- " * 7 + "|",
    ]
    for what, expected, first, second, n in cases(count):
        for model in (first, second):
            model.preprocess = model.preprocess.override(resize="warp")
        with tempfile.TemporaryDirectory() as folder:
            f = findings(audit(first, second, examples(pictures(n)), ["suggested"], folder, thumbs=0))
        last = f.layers[-1]
        parted = f.parted.layer if f.parted else "nowhere"
        agree = f.predictions.agree / f.predictions.pictures
        out.append(
            f"| {what} | {expected} | {f.score:.3f} [{last.low:.3f}, {last.high:.3f}] | {last.quantiles[0]:.3f} | "
            f"{agree:.1%} | {f.verdict} | {parted} |"
        )
        print(out[-1], flush=True)
    return "\n".join(out) + "\n"


def speed(count: int, runs: int = 3) -> str:
    """Time of an audit against that of plain inference, medians of alternating runs."""
    models = [load(LITE), load(FILES["int8, QDQ"])]
    sessions = [onnxruntime.InferenceSession(str(ASSETS / "models" / f"{n}.onnx")) for n in (LITE, FILES["int8, QDQ"])]
    listed = pictures(count)

    def plain() -> None:
        for path in listed:
            for model, session in zip(models, sessions, strict=True):
                x = model.preprocess.apply(open_image(path), model.spec).array
                session.run(None, {model.spec.name: x})

    def audited(layers: Sequence[str], thumbs: int | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            audit(*models, examples(listed), layers, folder, thumbs=thumbs)

    contenders = {
        "plain inference of both": plain,
        "audit, last layer, no pictures": lambda: audited(["auto"], 0),
        "audit, five layers, no pictures": lambda: audited(["suggested"], 0),
        "audit, five layers, a picture of every map": lambda: audited(["suggested"], None),
    }
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(runs):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - begun)
    base = float(np.median(spent["plain inference of both"]))
    out = ["| | pictures a second | times plain inference |", "| --- | --- | --- |"]
    for name, seconds in spent.items():
        middle = float(np.median(seconds))
        out.append(f"| {name} | {count / middle:.1f} | {middle / base:.2f} |")
    return "\n".join(out) + "\n"


def memory(counts: Sequence[int]) -> str:
    """Peak resident memory of a whole audit, a process for each number of pictures."""
    out = ["| pictures | peak memory | report.html |", "| --- | --- | --- |"]
    for count in counts:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.audits", "--one", str(count)], capture_output=True, text=True, check=True
        )
        peak, page = ran.stdout.split()[-2:]
        out.append(f"| {count} | {int(peak) / 1024:.0f} MiB | {int(page) / 1e6:.2f} MB |")
        print(out[-1], flush=True)
    return "\n".join(out) + "\n"


def one(count: int) -> None:
    """A whole audit with its page; prints what it took. A picture that comes again goes by another name."""
    from onnxcam.render.audit_page import save_page

    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i, path in enumerate(pictures(count)):
            link = Path(folder, f"{i:05d}.jpg")
            link.symlink_to(Path(path).resolve())
            names.append(str(link))
        out = Path(folder, "out")
        found = audit(load(LITE), load(FILES["int8, QDQ"]), examples(names), ["suggested"], out)
        page = save_page(findings(found), found)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, page.stat().st_size)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="pictures of each audit (default: 100)")
    parser.add_argument("--timed", type=int, default=40, help="pictures of each timed run (default: 40)")
    parser.add_argument("--memory", type=int, nargs="*", default=[300, 3000], help="pictures (default: 300 3000)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.one:
        one(arguments.one)
        return
    text = "\n".join(
        [
            "# Audits, measured\n",
            f"Written by `python -m benchmarks.audits --images {arguments.images} --timed {arguments.timed} -o "
            f"docs/audits-measured.md`: Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}, "
            f"{os.cpu_count()} cores. What an audit is: [audit.md](audit.md).\n",
            "## Known answers\n",
            f"EfficientNet-Lite0 in float32 against others, {arguments.images} pictures, Relevance-CAM.\n",
            known_answers(arguments.images),
            "## Speed\n",
            speed(arguments.timed),
            "## Memory\n",
            "A whole audit of two files, five layers, with a picture of every map and the page.\n",
            memory(arguments.memory),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
