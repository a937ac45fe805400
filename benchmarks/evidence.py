"""What each method is worth at each depth of trained networks: `python -m benchmarks.evidence [-o docs/evidence.md]`.

The pictures and networks are those of ONNXCAM_ASSETS (default ../shared/assets). Values are kept as `onnxcam evaluate`
keeps them, one folder for each network in benchmarks/.cache/evidence: a run that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import onnxcam
from benchmarks.models import CACHE
from onnxcam.composites import COMPOSITES, Composite, _lrp
from onnxcam.evaluation import Example, evaluate, examples
from onnxcam.evaluation.run import FLOORS
from onnxcam.methods import METHODS, Method
from onnxcam.preprocess import PRESETS
from onnxcam.rules import Gamma, Proportional, ZPlus

ASSETS = Path(os.environ.get("ONNXCAM_ASSETS", "../shared/assets"))
FOLDER = CACHE / "evidence"
METRICS = (
    "drop-50", "energy", "hit", "class-correlation", "iou-25", "iou-75"
)  # fmt: skip
HEADS = ("AD50", "energy", "hit", "hit, small", "class corr.", "IoU 25", "IoU 75")
RECOMMENDED = "contrast-map"
CAMS = (
    "grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam", "relevance-cam",
)  # fmt: skip
RESAMPLED = 2000


@dataclass(frozen=True)
class Network:
    """A trained network and four layers of it, fine to coarse."""

    file: str
    preprocess: str
    layers: tuple[str | int, ...]
    depths: tuple[str, ...]
    offset: int = 0
    about: str = ""


NETWORKS = {
    "efficientnet-lite0": Network(
        "efficientnet-lite0-torchscript-op13", "efficientnet-lite",
        ("/_blocks.3/_expand_conv/Conv", "/_blocks.5/_expand_conv/Conv", "/_blocks.11/_expand_conv/Conv",
         "/_conv_head/Conv"), ("56", "28", "14", "7"), about="the suggested layers, behind ReLU6",
    ),
    "squeezenet": Network(
        "squeezenet-fp16-opset7", "caffe", ("Conv_0", "Concat_1", "Concat_3", "Concat_7"), ("111", "55", "27", "13"),
        about="the first convolution, the outputs of fire3, fire5 and fire9; float16",
    ),
    "mobilenet-v2": Network(
        "mobilenet-v2-float-nchw-logits", "tf", (10, 21, 47, -1), ("56", "28", "14", "7"), 1,
        about="the suggested layers, behind ReLU6",
    ),
    "resnet20": Network(
        "cifar10-resnet20", "imagenet", (9, 18, 24, 27), ("32", "16", "8", "8, last"),
        about="of CIFAR-10, sees 32x32; the blocks' outputs, behind ReLU",
    ),
}  # fmt: skip

# Classes of CIFAR-10 by classes of ImageNet: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.
CIFAR: dict[int, tuple[int, ...]] = {
    0: (404, 895), 1: (436, 468, 511, 609, 627, 656, 661, 751, 817),
    2: (*range(7, 25), *range(80, 101), *range(127, 147)), 3: tuple(range(281, 286)), 4: (351, 352, 353),
    5: tuple(range(151, 269)), 6: (30, 31, 32), 7: (339, 340),
    8: (403, 510, 554, 625, 628, 724, 780, 814, 871, 914), 9: (555, 569, 675, 717, 734, 864, 867),
}  # fmt: skip


def _variants() -> list[Method]:
    """Maps of relevance by other rules and starts."""

    def of(name: str, rules: Composite, start: str, like: str) -> Method:
        COMPOSITES.setdefault(rules.name, rules)
        return replace(METHODS[like], name=name, composite=rules.name, start=start, combine_apart=None)

    additive = Proportional(guard=1e-6)
    gamma = Composite("evidence: gamma 0.25", _lrp(Gamma(0.25, "absorb", 1e-6), ZPlus(), additive))
    plain = COMPOSITES["relevance_cam"]
    return [
        of("relevance-cam, one-hot", plain, "one-hot", "relevance-cam"),
        of("relevance-map, one-hot", plain, "one-hot", "relevance-map"),
        of("relevance-map, gamma 0.25", gamma, "contrast", "relevance-map"),
        of("relevance-map, epsilon_plus, one-hot", COMPOSITES["epsilon_plus"], "one-hot", "relevance-map"),
    ]


def methods() -> list[Method]:
    named = [METHODS[name] for name in (RECOMMENDED, *CAMS, "relevance-map")]
    return [*named, *_variants()]


def pictures(network: str, count: int) -> list[Example]:
    """The pictures with their boxes, and their classes as the network has them."""
    listed = sorted((ASSETS / "images").iterdir())[:count]
    found = examples(listed, labels=ASSETS / "labels.csv", boxes=ASSETS / "boxes.csv")
    if network != "resnet20":
        return [replace(e, label=None if e.label is None else e.label + NETWORKS[network].offset) for e in found]
    classes = {old: new for new, olds in CIFAR.items() for old in olds}
    return [replace(e, label=classes[e.label]) for e in found if e.label in classes]


def load(network: str) -> onnxcam.Model:
    known = NETWORKS[network]
    whole = PRESETS[known.preprocess].override(resize="warp")  # boxes lie in the whole picture
    return onnxcam.load(ASSETS / "models" / f"{known.file}.onnx", preprocess=whole)


def measure(network: str, count: int, threads: int) -> None:
    model, known = load(network), NETWORKS[network]
    listed, begun = pictures(network, count), time.perf_counter()
    # The recommended method has a folder of its own: it can be measured again when it changes.
    for folder, some in ((network, methods()[1:]), (f"{network}-{RECOMMENDED}", methods()[:1])):
        found = evaluate(
            model, listed, some, known.layers, METRICS, FOLDER / folder, threads=threads, floors=folder == network,
            progress=lambda done, total: print(f"\r{network}: {done}/{total}", end="", flush=True),
        )  # fmt: skip
        print(f"\r{folder}: {found.pictures} pictures, {time.perf_counter() - begun:.0f} s")


# -- tables ------------------------------------------------------------------------------------------------------

Key = tuple[str, str, str]  # method, layer, metric
Values = dict[Key, dict[str, float]]  # of each picture


def values(network: str) -> tuple[Values, set[str], int]:
    """The values of pictures that the network has right, which of them have small objects, and of how many in all."""
    found: Values = defaultdict(dict)
    small, seen = set(), set()
    for folder in (f"{network}-{RECOMMENDED}", network):
        with (FOLDER / folder / "values.csv").open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                seen.add(row["image"])
                if row["class"] != row["label"]:
                    continue
                if row["object"] == "small":
                    small.add(row["image"])
                value = float(row["value"])
                if not np.isnan(value):
                    found[row["method"], row["layer"], row["metric"]][row["image"]] = value
    return found, small, len(seen)


def mean(found: Mapping[str, float], only: set[str] | None = None) -> float:
    chosen = [v for image, v in found.items() if only is None or image in only]
    return float(np.mean(chosen)) if chosen else float("nan")


def difference(
    a: Mapping[str, float], b: Mapping[str, float], only: set[str] | None = None
) -> tuple[float, float, float]:
    """Mean of a - b over pictures that both have, with its 95 % bootstrap interval."""
    shared = sorted(set(a) & set(b) & (only if only is not None else set(a)))
    gaps = np.array([a[image] - b[image] for image in shared])
    if not len(gaps):
        return (float("nan"),) * 3
    picks = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLED, len(gaps)))
    low, high = np.quantile(gaps[picks].mean(1), [0.025, 0.975])
    return float(gaps.mean()), float(low), float(high)


def network_table(network: str) -> str:
    found, small, total = values(network)
    known = NETWORKS[network]
    layers = list(dict.fromkeys(layer for method, layer, _ in found if layer))
    right = len({image for value in found.values() for image in value})
    out = [
        f"## {network}\n",
        f"{known.about}. {right} of {total} pictures are classified right, {len(small)} of them with small objects.\n",
    ]
    names = list(dict.fromkeys(method for method, _, _ in found))
    for layer, depth in zip(layers, known.depths, strict=True):
        out += [f"### {depth}: `{layer}`\n", f"| method | {' | '.join(HEADS)} |", "| --- " * (len(HEADS) + 1) + "|"]
        for name in names:
            at = "" if name in FLOORS else layer
            cells = []
            for metric, only in _columns(small):
                value = mean(found.get((name, at, metric), {}), only)
                blind = np.isnan(value) or (name in FLOORS and metric == "class-correlation")
                text = f"{value:.2f}" if metric == "class-correlation" else f"{100 * value:.1f}"
                cells.append("–" if blind else text)
            bold = "**" if name == RECOMMENDED else "*" if name in FLOORS else ""
            out.append(f"| {bold}{name}{bold} | {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def _columns(small: set[str]) -> list[tuple[str, set[str] | None]]:
    first: list[tuple[str, set[str] | None]] = [("drop-50", None), ("energy", None), ("hit", None), ("hit", small)]
    return [*first, *((metric, None) for metric in METRICS[3:])]


def decision(networks: Sequence[str]) -> str:
    """The recommended method against the best of the others, at every depth."""
    out = [
        "| network | depth | AD50 | best other | difference | energy | best other | difference "
        "| hit, small | best other | difference | class corr. |",
        "| --- " * 12 + "|",
    ]
    for network in networks:
        found, small, _ = values(network)
        layers = list(dict.fromkeys(layer for _, layer, _ in found if layer))
        for layer, depth in zip(layers, NETWORKS[network].depths, strict=True):
            cells = []
            for metric, only, lower in (("drop-50", None, True), ("energy", None, False), ("hit", small, False)):
                own = found[RECOMMENDED, layer, metric]
                others = {name: mean(found[name, layer, metric], only) for name in CAMS}
                best = (min if lower else max)(others, key=others.__getitem__)
                gap, low, high = difference(own, found[best, layer, metric], only)
                worse = low > 0 if lower else high < 0
                better = high < 0 if lower else low > 0
                mark = "**" if better else "_" if worse else ""
                cells += [
                    f"{100 * mean(own, only):.1f}", f"{100 * others[best]:.1f} ({best})",
                    f"{mark}{100 * gap:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{mark}",
                ]  # fmt: skip
            cells.append(f"{mean(found[RECOMMENDED, layer, 'class-correlation']):.2f}")
            out.append(f"| {network} | {depth} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def times(networks: Sequence[str], runs: int = 5) -> str:
    """Milliseconds for one picture at all four layers, one thread, medians."""
    out = [f"| method | {' | '.join(networks)} |", "| --- " * (len(networks) + 1) + "|"]
    spent: dict[str, list[str]] = defaultdict(list)
    for network in networks:
        model, known = load(network), NETWORKS[network]
        model.hold(64)
        picture = pictures(network, 300)[0].path
        prepared = model.preprocess.apply(onnxcam.pictures.open_image(picture), model.spec).array
        for method in methods():
            seconds = []
            for _ in range(runs + 1):
                begun = time.perf_counter()
                model.explain(prepared, known.layers, method=method, threads=1)
                seconds.append(time.perf_counter() - begun)
            spent[method.name].append(f"{1000 * float(np.median(seconds[1:])):.0f}")
    return "\n".join([*out, *(f"| {name} | {' | '.join(cells)} |" for name, cells in spent.items())]) + "\n"


def page(networks: Sequence[str], count: int) -> str:
    import onnxruntime

    command = f"python -m benchmarks.evidence --images {count} -o docs/evidence.md"
    head = (Path(__file__).parent / "evidence_head.md").read_text(encoding="utf-8")
    versions = f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}"
    return "\n".join(
        [
            head.format(command=command, versions=versions),
            decision(networks),
            "## Milliseconds for one picture, four layers\n",
            "One thread, the median of five; the machine is shared, so these are for comparing columns only.\n",
            times(networks),
            *(network_table(network) for network in networks),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-only", action="store_true", help="measure nothing, write the page")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.table_only:
        for network in arguments.networks:
            measure(network, arguments.images, arguments.threads)
    if arguments.output:
        arguments.output.write_text(page(arguments.networks, arguments.images), encoding="utf-8")


if __name__ == "__main__":
    main()
