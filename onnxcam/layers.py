"""Layers: the places a user can explain, their names, and what a typed name means.

A layer is a node with the BatchNormalization and the activation that follow it; its tensor is what the activation puts
out. `list_layers` lists those with a map, in the order of the graph; `resolve` turns what was typed (a node, a tensor,
`OpType_N`, a module path, a glob, an index, `auto`, `suggested`, `all`) into layers. Names are those of the user's
file; a tensor that canonising would fold away is kept when it is asked for.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.graph import Graph, Node, Shape
from onnxcam.maps import Axes, Form, Maps
from onnxcam.operators.roles import inside_normalisations
from onnxcam.signs import mostly_positive_tensors, nonnegative_tensors, self_gates

ACTIVATIONS = set(
    "Relu LeakyRelu PRelu Elu Selu Celu Softplus Softsign Sigmoid HardSigmoid HardSwish Swish Mish Gelu Tanh Clip "
    "ThresholdedRelu Shrink".split()
)
_SQUASHERS = {"Sigmoid", "HardSigmoid", "Softmax"}
# Ops that make no layer of their own: they only rearrange, or work on statistics.
_NO_LAYER = set(
    "Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Gather Identity Dropout Cast Expand Tile Pad Shape "
    "Constant ConstantOfShape Range Where QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split()
)
NORMS = set(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization GroupNormalization InstanceNormalization BatchNormalization LpNormalization "
    "MeanVarianceNormalization".split()
)
LINEAR = set(
    "Conv ConvTranspose ConvInteger QLinearConv FusedConv NhwcConv NhwcFusedConv DeformConv MatMul Gemm MatMulInteger "
    "QLinearMatMul QGemm FusedMatMul FusedGemm MatMulNBits MatMulIntegerToFloat Einsum".split()
)
_SUMS = {"Add", "Sum", "QLinearAdd"}
SIGNS = ("nonnegative", "mostly positive", "signed")
KEYWORDS = ("auto", "suggested", "all")


@dataclass(frozen=True)
class Layer:
    """A place that can be explained.

    Attributes:
        index: its position in the listing; None for a tensor that is not listed.
        node: the node it is named after, as in the user's file.
        op: that node's op type.
        tensor: the tensor whose channels are weighted.
        shape: the tensor's shape, whatever its layout.
        stage: 1 for the finest resolution, counting up as the maps get coarser.
        sign: "nonnegative"; "mostly positive" behind an activation such as SiLU; "signed" where much may be negative.
        suggested: the best place at its resolution.
        bottleneck: everything the model sees on its way to the logits passes through this one tensor.
        path: the module path, where the file records one.
        form: how the tensor is a map; None for features (N, F), which are none.
        reaches: False behind the last attention of a network that reads its class token: the tokens of the picture
            lead to no logit from here on, and the map is zero.
    """

    index: int | None
    node: str
    op: str
    tensor: str
    shape: Shape
    stage: int
    sign: str
    suggested: bool = False
    bottleneck: bool = False
    path: str = ""
    form: Form | None = None
    reaches: bool = True

    @property
    def spatial(self) -> Shape:
        """The size of the map."""
        return self.shape[2:] if self.form is None else self.form.grid

    def activation(self, ops: Any, x: Any) -> Any:
        """The layer's tensor as (N, C, *spatial), with the primitives of an engine; features stay (N, F)."""
        return x if self.form is None else self.form.activation(ops, x)

    def relevance(self, ops: Any, r: Any) -> Any:
        """Relevance (T, *shape) as (T, N, C, *spatial)."""
        return r if self.form is None else self.form.relevance(ops, r)

    def to_json(self) -> dict[str, Any]:
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "form"}
        return known | {"map": list(self.spatial), "form": "" if self.form is None else self.form.describe()}


def activation_output(graph: Graph, tensor: str, gates: Mapping[str, set[str]] | None = None) -> str:
    """The tensor at the end of the BatchNormalization and activation that follow `tensor`; itself where none does.

    `gates` is `self_gates(graph)`, where it is at hand.
    """
    gates = self_gates(graph) if gates is None else gates
    normalised = activated = False
    while tensor not in graph.outputs:
        readers = graph.consumers(tensor)
        if (rounded := rounded_output(graph, tensor)) != tensor:
            tensor = rounded
        elif len(readers) == 1 and readers[0].op_type == "BatchNormalization" and not (normalised or activated):
            normalised, tensor = True, readers[0].outputs[0]
        elif len(readers) == 1 and readers[0].op_type in ACTIVATIONS and not activated:
            activated, tensor = True, readers[0].outputs[0]
        elif not activated and (product := _self_gated(readers, gates)):
            activated, tensor = True, product
        else:
            break
    return tensor


