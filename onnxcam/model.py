"""A model as the user holds it: the file, its input, its labels, its layers, and the canonised graphs made of it.

`Model` is the only owner of graphs. It canonises on demand, once for each input size, set of kept tensors and folding,
and keeps the sessions that were asked of it; nothing of this is global, and the file's proto is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcam.cache import Recent, disk_cache
from onnxcam.canonise import canonise, name_nodes
from onnxcam.errors import ModelError, UsageError
from onnxcam.graph import Graph, Shape
from onnxcam.input_spec import InputSpec, static
from onnxcam.labels import Labels, labels_from_metadata, read_labels
from onnxcam.layers import Layer, Names, list_layers, module_paths, resolve
from onnxcam.maps import spatial_axes
from onnxcam.preprocess import Preprocess, choose
from onnxcam.reading import ReadModel, read
from onnxcam.signs import nonnegative_tensors
from onnxcam.starts import locate_logits
from onnxcam.weights import attach

if TYPE_CHECKING:
    from onnxcam.check import Check
    from onnxcam.explanation import Explanation

Size = tuple[int, ...]  # spatial sizes of the input
GRAPHS = 8  # canonised graphs that a model holds: one for each input size, say
SESSIONS = 8  # sessions likewise, each with weights of its own


@dataclass
class Canonical:
    """One canonised graph with what depends on it: where its logits are, its layers, arrays made from its constants."""

    graph: Graph
    logits: str
    squash: str | None
    key: Any  # the input's shape, the tensors kept, and whether BatchNormalization was folded
    sessions: Recent  # the model's
    cache: dict[Any, Any] = field(default_factory=dict)


class Model:
    """An ONNX model to explain; make one with `onnxcam.load`.

    Attributes:
        name: the file's name, or "model".
        sha256: of the file.
        spec: what the input wants.
        preprocess, preprocess_source: how pictures become input, and where that is known from.
        labels: names of the classes.
        output: the graph output that is explained.
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
        self.name = self._read.path.name if self._read.path else "model"
        self.sha256 = self._read.sha256
        self.metadata = self._read.metadata
        self.spec = _input_of(self._read.proto)
        self.preprocess, self.preprocess_source = choose(preprocess, self.metadata, self.spec)
        self.labels = _labels(labels, self.metadata)
        self.output = _output_of(self._read.proto, output)
        self._canonical = Recent(GRAPHS)
        self._sessions = Recent(SESSIONS)

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
            return tuple(static(d) or 0 for d in self.spec.shape[2:])
        height, width = self.preprocess.size or (224, 224)
        return (self.spec.height or height, self.spec.width or width)

    def canonical(
        self, size: Size | None = None, keep: frozenset[str] = frozenset(), fold_batchnorm: bool = True
    ) -> Canonical:
        """The canonised graph for inputs of spatial `size`, in which the tensors `keep` survive as they are."""
        shape = self._shape(size)
        keep -= {self.spec.name}  # which survives anyhow
        key = (shape, keep, fold_batchnorm)

        def make() -> Canonical:
            surgeon = canonise(
                self._read.proto,
                weights=self._read.weights,
                shapes={self.spec.name: shape},
                keep=keep,
                fold_batchnorm=fold_batchnorm,
            )
            graph = Graph(surgeon)
            logits, squash = locate_logits(graph, self.output)
            return Canonical(graph, logits, squash, key, self._sessions)

        return self._canonical.get(key, make)

    def _shape(self, size: Size | None) -> tuple[int | str, ...]:
        """The input's shape with its spatial axes fixed and its batch as the file has it."""
        spec = self.spec
        batch: int | str = spec.batch if spec.batch is not None else "N"
        if spec.layout is None:
            sizes = size if size is not None else tuple(static(d) or f"axis{i}" for i, d in enumerate(spec.shape[1:]))
            return (batch, *sizes) if len(sizes) == len(spec.shape) - 1 else tuple(spec.shape)  # type: ignore[arg-type]
        height, width = size if size is not None else self.size
        channels = spec.channels or 3
        return (batch, channels, height, width) if spec.layout == "NCHW" else (batch, height, width, channels)

    # -- layers --------------------------------------------------------------------------------------------------

    def layers(self, size: Size | None = None) -> list[Layer]:
        """The layers that can be explained at this input size, in topological order; the suggested ones are marked."""
        key = ("layers", size)
        found = self.canonical(size)
        if key not in found.cache:
            found.cache[key] = list_layers(found.graph, found.logits, self.names.paths, self._spatial)
        rows: list[Layer] = found.cache[key]
        return rows

    @property
    def _spatial(self) -> dict[str, tuple[int, ...]]:
        return {self.spec.name: (1, 2)} if self.spec.layout == "NHWC" else {}

    def resolve(self, typed: Sequence[str | int | Layer], size: Size | None = None) -> dict[str, Layer]:
        """Layers by the name they are reported under: as typed where that means one, else the node's name.

        Raises:
            UsageError: a name means nothing, or a tensor that is on no way to the logits or has no map.
        """
        rows = self.layers(size)
        by_tensor = {row.tensor: row for row in rows}
        out: dict[str, Layer] = {}
        for text in typed:
            if isinstance(text, Layer):
                out[text.node] = by_tensor.get(text.tensor) or self._unlisted(text.tensor, size)
                continue
            meant = resolve(text, self.names, rows)
            if len(meant) == 1:
                one = meant[0]
                layer = one if isinstance(one, Layer) else by_tensor.get(one) or self._unlisted(one, size)
                out[str(text)] = layer
            else:
                out.update((row.node, row) for row in meant if isinstance(row, Layer))
        return out

    def _unlisted(self, tensor: str, size: Size | None) -> Layer:
        """A layer for a tensor that the listing leaves out: an input, a bottleneck of layout ops, a folded tensor."""
        found = self.canonical(size, frozenset({tensor}))
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
        if why := self._why_no_map(graph, tensor, shape):
            raise UsageError(f"tensor {tensor!r} of shape ({', '.join(map(str, shape))}) {why}; see `onnxcam layers`")
        node = graph.producer(tensor)
        sign = "nonnegative" if tensor in nonnegative_tensors(graph) else "signed"
        return Layer(None, node.name if node else tensor, node.op_type if node else "Input", tensor, shape, 0, sign)

    def _why_no_map(self, graph: Graph, tensor: str, shape: Shape) -> str | None:
        axes = spatial_axes(graph, self._spatial).get(tensor, ())
        if len(shape) < 3:
            return "has no spatial axes, so there is no map of it"
        if not axes:
            return "has lost its spatial axes (tokens, or an attention matrix), so there is no map of it"
        if axes != tuple(range(2, len(shape))):
            return "has its channels last: name one before or behind the Transpose"
        return "has a single position, so there is no map of it" if set(shape[2:]) == {1} else None

    # -- what a model is for -------------------------------------------------------------------------------------

    def explain(
        self,
        images: Any,
        layers: Sequence[str | int | Layer] | str | int | Layer = ("auto",),
        targets: Sequence[str | int] | str | int | None = None,
        **options: Any,
    ) -> Explanation:
        """Explain pictures; see `onnxcam.explain.explain` for the options."""
        from onnxcam.explain import explain

        return explain(self, images, layers, targets, **options)

    def check(self, composite: str = "relevance_cam") -> Check:
        """Which operator and rule every node from the logits to the input gets, or why it gets none."""
        from onnxcam.check import check

        return check(self, composite)


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
        output: the graph output to explain; by default the first.
        cache: a folder to keep recorded explanations in; by default what ONNXCAM_CACHE says, else none.

    Raises:
        UsageError: no such file, output, preset or label file.
        ModelError: the file is no model that can be explained.
    """
    return Model(source, preprocess, labels, output, cache)


def _input_of(proto: onnx.ModelProto) -> InputSpec:
    weights = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
    inputs = [i for i in proto.graph.input if i.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs) or "none"
        raise ModelError(f"the model has {len(inputs)} inputs ({names}): onnxcam explains models with one")
    kind = inputs[0].type.tensor_type
    if not inputs[0].type.HasField("tensor_type"):
        raise ModelError(f"input {inputs[0].name!r} is no tensor")
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    return InputSpec.of(inputs[0].name, dims, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _output_of(proto: onnx.ModelProto, wanted: str | None) -> str:
    names = [o.name for o in proto.graph.output]
    if wanted is None:
        if not names:
            raise ModelError("the model has no output")
        return names[0]
    if wanted not in names:
        raise UsageError(f"no output is called {wanted!r}: there are {', '.join(names)}")
    return wanted


def _labels(given: str | Path | Sequence[str] | None, metadata: dict[str, str]) -> Labels:
    if given is None:
        return labels_from_metadata(metadata) or Labels()
    return read_labels(given) if isinstance(given, str | Path) else Labels.of(given)


def filled(array: np.ndarray, batch: int | None) -> np.ndarray:
    """The array (n, ...) as a batch of the size the file fixes, filled up by repeating the last entry."""
    short = (batch or 0) - len(array)
    return np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short > 0 else array
