"""Where the time of a compiled explanation goes: ONNX Runtime's profile by op type and node.

`python -m benchmarks.profile MODEL --layer L ...` compiles, runs under ONNX Runtime's profiler and prints time by op
type, split into nodes of the user's graph and recorded ones (changes of memory layout that ONNX Runtime puts in are
neither), and the nodes that take longest, with their shapes and, where they have any, multiply-adds per second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import onnxcam
from benchmarks.columns import epsilon_everywhere
from benchmarks.macs import macs_of, shapes_of
from benchmarks.models import CACHE, file_of, picture

RECORDED = "onnxcam/"


@dataclass(frozen=True)
class NodeTime:
    """One node of the optimised graph: its shortest time over the runs, in ms and the shapes it worked on.

    What else the machine does only adds to a time, so the shortest says most.
    """

    name: str
    op_type: str
    ms: float
    inputs: list[tuple[int, ...]]
    output: tuple[int, ...]

    @property
    def part(self) -> str:
        """Whose it is: the user's, recorded, or a change of memory layout that ONNX Runtime put in between."""
        if self.op_type.startswith("Reorder"):
            return "layout"
        return "recorded" if RECORDED in self.name else "user"

    @property
    def macs(self) -> int:
        """Multiply-adds, where the op is a convolution or a matrix product."""
        return macs_of(self.op_type, self.inputs, self.output)


def profile(
    model: bytes, feeds: dict[str, np.ndarray], runs: int, threads: int = 2, level: str = "all"
) -> list[NodeTime]:
    """Time every node of `model` as ONNX Runtime runs it, in the order it runs them."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        options.graph_optimization_level = {
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
            "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        }[level]
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    return node_times(events, weight_shapes(model))


def weight_shapes(model: bytes) -> dict[str, tuple[int, ...]]:
    """Node name to the shape of its weight; ONNX Runtime's profile leaves weights out that it has packed."""
    proto = onnx.load_model_from_string(model)
    shapes = shapes_of(proto)
    return {n.name: shapes[n.input[1]] for n in proto.graph.node if len(n.input) > 1 and n.input[1] in shapes}


def node_times(events: list[dict[str, Any]], weights: Mapping[str, tuple[int, ...]]) -> list[NodeTime]:
    """The nodes in ONNX Runtime's list of events."""
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    details: dict[tuple[str, str, str], dict[str, Any]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        key = (event["name"].removesuffix("_kernel_time"), args.get("op_name", "?"), args.get("node_index", ""))
        times[key].append(event["dur"] / 1e3)
        details.setdefault(key, args)
    found = []
    for (name, op, index), took in times.items():
        args = details[name, op, index]
        inputs, outputs = _shapes(args.get("input_type_shape")), _shapes(args.get("output_type_shape"))
        if len(inputs) == 1 and name in weights:
            inputs.append(weights[name])
        found.append(NodeTime(name, op, min(took), inputs, outputs[0] if outputs else ()))
    return found


def _shapes(listed: list[dict[str, list[int]]] | None) -> list[tuple[int, ...]]:
    return [tuple(shape) for entry in listed or [] for shape in entry.values()]


def report(nodes: list[NodeTime], top: int = 15) -> str:
    """The tables as text."""
    parts = {part: [n for n in nodes if n.part == part] for part in ("user", "recorded", "layout")}
    shares = ", ".join(f"{part} {_ms(members):.1f} ms ({len(members)} nodes)" for part, members in parts.items())
    lines = [f"{_ms(nodes):.1f} ms: {shares}", "", _row("op type", "ms", "user", "recorded", "nodes", "G/s")]
    groups: dict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[node.op_type].append(node)
    for op, members in sorted(groups.items(), key=lambda item: -_ms(item[1])):
        split = [f"{_ms([n for n in members if n.part == part]):.2f}" for part in ("user", "recorded")]
        lines.append(_row(op, f"{_ms(members):.2f}", *split, len(members), _speed(members)))
    lines += ["", f"the {top} nodes that take longest", f"{'ms':>8} {'G/s':>5}  node"]
    for node in sorted(nodes, key=lambda n: -n.ms)[:top]:
        shapes = " ".join(map(_shape, node.inputs[:2]))
        lines.append(
            f"{node.ms:8.2f} {_speed([node]):>5}  {node.name} ({node.op_type}) {shapes} -> {_shape(node.output)}"
        )
    return "\n".join(lines)


def _ms(nodes: Iterable[NodeTime]) -> float:
    return sum(n.ms for n in nodes)


def _speed(nodes: list[NodeTime]) -> str:
    """Giga multiply-adds per second."""
    macs, ms = sum(n.macs for n in nodes), _ms(nodes)
    return f"{macs / ms / 1e6:.0f}" if macs and ms else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _row(op: object, *cells: object) -> str:
    return f"{op!s:<22}" + "".join(f"{cell!s:>13}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="an ONNX file, or a name that benchmarks.speed takes")
    parser.add_argument("--layer", "-l", action="append", dest="layers", help="as for explain; 'input' is the input")
    parser.add_argument("--method", default=None, help="default: relevance-cam, or lrp at the input")
    parser.add_argument("--composite", default=None, help="any of onnxcam's, or 'epsilon': epsilon everywhere")
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--plain", action="store_true", help="profile the user's model alone, for comparison")
    parser.add_argument("--level", choices=("all", "extended", "basic"), default="all", help="of graph optimisation")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    model = onnxcam.load(file_of(args.model, args.cache))
    feeds = {model.spec.name: picture((args.batch, model.spec.channels or 3, *model.size))}
    if args.plain:
        data = file_of(args.model, args.cache).read_bytes()
    else:
        layers = [model.spec.name if layer == "input" else layer for layer in args.layers or ["auto"]]
        method = args.method or ("lrp" if model.spec.name in layers else "relevance-cam")
        composite = epsilon_everywhere() if args.composite == "epsilon" else args.composite
        data = onnxcam.compile(model, layers, slots=args.targets, method=method, composite=composite).to_bytes()
        feeds["targets"] = np.full((args.batch, args.targets), -1)
    print(report(profile(data, feeds, args.runs, args.threads, args.level), args.top))


if __name__ == "__main__":
    main()