def rounded_output(graph: Graph, tensor: str) -> str:
    """What `tensor` is after the rounding of a quantised network, where nothing reads it before; else itself."""
    end = tensor
    for op in ("QuantizeLinear", "DequantizeLinear"):
        readers = graph.consumers(end)
        if end in graph.outputs or len(readers) != 1 or readers[0].op_type != op or readers[0].inputs[0] != end:
            return tensor
        end = readers[0].outputs[0]
    return end


def _self_gated(readers: Sequence[Node], gates: Mapping[str, set[str]]) -> str | None:
    """The product x * gate(x), where its nodes are all that read x."""
    made = [n.outputs[0] for n in readers]
    for product in made:
        if product in gates and all(name == product or name in gates[product] for name in made):
            return product
    return None


def list_layers(
    graph: Graph,
    logits: str,
    paths: Mapping[str, str] | None = None,
    inputs: Mapping[str, Axes] | None = None,
    maps: Maps | None = None,
    reached: Collection[str] | None = None,
) -> list[Layer]:
    """The layers between the graph's inputs and `logits` whose tensor is a map, in topological order.

    Of tensors (N, C, *spatial) all are listed. Of tokens and the like those are that a block hands on: sums, what is
    normalised, what everything passes through; not what lies inside an attention.

    Args:
        graph: a canonised graph.
        logits: the tensor that explanations start at.
        paths: node name to module path, where the file records them.
        inputs: the spatial axes of the inputs, where they are known.
        maps: `Maps(graph, inputs)`, where it is at hand.
        reached: the tensors that relevance comes to, where that is known: no other is suggested.
    """
    maps = maps or Maps(graph, inputs)
    self_gated = self_gates(graph)
    inside_gates, masks = _gates(graph, self_gated)
    on_path = _seen(graph, logits, inside_gates | masks)
    below = {name for node in on_path for name in node.inputs}
    nonnegative = nonnegative_tensors(graph)
    mostly = mostly_positive_tensors(graph, nonnegative)
    bottlenecks = _bottlenecks(graph, on_path)
    dead = maps.dead(logits)
    rows: list[Layer] = []
    seen = inside_normalisations(graph)
    learned: set[str] = set()  # what lies behind a linear operator, and not in the preparation of the input
    for node in on_path:
        tensor = node.outputs[0]
        if node.op_type in LINEAR or any(name in learned for name in node.inputs):
            learned.update(node.outputs)
        if node.op_type in _NO_LAYER or tensor in seen or tensor not in below or tensor not in learned:
            continue
        last = activation_output(graph, tensor, self_gated)
        if last in seen or last not in below:
            continue
        seen.update(_chain(graph, tensor, last))
        form = maps.form(last)
        shape = graph.shape(last)
        if form is None or shape is None or not _is_float(graph, last):
            continue
        if not (form.plain or _is_handed_on(node, last, form, maps, bottlenecks, nonnegative)):
            continue
        sign = "nonnegative" if last in nonnegative else "mostly positive" if last in mostly else "signed"
        path = (paths or {}).get(node.name, "")
        rows.append(
            Layer(
                len(rows), node.name, node.op_type, last, shape, 0, sign, False, last in bottlenecks, path, form,
                last not in dead,
            )
        )  # fmt: skip
    return _suggest(_stages(rows), reached)


def _is_float(graph: Graph, tensor: str) -> bool:
    dtype = graph.dtype(tensor)
    return dtype is None or dtype.kind == "f"


def _is_handed_on(
    node: Node, tensor: str, form: Form, maps: Maps, bottlenecks: Collection[str], nonnegative: Collection[str]
) -> bool:
    """True for tokens, windows and channels last that are worth listing."""
    if form.heads:
        return False
    if tensor in bottlenecks or node.op_type in NORMS:
        return True
    return (node.op_type in _SUMS and maps.seen(node.inputs) > 1) or (form.channels_last and tensor in nonnegative)


def _seen(graph: Graph, logits: str, weights: Collection[str]) -> list[Node]:
    """The nodes from the inputs to `logits`, in order, without those that lead to weights or shapes only."""
    wanted = {logits}
    found = []
    for node in reversed(graph.between(graph.inputs, logits)):
        if any(name in wanted for name in node.outputs):
            wanted.update(name for name in node.inputs if name not in weights)
            found.append(node)
    return [node for node in reversed(found) if _holds_data(graph, node)]


def _holds_data(graph: Graph, node: Node) -> bool:
    """False for nodes that compute shapes, indices or conditions."""
    dtype = graph.dtype(node.outputs[0])
    return dtype is None or dtype.kind == "f" or node.outputs[0] in graph.data


