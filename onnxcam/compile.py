"""Compile an explanation: forward, start, walk and combination recorded as one ONNX model.

Image in; logits, the classes explained and one map per layer out. The model is made of standard ONNX ops, keeps the
user's graph as it is with the explanation behind it, and runs and deploys like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcam.box import blank, boxed
from onnxcam.canonise.order import tidy
from onnxcam.check import unreached, why_no_logits
from onnxcam.composites import Composite, composite as find_composite, suited
from onnxcam.dequantised import along, parts
from onnxcam.engines.onnx import BATCH, RecorderOps, Symbol
from onnxcam.errors import ModelError, OpenBatchError, UsageError
from onnxcam.files import safe_name, write_atomically
from onnxcam.graph import Graph
from onnxcam.heads import before_rounding, count_classes
from onnxcam.labels import labels_to_metadata
from onnxcam.layers import Layer
from onnxcam.methods import METHODS, Method, method as find_method
from onnxcam.operators import lookup
from onnxcam.operators.kinds import Array
from onnxcam.propagate import per_image, walk
from onnxcam.signs import nonnegative_tensors
from onnxcam.starts import Start, start as find_start
from onnxcam.taps import detach
from onnxcam.targets import Target, target_codes
from onnxcam.weights import Buffer, pieces

if TYPE_CHECKING:
    from onnxcam.model import Canonical, Model, Size

# ScatterElements adds from opset 16 on; 17 is what the official converter is best tried with.
OLDEST_OPSET = 17
TARGETS = "targets"
LOGITS = "logits"
CLASSES = "classes"  # the classes explained, numbers where codes were given
BALANCE = "balance"
PREDICTED = -1  # as a target: the most likely class; -2 the second most likely, and so on


class _Recorded:
    """Values while recording: constants are known, everything else is a symbol of the graph."""

    def __init__(self, graph: Graph, ops: RecorderOps, batch: int | None = None):
        self.graph, self.ops, self.batch = graph, ops, batch
        self._tensors: dict[str, gs.Tensor] = ops.graph.tensors()
        self._positive = nonnegative_tensors(graph)
        self._made: dict[tuple[str, str], Symbol] = {}

    def host(self, tensor: str) -> np.ndarray:
        constant = self.graph.constants.get(tensor)
        if constant is None:
            raise ModelError(
                f"{self._described(tensor)} is only known when the model runs, so what depends on it cannot be "
                "compiled; explain with --engine numpy"
            )
        return constant

    def _described(self, tensor: str) -> str:
        node = self.graph.producer(tensor)
        return f"tensor {tensor!r}" + (f" of node {node.name!r} ({node.op_type})" if node else "")

    def index(self, tensor: str) -> Any:
        constant = self.graph.constants.get(tensor)
        if constant is not None:
            return constant.astype(np.int64)
        symbol = Symbol(self.ops, self._tensors[tensor], self.shape(tensor))
        if self.graph.dtype(tensor) == np.int64:
            return symbol
        return self.ops.record("Cast", [symbol], symbol.shape, dtype=np.int64, to=7)

    def shape(self, tensor: str) -> Any:
        constant = self.graph.constants.get(tensor)
        if constant is not None:
            return constant.shape
        shape = self.graph.shape(tensor)
        if shape is None or sum(not isinstance(n, int) for n in shape) > 1:
            for node in self.graph.nodes:
                lookup(node)  # behind a node that is not known, no shape is: then that is the reason
            raise OpenBatchError(
                f"the shape of {self._described(tensor)} is not known, so it cannot be compiled; explain with "
                "--engine numpy, or fix the batch"
            )
        return tuple(n if isinstance(n, int) else BATCH for n in shape)

    def precise(self, tensor: str) -> bool:
        dtype = self.graph.dtype(tensor)
        return dtype is not None and dtype.kind == "f" and dtype.itemsize >= 4

    def array(self, tensor: str) -> Symbol:
        return self.derived(tensor, "", lambda x: x)

    def derived(self, tensor: str, what: str, make: Callable[[Array], Array]) -> Symbol:
        key = (tensor, what)
        if key not in self._made:
            if what:
                self._made[key] = make(self.array(tensor))
            else:
                self._made[key] = self._dequantised(tensor) or self.ops.tap(
                    self._tensors[tensor], self.shape(tensor), tensor in self._positive
                )
        return self._made[key]

    def _dequantised(self, tensor: str) -> Symbol | None:
        """A weight that the graph keeps as integers, as a real number of its own; None for any other tensor.

        Behind the DequantizeLinear of the forward pass it would be computed anew in each run, which ONNX Runtime does
        not fold; what is recorded here it folds when the model is loaded.
        """
        found = parts(self._tensors[tensor].inputs[0]) if self._tensors[tensor].inputs else None
        if found is None:
            return None
        q, scale, zero, axis = found
        integers: Any = self._tensors[tensor].inputs[0].inputs[0]
        real = self.ops.tap(integers, q.shape, False)
        if zero is not None and np.any(zero):
            real = real - along(zero.astype(np.float32), q.ndim, axis)
        real = real * along(scale, q.ndim, axis)
        real.positive = real.positive or tensor in self._positive
        return real


@dataclass(frozen=True)
class Compiled:
    """An explanation as a model.

    Attributes:
        maps: layer name to the output that holds its map, (N, T, *spatial).
        notes: what a user should know, an opset that was raised, say.
        cut: the model without its large weights, and
        weights: those by name (see `onnxcam.weights`).
    """

    maps: dict[str, str]
    notes: list[str]
    cut: onnx.ModelProto
    weights: Mapping[str, np.ndarray]

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model: image in; `logits`, `classes` (those explained) and the maps out."""
        return onnx.ModelProto.FromString(self.to_bytes())

    def to_bytes(self) -> bytes:
        """What the file holds, for a session, say.

        Raises:
            ModelError: the model is larger than what one ONNX file holds.
        """
        return b"".join(self._pieces())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _length(pieces(self.cut.SerializeToString(), self.weights))

    def save(self, path: str | Path) -> Path:
        """Write the model; it appears whole or not at all.

        Raises:
            UsageError: the place cannot be written to.
            ModelError: the model is larger than what one ONNX file holds.
        """
        parts = self._pieces()
        return write_atomically(Path(path), lambda stream: stream.writelines(parts))

    def _pieces(self) -> list[Buffer]:
        parts = pieces(self.cut.SerializeToString(), self.weights)
        if _length(parts) >= onnx.checker.MAXIMUM_PROTOBUF:
            raise ModelError("the compiled model is larger than 2 GB, which is more than one ONNX file holds")
        return parts


