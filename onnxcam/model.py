"""A model as the user holds it: the file, its input, its labels, its layers, and the canonised graphs made of it.

`Model` is the only owner of graphs. It canonises on demand, once for each input size, set of kept tensors and folding,
and keeps the sessions that were asked of it; nothing of this is global, and the file's proto is never changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcam.cache import Recent, disk_cache
from onnxcam.canonise import canonise, name_nodes
from onnxcam.canonise.quantised.values import dequantised_name
from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.heads import locate_logits
from onnxcam.input_spec import Given, InputSpec, assumed, main_input, read_inputs, static
from onnxcam.labels import Labels, labels_from_metadata, read_labels
from onnxcam.layers import KEYWORDS, Layer, Names, list_layers, module_paths, resolve
from onnxcam.maps import Maps
from onnxcam.own_scaling import pixels_wanted
from onnxcam.preprocess import Preprocess, choose
from onnxcam.reading import ReadModel, read
from onnxcam.signs import nonnegative_tensors
from onnxcam.weights import attach, pieces

if TYPE_CHECKING:
    from onnxcam.check import Check
    from onnxcam.explanation import Explanation

Size = tuple[int, ...]  # spatial sizes of the input
GRAPHS = 8  # canonised graphs that a model holds: one for each input size, say
SESSIONS = 8  # sessions likewise, each with weights of its own
HELD = 4 * 1000**3  # bytes of weights that `hold` lets sessions hold


@dataclass
class Canonical:
    """One canonised graph with what depends on it: where its logits are, its layers, arrays made from its constants."""

    graph: Graph
    logits: str
    squash: str | None
    key: Any  # what is given about the inputs, the tensors kept, and whether BatchNormalization was folded
    sessions: Recent  # the model's
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def input(self) -> str:
        """The name of the main input."""
        given: Given = self.key[0]
        return given.shapes[0][0]

    @property
    def batch(self) -> int | None:
        """How many images a batch has, where the file fixes that."""
        given: Given = self.key[0]
        shape = given.shapes[0][1]
        return shape[0] if shape and isinstance(shape[0], int) else None


class Model:
    """An ONNX model to explain; make one with `onnxcam.load`.

    Attributes:
        name: the file's name, or "model".
        path: of the file; None where it came as bytes.
        sha256: of the file.
        inputs: what the inputs want, in the file's order.
        alone: the inputs that take one picture in the file, without an axis of images; here they have one, of length 1.
        spec: that of the input that is explained first: the picture, where one is.
        preprocess, preprocess_source: how pictures become input, and where that is known from.
        labels: names of the classes.
        output: the output or inner tensor that is explained; `outputs` are all that the file has.
        disk: where recorded explanations are kept; None where they are not.
    """

    def __init__(
        self,
        source: str | Path | bytes | onnx.ModelProto,
        preprocess: str | Preprocess | None = None,
        labels: str | Path | Sequence[str] | None = None,
        output: str | None = None,
        cache: str | Path | None = None,
    ):
        self.disk = disk_cache(cache)
        self._read: ReadModel = read(source)
        self.path = self._read.path
        self.name = self.path.name if self.path else "model"
        self.sha256 = self._read.sha256
        self.metadata = self._read.metadata
        self.alone = self._read.alone
        self.inputs = read_inputs(self._read.proto.graph)
        self.inputs = tuple(
            replace(s, pixels=pixels_wanted(self._read.proto.graph, s.name)) if s.layout else s for s in self.inputs
        )
        self.spec = main_input(self.inputs)
        self.preprocess, self.preprocess_source = choose(preprocess, self.metadata, self.spec)
        self.labels = _labels(labels, self.metadata)
        self.outputs = tuple(o.name for o in self._read.proto.graph.output)
        self.output = _output_of(self._read.proto.graph, output)
        self._canonical = Recent(GRAPHS)
        self._sessions = Recent(SESSIONS)

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs and sessions, which are made again where it is unpickled."""
        made = ("_canonical", "_sessions", "names", "content")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._canonical = Recent(GRAPHS)
        self._sessions = Recent(SESSIONS)

    def hold(self, sessions: int) -> None:
        """Keep more sessions than usual, where many methods take turns: as many as that, if their weights fit."""
        weights = self._read.proto.ByteSize() + sum(array.nbytes for array in self._read.weights.values())
        self._sessions.limit = max(SESSIONS, min(sessions, HELD // max(weights, 1)))
        self._canonical.limit = max(GRAPHS, self._sessions.limit)

    def __repr__(self) -> str:
        return f"<onnxcam.Model {self.name}: input {self.spec.name} {list(self.spec.shape)}, output {self.output}>"

    @cached_property
    def content(self) -> str:
        """A hash of all that the model is; `sha256` covers one file, where weights may lie in others."""
        return self._read.content()

    # -- graphs --------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> Names:
        """What names mean in the file."""
        named = onnx.GraphProto(node=self._read.proto.graph.node)
        name_nodes(named)
        metadata = [(n.name, {p.key: p.value for p in n.metadata_props}) for n in named.node]
        return Names(self._raw, module_paths(metadata))

    def _raw(self) -> Graph:
        """The file as a graph, before canonising, with every node named."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._read.proto)
        name_nodes(proto.graph)
        with G_LOGGER.suppress():
            return Graph(attach(gs.import_onnx(proto), self._read.weights))

    @property
    def size(self) -> Size:
        """Spatial size of the input where no array says otherwise: the file's, else the preset's, else 224."""
        if self.spec.layout is None:
            return tuple(static(d) or 0 for d in self.spec.shape[1:])
        height, width = self.preprocess.size or (224, 224)
        return (self.spec.height or height, self.spec.width or width)

    def canonical(
        self, size: Size | Given | None = None, keep: frozenset[str] = frozenset(), fold_batchnorm: bool = True
    ) -> Canonical:
        """The canonised graph for inputs of spatial `size`, in which the tensors `keep` survive as they are."""
        given = self.given(size)
        keep -= {self.spec.name}  # which survives anyhow
        key = (given, keep, fold_batchnorm)

        def make() -> Canonical:
            surgeon = canonise(
                self._read.proto,
                weights=self._read.weights,
                given=given,
                keep=keep | {self.output},
                fold_batchnorm=fold_batchnorm,
            )
            graph = Graph(surgeon)
            logits, squash = locate_logits(graph, self.output)
            return Canonical(graph, logits, squash, key, self._sessions)

        return self._canonical.get(key, make)

    def given(self, size: Size | Given | None = None) -> Given:
        """What is known about the inputs where the main one has this spatial size; what is given stays as it is."""
        return size if isinstance(size, Given) else assumed(self.inputs, self.spec, self._shape(size))

    def _shape(self, size: Size | None) -> tuple[int | str, ...]:
        """The input's shape with its spatial axes fixed and its batch as the file has it."""
        spec = self.spec
        batch: int | str = spec.batch if spec.batch is not None else "N"
        if spec.layout is None:
            sizes = size if size is not None else self.size
            return (batch, *(n or f"axis{i}" for i, n in enumerate(sizes))) if spec.shape else ()
        height, width = size if size is not None else self.size
        channels = spec.channels or 3
        return (batch, channels, height, width) if spec.layout == "NCHW" else (batch, height, width, channels)

    # -- layers --------------------------------------------------------------------------------------------------

    def layers(self, size: Size | Given | None = None) -> list[Layer]:
        """The layers that can be explained at this input size, in topological order; the suggested ones are marked."""
        key = ("layers", size)
        found = self.canonical(size)
        if key not in found.cache:
            from onnxcam.check import reached
            from onnxcam.composites import suited

            maps = self._maps(found)
            rules = suited("relevance_cam", found.graph, found.logits)
            found.cache[key] = list_layers(
                found.graph,
                found.logits,
                self.names.paths,
                maps=maps,
                reached=reached(found.graph, found.logits, rules),
            )
        rows: list[Layer] = found.cache[key]
        return rows

    def _maps(self, found: Canonical) -> Maps:
        if "maps" not in found.cache:
            spatial = {"NCHW": (2, 3), "NHWC": (1, 2)}
            known: dict[str, tuple[int, ...]] = {}
            for spec in self.inputs:
                if spec.layout:
                    known[spec.name] = spatial[spec.layout]
                elif len(spec.shape) < 3 and not _are_tokens(found.graph, spec.name):
                    known[spec.name] = ()  # features lie nowhere
            found.cache["maps"] = Maps(found.graph, known)
        maps: Maps = found.cache["maps"]
        return maps

    def resolve(
        self, typed: Sequence[str | int | Layer], size: Size | Given | None = None, vectors: bool = False
    ) -> dict[str, Layer]:
        """Layers by the name they are reported under: as typed where that means one, else the node's name.

        With `vectors`, tensors (N, features) are layers too, although they have no map, and where nothing has one the
        keywords stand for the inputs.

        Raises:
            UsageError: a name means nothing, or a tensor that is on no way to the logits or has no map.
        """
        rows = self.layers(size)
        by_tensor = {row.tensor: row for row in rows}
        out: dict[str, Layer] = {}
        for text in typed:
            if isinstance(text, Layer):
                name = text.tensor if out.get(text.node, text).tensor != text.tensor else text.node
                out[name] = by_tensor.get(text.tensor) or self._unlisted(text.tensor, size, vectors)
                continue
            if self._means_inputs(text, rows, vectors):
                seen = self._seen_inputs(size)
                named = {str(text): seen[0]} if len(seen) == 1 else {name: name for name in seen}
                out.update((label, self._unlisted(name, size, vectors)) for label, name in named.items())
                continue
            if not rows and text in KEYWORDS:
                raise UsageError(no_maps(self.spec))
            meant = resolve(text, self.names, rows)
            if len(meant) == 1:
                one = meant[0] if isinstance(meant[0], Layer) else self._real(meant[0], size)
                layer = one if isinstance(one, Layer) else by_tensor.get(one) or self._unlisted(one, size, vectors)
                out[str(text)] = layer
            else:
                out.update((row.node, row) for row in meant if isinstance(row, Layer))
        return out

    def _real(self, tensor: str, size: Size | Given | None) -> str:
        """The tensor that holds the real values of `tensor`: itself, but for the integers of a quantised network."""
        raw = self.names.raw
        if tensor in raw.inputs:
            return tensor
        for reader in raw.consumers(tensor):
            if reader.op_type == "DequantizeLinear" and reader.inputs[0] == tensor:
                return reader.outputs[0]
        real = dequantised_name(tensor)
        return real if real in self.canonical(size).graph else tensor

    def _means_inputs(self, text: str | int | Layer, rows: Sequence[Layer], vectors: bool) -> bool:
        if text == "input":
            return "input" not in self.names.tensors and "input" not in self.names.nodes
        return vectors and not rows and text in KEYWORDS

    def _seen_inputs(self, size: Size | Given | None) -> list[str]:
        """The inputs that what the model sees comes in through, the main one first."""
        found = self.canonical(size)
        names = [found.input, *(name for name in found.graph.inputs if name != found.input)]
        seen = [n for n in names if n in found.graph.data and found.graph.between([n], found.logits)]
        return seen or [found.input]

    def _unlisted(self, tensor: str, size: Size | Given | None, vectors: bool = False) -> Layer:
        """A layer for a tensor that the listing leaves out: an input, a bottleneck of layout ops, a folded tensor."""
        found = self.canonical(size, frozenset({tensor}))
        key = ("unlisted", tensor, vectors)
        if key not in found.cache:
            found.cache[key] = self._judged(found, tensor, vectors)
        layer: Layer = found.cache[key]
        return layer

    def _judged(self, found: Canonical, tensor: str, vectors: bool) -> Layer:
        graph = found.graph
        if tensor not in graph:
            raise UsageError(f"tensor {tensor!r} is a constant of the model: there is nothing to explain at it")
        if tensor == found.logits:
            raise UsageError(f"tensor {tensor!r} is the logits, where explanations begin; name a layer before it")
        if not graph.between([tensor], found.logits):
            raise UsageError(
                f"tensor {tensor!r} does not lead to the logits ({found.logits!r}): nothing flows back to it"
            )
        shape = graph.shape(tensor)
        if shape is None:
            raise UsageError(f"the shape of tensor {tensor!r} is unknown, so there is no map of it")
        maps = self._maps(found)
        form = maps.form(tensor)
        if form is None and not (vectors and len(shape) == 2):
            why = maps.why_none(tensor)
            if len(shape) < 3:
                why = "has no spatial axes, so there is no map of it: --method lrp gives the relevance of each feature"
            raise UsageError(f"tensor {tensor!r} of shape ({', '.join(map(str, shape))}) {why}; see `onnxcam layers`")
        node = graph.producer(tensor)
        sign = "nonnegative" if tensor in nonnegative_tensors(graph) else "signed"
        reaches = form is None or tensor not in maps.dead(found.logits)
        name, op = (node.name, node.op_type) if node else (tensor, "Input")
        return Layer(None, name, op, tensor, shape, 0, sign, form=form, reaches=reaches)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Model:
        """The same model with other values for some of its initialisers, of the same shapes and types.

        Raises:
            UsageError: the model has no initialiser of that name, or another shape or type of it.
        """
        held = dict(self._read.weights)
        proto = onnx.ModelProto()
        proto.CopyFrom(self._read.proto)
        inner = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, values in weights.items():
            known = held[name] if name in held else onnx.numpy_helper.to_array(inner[name]) if name in inner else None
            if known is None or known.shape != values.shape or known.dtype != values.dtype:
                had = "none of that name" if known is None else f"one of shape {known.shape}, {known.dtype}"
                raise UsageError(f"weight {name!r} of shape {values.shape}, {values.dtype}: the model has {had}")
            if name in held:
                held[name] = values
            else:
                inner[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
        made = Model(b"".join(pieces(proto.SerializeToString(), held)), output=self.output)
        made.preprocess, made.preprocess_source, made.labels = self.preprocess, self.preprocess_source, self.labels
        made.alone = self.alone
        return made

    # -- what a model is for -------------------------------------------------------------------------------------

    def explain(
        self,
        images: Any = None,
        layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
        targets: Sequence[str | int] | str | int | None = None,
        **options: Any,
    ) -> Explanation:
        """Explain pictures or arrays; see `onnxcam.explain.explain` for the options."""
        from onnxcam.explain import explain

        return explain(self, images, layers, targets, **options)

    def check(self, composite: str | None = None, attention: str | None = None) -> Check:
        """Which operator and rule every node from the logits to the input gets, or why it gets none."""
        from onnxcam.check import check

        return check(self, composite, attention)


def load(
    source: str | Path | bytes | onnx.ModelProto,
    preprocess: str | Preprocess | None = None,
    labels: str | Path | Sequence[str] | None = None,
    output: str | None = None,
    cache: str | Path | None = None,
) -> Model:
    """Read a model.

    Args:
        source: a path, the bytes of a file, or a `ModelProto` (which is not changed).
        preprocess: a preset's name or a `Preprocess`; by default what the file's metadata says, else a guess.
        labels: a file of class names or a list of them; by default what the file's metadata says.
        output: the output to explain, or an inner tensor that holds logits; by default the first output.
        cache: a folder to keep recorded explanations in; by default what ONNXCAM_CACHE says, else none.

    Raises:
        UsageError: no such file, output, preset or label file.
        ModelError: the file is no model that can be explained.
    """
    return Model(source, preprocess, labels, output, cache)


def _output_of(graph: onnx.GraphProto, wanted: str | None) -> str:
    names = [o.name for o in graph.output]
    if wanted is None:
        return names[0]
    inner = [name for node in graph.node for name in node.output if name]
    if wanted not in names and wanted not in inner:
        near = difflib.get_close_matches(wanted, inner, n=1)
        hint = f", and an inner tensor {near[0]}" if near else ""
        raise UsageError(f"no output is called {wanted!r}: there are {', '.join(names)}{hint}")
    return wanted


def _are_tokens(graph: Graph, name: str) -> bool:
    """True for an input of numbers that a table of embeddings is read by, whose places are positions."""
    readers = graph.consumers(name)
    readers += [after for n in readers if n.op_type == "Cast" for after in graph.consumers(n.outputs[0])]
    return any(n.op_type == "Gather" and n.has(1) and n.inputs[0] != name and n.is_constant(0) for n in readers)


def no_maps(spec: InputSpec) -> str:
    """What to say where no tensor has a map, and a method needs one."""
    return (
        f"no layer of this model has a map: no tensor on the way from input {spec.name!r} {spec.text} to the logits "
        "has a spatial extent that is known; --method lrp gives the relevance of each feature of the input"
    )


def _labels(given: str | Path | Sequence[str] | None, metadata: dict[str, str]) -> Labels:
    if given is None:
        return labels_from_metadata(metadata) or Labels()
    return read_labels(given) if isinstance(given, str | Path) else Labels.of(given)


def filled(array: np.ndarray, batch: int | None) -> np.ndarray:
    """The array (n, ...) as a batch of the size the file fixes, filled up by repeating the last entry."""
    short = (batch or 0) - len(array)
    return np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short > 0 else array