def _gates(graph: Graph, self_gated: Mapping[str, set[str]]) -> tuple[set[str], set[str]]:
    """Tensors that are weights and nothing seen: those inside x * gate(x), and squashed masks of something else."""
    inner = {
        name
        for product, names in self_gated.items()
        for name in names
        if all(set(reader.outputs) & (names | {product}) for reader in graph.consumers(name))
    }
    masks = set()
    for node in graph.nodes:
        if node.op_type not in _SQUASHERS:
            continue
        last = rounded_output(graph, node.outputs[0])
        readers = graph.consumers(last)
        if readers and all(_scales(reader) for reader in readers):
            masks.update(_chain(graph, node.outputs[0], last))
    return inner, masks - inner


def _scales(node: Node) -> bool:
    return node.op_type == "Mul" and not any(node.is_constant(i) for i in range(len(node.inputs)))


def _chain(graph: Graph, first: str, last: str) -> set[str]:
    """The tensors from `first` to `last`, both included."""
    return {first, last} | {n.outputs[0] for n in graph.between([first], last)}


def _bottlenecks(graph: Graph, on_path: Sequence[Node]) -> set[str]:
    """The tensors that every way from the inputs to the logits passes through.

    A tensor is one if, when it has just been made, no other tensor on the path still waits for a reader. That holds in
    any topological order.
    """
    found: set[str] = set()
    inside = {name for node in on_path for name in node.outputs} | set(graph.inputs)
    readers: dict[str, int] = defaultdict(int)
    for node in on_path:
        for name in set(node.inputs) & inside:
            readers[name] += 1
    waiting: dict[str, int] = {name: readers[name] for name in graph.inputs if readers[name]}
    for node in on_path:
        for name in set(node.inputs) & inside:
            waiting[name] -= 1
            if not waiting[name]:
                del waiting[name]
        waiting.update((name, readers[name]) for name in node.outputs if readers[name])
        if len(waiting) == 1:
            found.update(waiting)
    return found


def _stages(rows: Sequence[Layer]) -> list[Layer]:
    cells = [prod(n for n in r.spatial if isinstance(n, int)) for r in rows]
    sizes = sorted(set(cells), reverse=True)
    return [replace(r, stage=sizes.index(n) + 1) for r, n in zip(rows, cells, strict=True)]


def _suggest(rows: list[Layer], reached: Collection[str] | None = None) -> list[Layer]:
    """Mark, per resolution, the last layer through which all evidence passes, or the last where there is none of these.

    In the latter half of a resolution's layers, one that cannot be negative is preferred, then one behind an
    activation. What relevance does not come to, as the queries of an attention, is none of them. Where only a class
    token is read in the end, it is the last layer from which the other tokens still reach the logits.
    """
    by_stage: dict[int, list[Layer]] = defaultdict(list)
    for row in rows:
        if reached is None or row.tensor in reached:
            by_stage[row.stage].append(row)
    chosen = {best.index for members in by_stage.values() if (best := _best(members)) is not None}
    return [replace(r, suggested=r.index in chosen) for r in rows]