def _length(parts: Sequence[Buffer]) -> int:
    return sum(len(part) for part in parts)


def compile(
    model: Model,
    layers: Sequence[str | int] = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    slots: int = 1,
    method: str | Method = "relevance-cam",
    composite: str | Composite | None = None,
    start: str | Start | None = None,
    attention: str | None = None,
    size: Size | None = None,
    inputs: Mapping[str, Any] | None = None,
    upsample: bool = False,
    normalise: bool = False,
) -> Compiled:
    """Compile the explanation of `model` at `layers`.

    Args:
        model: from `onnxcam.load`.
        layers: what `--layer` accepts.
        targets: classes fixed in the model: numbers, labels, "predicted", "top3". Without any the model has an input
            `targets`, int64 (N, slots), where -1 stands for the predicted class, -2 for the second.
        slots: how many targets that input holds for each image.
        method, composite, start, attention: as for `explain`.
        size: spatial size of the input, where the file leaves it open.
        inputs: values to fix for inputs that hold for all images: a switch, a prompt.
        upsample: bring every map to the input's size, bilinearly.
        normalise: scale every map to 0..1 by its own minimum and maximum; a constant map gives zeros.

    Raises:
        UsageError: a name means nothing.
        ModelError: the model cannot be compiled there; the message names the node.
    """
    from onnxcam.feeds import settled

    chosen = find_method(method)
    if not chosen.compiles:
        raise UsageError(
            f"method {chosen.name} is no single pass, so no one model computes it: use explain, or compile one of "
            f"{', '.join(m.name for m in METHODS.values() if m.compiles)}"
        )
    begin = find_start(start or chosen.start)
    given = settled(model, model.given(size or model.size), inputs)
    whole = model.canonical(given)
    rules = find_composite(composite) if composite else suited(chosen.composite, whole.graph, whole.logits)
    rules = rules.with_attention(attention)
    typed = chosen.places([layers] if isinstance(layers, str | int) else list(layers), model)
    found = model.resolve(typed, given, chosen.vectors)
    plain = model.canonical(given)
    chosen.require(plain.graph, found, plain.logits)
    tensors = list(dict.fromkeys(layer.tensor for layer in found.values()))
    listed = {row.tensor for row in model.layers(given)}
    canonical = model.canonical(given, frozenset(tensors) - listed, rules.fold_batchnorm)
    if rules.needs_box:
        if model.spec.layout is None:
            raise UsageError(f"composite {rules.name} needs the range of the input, which only pictures have")
        ranges = {model.spec.name: model.preprocess.bounds(model.spec)}
        rules = boxed(rules, canonical, ranges, blank(canonical.graph))
    if reason := why_no_logits(canonical.graph, canonical.logits):
        raise ModelError(reason)
    fixed = None
    if targets is not None:
        listed_targets = [targets] if isinstance(targets, str | int | np.integer) else list(targets)
        fixed = target_codes(listed_targets, classes_in(canonical), model.labels)
    count = len(fixed) if fixed else slots
    if count < 1:
        raise UsageError(f"{count} targets is nothing to compile for: give 1 or more")
    made = record(
        canonical, found, chosen, rules, begin, count=count, fixed=fixed, ranks=count, upsample=upsample,
        normalise=normalise,
    )  # fmt: skip
    proto, maps = made.proto, made.maps
    metadata = {
        "onnxcam.source_sha256": model.sha256,
        "onnxcam.method": chosen.name,
        "onnxcam.composite": rules.name,
        "onnxcam.start": begin.name,
        **({"onnxcam.attention": rules.attention} if rules.attention else {}),
        "onnxcam.layers": json.dumps({name: layer.tensor for name, layer in found.items()}),
        "onnxcam.maps": json.dumps(maps),
        "onnxcam.targets": json.dumps(fixed if fixed is not None else {"input": count}),
        "onnxcam.map_values": json.dumps({"upsampled": upsample, "normalised": normalise}),
        "onnxcam.source": model.name,
        "onnxcam.version": _version(),
    }
    proto.producer_name, proto.producer_version = "onnxcam", _version()
    kept = model.metadata | (labels_to_metadata(model.labels) if model.labels else {})
    onnx.helper.set_model_props(proto, {**kept, "onnxcam.preprocess": model.preprocess.to_json(), **metadata})
    return Compiled(maps, made.notes, proto, made.weights)


@dataclass(frozen=True)
class Recording:
    """A recorded model, layer name to output name, notes, (node, op type, rule) of each row of its balances, and the
    weights that were left out of the model."""

    proto: onnx.ModelProto
    maps: dict[str, str]
    notes: list[str]
    balanced: list[tuple[str, str, str]]
    weights: dict[str, np.ndarray]


def record(
    canonical: Canonical,
    layers: Mapping[str, Layer],
    method: Method,
    rules: Composite,
    start: Start,
    *,
    count: int = 1,
    fixed: Sequence[int] | None = None,
    upsample: bool = False,
    normalise: bool = False,
    ranks: int = 1,
    sums: bool = False,
    balances: bool = False,
    masks: Mapping[str, np.ndarray] | None = None,
) -> Recording:
    """Record forward, start, walk and combination.

    `ranks` is how many of the most likely classes targets may ask for. `sums` adds outputs `sum/<layer>`, (N, T): the
    relevance that arrived there. `balances` adds `balance`, (nodes, 3, N, T): what every node received and handed on,
    and the magnitude of what it received. `masks` multiply what arrives at a tensor.
    """
    graph, notes = _raised(canonical.graph)
    surgeon = graph.surgeon.copy()
    ops = RecorderOps(surgeon)
    values = _Recorded(graph, ops, canonical.batch)
    logits, onehot, chosen = _targets(ops, values, canonical.logits, count, fixed, ranks)
    relevance = start.at(ops, logits, onehot, canonical.squash)
    shape = values.shape(canonical.logits)
    relevance = ops.reshape(relevance, shape)
    tensors = list(dict.fromkeys(layer.tensor for layer in layers.values()))
    begins = {before_rounding(graph, canonical.logits): relevance}
    flow = walk(graph, values, begins, tensors, rules, balances, images=logits.shape[0], masks=masks)

    outputs = [_output(ops, logits, LOGITS), _output(ops, chosen, CLASSES)]
    names: dict[str, str] = {}
    for name, layer in layers.items():
        if layer.tensor not in flow.relevance:
            raise ModelError(unreached(name, rules, graph))
        at_layer = flow.relevance[layer.tensor]
        activation = layer.activation(ops, values.array(layer.tensor))
        combine = method.formula(canonical.graph, layer, canonical.logits)
        heat = combine(ops, activation, layer.relevance(ops, at_layer))
        heat = _images_first(ops, heat)
        if upsample:
            heat = _upsampled(ops, heat, graph.shape(canonical.input))
        if normalise:
            heat = _normalised(ops, heat)
        outputs.append(_output(ops, heat, f"map_{safe_name(layer.node)}"))
        names[name] = outputs[-1].name
        if sums:
            total = per_image(ops, graph, layer.tensor, at_layer, logits.shape[0])
            outputs.append(_output(ops, _images_first(ops, total), f"sum/{name}"))
    if flow.balances:
        rows = [_images_first(ops, total) for b in flow.balances for total in (b.received, b.handed, b.magnitude)]
        batch, targets = rows[0].shape
        stacked = ops.concat([ops.shaped(row, (1, batch, targets)) for row in rows], 0)
        shaped = ops.record(
            "Reshape", [stacked, np.array([len(rows) // 3, 3, *_sizes((batch, targets))], np.int64)],
            (len(rows) // 3, 3, batch, targets),
        )  # fmt: skip
        outputs.append(_output(ops, shaped, BALANCE))
    surgeon.outputs = outputs
    with G_LOGGER.suppress():
        tidy(surgeon, frozenset())
        weights = detach(surgeon)
        proto = gs.export_onnx(surgeon, do_type_check=False)
        forget_unused_domains(proto)
    return Recording(proto, names, notes, [(b.node, b.op_type, b.rule) for b in flow.balances], weights)


def forget_unused_domains(proto: onnx.ModelProto) -> None:
    """Leave out the opsets that no node is of: runtimes refuse models for domains that they do not know."""

    def domains(graph: onnx.GraphProto) -> set[str]:
        inner = [g for node in graph.node for a in node.attribute for g in (a.g, *a.graphs)]
        return {node.domain for node in graph.node}.union(*map(domains, inner))

    used = domains(proto.graph) | {"", "ai.onnx"}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def _raised(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph at an opset that has all ops the walk needs."""
    if graph.opset() >= OLDEST_OPSET:
        return graph, []
    proto = gs.export_onnx(graph.surgeon, do_type_check=False)
    # ONNX Runtime's optimiser writes this op into files of any opset; ONNX has it from 17 on. Meanwhile it is foreign.
    early = {n.name for n in proto.graph.node if n.op_type == "LayerNormalization" and n.domain == ""}
    _to_domain(proto, early, "com.microsoft")
    try:
        raised = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
        _to_domain(raised, early, "")
    except Exception as error:  # the converter raises RuntimeError, ConvertError and others
        raise ModelError(
            f"the model has opset {graph.opset()}, compiling needs {OLDEST_OPSET}, and ONNX's converter fails: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; use --engine numpy"
        ) from error
    from onnxcam.canonise import canonise

    note = f"opset raised from {graph.opset()} to {OLDEST_OPSET}, which the explanation needs"
    kept = frozenset(name for node in graph.nodes for name in node.outputs if name)
    return Graph(canonise(raised, keep=kept & _tensor_names(raised), fold_batchnorm=False)), [note]


def _to_domain(proto: onnx.ModelProto, nodes: set[str], domain: str) -> None:
    for node in proto.graph.node:
        if node.name in nodes:
            node.domain = domain


def _tensor_names(proto: onnx.ModelProto) -> frozenset[str]:
    return frozenset(name for node in proto.graph.node for name in node.output)


def _targets(
    ops: RecorderOps, values: _Recorded, name: str, count: int, fixed: Sequence[int] | None, ranks: int
) -> tuple[Symbol, Symbol, Symbol]:
    """Logits (N, K), the classes as one-hot rows (T, N, max(K, 2)), and the classes (N, T)."""
    raw = values.array(name)
    k = count_classes(raw.shape, values.batch)
    batch = raw.shape[0] if len(raw.shape) > 1 or k == 1 else 1
    logits = ops.shaped(raw, (batch, k))
    ranks = min(ranks, max(k, 2))
    ranked = _ranked(ops, logits, k, ranks)
    if fixed is not None:
        wanted = Symbol(ops, ops.constant(np.array([fixed], np.int64)), (1, count))
    else:
        label = _unique(TARGETS, set(ops.graph.tensors()))
        variable = gs.Variable(label, dtype=np.int64, shape=[_batch_name(ops, batch), count])
        ops.graph.inputs.append(variable)
        wanted = Symbol(ops, variable, (batch, count))
    negative = ops.record("Less", [wanted, np.array(0, np.int64)], wanted.shape, dtype=bool)
    likely = ranked
    if ranks > 1:
        # -1, -2, ... are places 0, 1, ... among the most likely classes.
        place = ops.record("Sub", [np.array(-1, np.int64), wanted], wanted.shape, dtype=np.int64)
        place = ops.record(
            "Clip", [place, np.array(0, np.int64), np.array(ranks - 1, np.int64)], wanted.shape, dtype=np.int64
        )
        if fixed is not None:
            every = ops.record(
                "Shape",
                [
                    ops.record(
                        "Slice", [ranked, *(np.array([v], np.int64) for v in (0, 1, 1))], (batch, 1), dtype=np.int64
                    )
                ],
                (2,),
                dtype=np.int64,
            )
            place = ops.record("Expand", [place, every], (batch, count), dtype=np.int64)
        likely = ops.record("GatherElements", [ranked, place], (batch, count), dtype=np.int64, axis=1)
    chosen = ops.record("Where", [negative, likely, wanted], (batch, count), dtype=np.int64)
    classes = np.arange(max(k, 2), dtype=np.int64)
    if count == 1:
        hit = ops.record("Equal", [chosen, classes], (1, batch, len(classes)), bare=True, dtype=bool)
    else:
        turned = ops.record("Transpose", [chosen], (count, batch), dtype=np.int64, perm=[1, 0])
        column = ops.record("Unsqueeze", [turned, np.array([-1], np.int64)], (count, batch, 1), dtype=np.int64)
        hit = ops.record("Equal", [column, classes], (count, batch, len(classes)), dtype=bool)
    return logits, ops.mask(hit), chosen


def _ranked(ops: RecorderOps, logits: Symbol, k: int, ranks: int) -> Symbol:
    """The most likely classes, (N, ranks); a single logit speaks for class 1 where it is positive, else for class 0."""
    batch = logits.shape[0]
    if k == 1:
        first = ops.record("Cast", [logits > 0.0], (batch, 1), dtype=np.int64, to=7)
        if ranks == 1:
            return first
        second = ops.record("Sub", [np.array(1, np.int64), first], (batch, 1), dtype=np.int64)
        return ops.record("Concat", [first, second], (batch, 2), dtype=np.int64, axis=1)
    if ranks == 1:
        return ops.record("ArgMax", [logits], (batch, 1), dtype=np.int64, axis=1, keepdims=1)
    top = ops.record("TopK", [logits, np.array([ranks], np.int64)], (batch, ranks), dtype=np.int64, outputs=2, axis=1)
    top.tensor.inputs[0].outputs[0].dtype = np.float32
    return top


def _sizes(shape: Sequence[int | str]) -> list[int]:
    return [n if isinstance(n, int) else -1 for n in shape]


def _batch_name(ops: RecorderOps, batch: int | str) -> int | str:
    """The batch axis as the graph's own input names it."""
    if isinstance(batch, int):
        return batch
    open_ones = [t.shape[0] for t in ops.graph.inputs if t.shape and isinstance(t.shape[0], str)]
    return open_ones[0] if open_ones else batch


def _images_first(ops: RecorderOps, x: Symbol) -> Symbol:
    """(T, N, ...) as (N, T, ...)."""
    shape = (x.shape[1], x.shape[0], *x.shape[2:])
    if x.bare:
        return ops.record("Unsqueeze", [x, np.array([1], np.int64)], shape)
    return ops.record("Transpose", [x], shape, perm=[1, 0, *range(2, len(shape))])


def _upsampled(ops: RecorderOps, x: Symbol, image: Any) -> Symbol:
    """Bilinear, pixel centres aligned, to the size of the image (N, C, H, W) or (N, H, W, C)."""
    spatial = image[1:3] if image[-1] in (1, 3) and image[1] not in (1, 3) else image[2:]
    if len(x.shape) != 4:
        raise UsageError("only maps of pictures can be upsampled")
    # By sizes: a scale such as 225/7 is rounded, and the product with it rounded down.
    lead = ops.record("Shape", [x], (2,), dtype=np.int64, start=0, end=2)
    sizes = ops.record("Concat", [lead, np.array(spatial, np.int64)], (4,), dtype=np.int64, axis=0)
    none = gs.Variable.empty()
    return ops.record(
        "Resize", [x, none, none, sizes], (*x.shape[:2], *spatial), mode="linear",
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip


def _normalised(ops: RecorderOps, x: Symbol) -> Symbol:
    axes = tuple(range(2 - len(x.shape), 0))
    low = ops.min(x, axes)
    span = ops.max(x, axes) - low
    flat = span > 0.0
    return ops.where(flat, (x - low) / ops.where(flat, span, 1.0), 0.0)


def _output(ops: RecorderOps, x: Symbol, name: str) -> gs.Variable:
    """`x` as a graph output of that name, or of a like one where the user's file has another tensor of that name."""
    dtype = np.int64 if x.tensor.dtype is not None and np.dtype(x.tensor.dtype) == np.int64 else np.float32
    shape = [n if isinstance(n, int) else _batch_name(ops, n) for n in x.shape]
    if x.tensor.name == name:
        x.tensor.dtype, x.tensor.shape = dtype, shape
        return x.tensor
    out = gs.Variable(_unique(name, set(ops.graph.tensors())), dtype=dtype, shape=shape)
    ops.graph.nodes.append(gs.Node(op="Identity", name=out.name, inputs=[x.tensor], outputs=[out]))
    return out


def _unique(name: str, taken: set[str]) -> str:
    k, unique = 2, name
    while unique in taken:
        unique, k = f"{name}_{k}", k + 1
    return unique


def classes_in(canonical: Canonical) -> int:
    """How many logits there are, as far as the graph tells."""
    shape = canonical.graph.shape(canonical.logits)
    return count_classes(shape, canonical.batch) if shape else 1


def _version() -> str:
    import onnxcam

    return onnxcam.__version__