def _best(members: list[Layer]) -> Layer | None:
    live = [r for r in members if r.reaches]
    if len(live) < len(members):
        live = ([r for r in live if r.op in NORMS | _SUMS] or live)[-1:]
    pool = [r for r in live if r.bottleneck] or live
    late = [r for r in pool if r in members[len(members) // 2 :]] or pool[-1:]
    return max(late, key=lambda r: (-SIGNS.index(r.sign), r.index or 0), default=None)


def better_neighbour(layer: Layer, rows: Sequence[Layer]) -> Layer | None:
    """The nearest layer of the same resolution that cannot be negative; None where there is none."""
    near = [r for r in rows if r.spatial == layer.spatial and r.sign == "nonnegative"]
    if not near:
        near = [r for r in rows if r.spatial == layer.spatial and r.sign == "mostly positive"]
    position = layer.index if layer.index is not None else 0
    return min(near, key=lambda r: (abs((r.index or 0) - position), not r.bottleneck), default=None)


# -- names -------------------------------------------------------------------------------------------------------


class Names:
    """What names mean in the user's file.

    `raw` makes that file a graph, before canonising, with every node named; it is called when a name is first asked
    for, as keywords and numbers do without. `paths` maps node names to module paths.
    """

    def __init__(self, raw: Callable[[], Graph], paths: Mapping[str, str]):
        self._raw, self.paths = raw, paths

    @cached_property
    def raw(self) -> Graph:
        return self._raw()

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.raw.nodes}

    @cached_property
    def tensors(self) -> set[str]:
        return {name for node in self.raw.nodes for name in node.outputs if name} | set(self.raw.inputs)

    @cached_property
    def _of_type(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.raw.nodes:
            found[node.op_type].append(node)
        return found

    def node(self, text: str) -> Node | None:
        """The node of that name, or the N-th of its type for `OpType_N`."""
        if text in self.nodes:
            return self.nodes[text]
        match = re.fullmatch(r"(\w+?)_(\d+)", text)
        if match and text not in self.tensors:
            same = self._of_type.get(match[1], [])
            if int(match[2]) < len(same):
                return same[int(match[2])]
        return None

    def last_in_module(self, text: str) -> Node | None:
        """The last node inside the module of that path whose output goes to others."""
        wanted = text.strip("/").replace("/", ".")
        inside = [
            node
            for node in self.raw.nodes
            if (path := self.paths.get(node.name)) and (path == wanted or path.startswith(wanted + "."))
        ]
        names = {node.name for node in inside}
        leaving = [
            node
            for node in inside
            if node.op_type not in ("Shape", "Constant", "ConstantOfShape")
            and any(reader.name not in names for reader in self.raw.consumers(node.outputs[0]))
        ]
        found = leaving or inside
        return found[-1] if found else None

    def nearest(self, text: str, n: int = 3) -> list[str]:
        """The names most like `text`, case ignored."""
        pool = {name.lower(): name for name in (*self.nodes, *self.tensors, *self.paths.values()) if name}
        found = difflib.get_close_matches(text.lower(), pool, n=n, cutoff=0.5)
        if len(found) < n:
            found += [low for low in pool if text.lower() in low and low not in found][: n - len(found)]
        return [pool[low] for low in found]


def module_paths(nodes: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """Node name to module path, as far as the file records it.

    PyTorch's dynamo exporter writes scopes into the node's metadata, its TorchScript exporter into the node's name
    (`/layer4/layer4.1/conv2/Conv`).

    Args:
        nodes: (name, metadata_props) of each node.
    """
    paths = {}
    for name, metadata in nodes:
        scopes = metadata.get("pkg.torch.onnx.name_scopes")
        if scopes:
            parts = re.findall(r"'([^']*)'", scopes)
            paths[name] = parts[-2] if len(parts) > 1 else ""
        elif name.startswith("/"):
            parts = name.strip("/").split("/")[:-1]
            paths[name] = _joined(parts)
    return {name: path for name, path in paths.items() if path}


def _joined(parts: Sequence[str]) -> str:
    """`layer4`, `layer4.1`, `conv2` as `layer4.1.conv2`: a part that repeats the one before replaces it."""
    path: list[str] = []
    for part in parts:
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def resolve(text: str | int, names: Names, rows: Sequence[Layer]) -> list[str] | list[Layer]:
    """What a typed layer means: layers of the listing, or the tensors of the file that it names.

    Raises:
        UsageError: nothing is called that; the message offers the nearest names.
    """
    text = str(text).strip()
    suggested = [r for r in rows if r.suggested]
    if text in KEYWORDS:
        wanted = {"auto": suggested[-1:], "suggested": suggested, "all": list(rows)}[text]
        if not wanted:
            raise UsageError(
                "no layer of this model has a map: no tensor on the way to the logits has a spatial extent that is "
                "known"
            )
        return wanted
    if re.fullmatch(r"-\d+", text):
        if int(text) < -len(suggested):
            limits = f"-1 to -{len(suggested)}" if suggested else "there is none"
            raise UsageError(f"layer {text}: negative numbers count suggested layers, {limits}; see `onnxcam layers`")
        return [suggested[int(text)]]
    by_node = {r.node: r for r in rows}
    if (node := names.node(text)) is not None:
        return [by_node[node.name]] if node.name in by_node else [activation_output(names.raw, node.outputs[0])]
    if text in by_node:  # a node that canonising made
        return [by_node[text]]
    if text in names.tensors:
        return [text]
    if re.fullmatch(r"\d+", text):
        if int(text) >= len(rows):
            limits = f"layers run from 0 to {len(rows) - 1}" if rows else "this model has no layer with a map"
            raise UsageError(f"there is no layer {text}: {limits}; see `onnxcam layers`")
        return [rows[int(text)]]
    if (last := names.last_in_module(text)) is not None:
        return [by_node[last.name]] if last.name in by_node else [activation_output(names.raw, last.outputs[0])]
    if any(c in text for c in "*?["):
        found = [r for r in rows if any(fnmatch.fnmatchcase(s, text) for s in (r.node, r.tensor, r.path) if s)]
        if found:
            return found
        raise UsageError(f"no layer matches {text!r}; see `onnxcam layers`")
    near = names.nearest(text)
    hint = f"the nearest names are {', '.join(near)}" if near else "none is like it"
    raise UsageError(f"no layer is called {text!r}: {hint}; see `onnxcam layers`")
