"""The walk: relevance, or a gradient, from the logits back to the layers, over the node list in reverse.

It knows no op. At each node the operator says what the mathematics is, the composite says which rule applies, and the
rule says what each input gets. A tensor read by several nodes gets the sum of what they hand down; a tensor that gets
nothing has no entry, which is not the same as zeros. One walk serves all layers asked for and all targets at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcam.composites import Composite, describe
from onnxcam.errors import EngineError, ModelError, OpenBatchError
from onnxcam.graph import Graph, Node
from onnxcam.operators import lookup
from onnxcam.operators.kinds import Array, At, Values


@dataclass(frozen=True)
class Balance:
    """Sums of relevance over one node, for each target and image: arrays of shape (T, N), of the engine in a walk."""

    node: str
    op_type: str
    rule: str
    received: Array
    handed: Array
    magnitude: Array

    @property
    def residual(self) -> float:
        """Largest |received - handed| relative to the sum of |received| entries, over targets and images."""
        scale = np.maximum(self.magnitude, np.finfo(np.float32).tiny)
        return float(np.max(np.abs(self.received - self.handed) / scale)) if self.received.size else 0.0


@dataclass
class Flow:
    """What a walk found: relevance of every layer asked for, (T, *tensor.shape), and the balance of every node."""

    relevance: dict[str, Array]
    balances: list[Balance] = field(default_factory=list)


class TapValues:
    """Values of one forward pass as arrays of the engine, converted once; what is derived from constants is shared."""

    def __init__(self, graph: Graph, taps: Mapping[str, np.ndarray], ops: Any, cache: dict[tuple[str, str], Array]):
        self.graph, self.taps, self.ops = graph, taps, ops
        self._shared = cache
        self._own: dict[tuple[str, str], Array] = {}

    def host(self, tensor: str) -> np.ndarray:
        constant = self.graph.constants.get(tensor)
        return self.taps[tensor] if constant is None else constant

    def index(self, tensor: str) -> np.ndarray:
        return self.host(tensor).astype(np.int64)

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.host(tensor).shape)

    def precise(self, tensor: str) -> bool:
        dtype = self.host(tensor).dtype
        return dtype.kind == "f" and dtype.itemsize >= self.ops.itemsize

    def array(self, tensor: str) -> Array:
        return self.derived(tensor, "", lambda x: x)

    def derived(self, tensor: str, what: str, make: Callable[[Array], Array]) -> Array:
        cache = self._shared if tensor in self.graph.constants else self._own
        if (tensor, what) not in cache:
            cache[tensor, what] = make(self.array(tensor)) if what else self.ops.asarray(self.host(tensor))
        return cache[tensor, what]


LINEAR_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def first_linear(graph: Graph) -> set[str]:
    """Names of the linear nodes that no other linear node lies before."""
    return _outermost((node, node.inputs, node.outputs) for node in graph.nodes)


def last_linear(graph: Graph, logits: str) -> set[str]:
    """Names of the linear nodes that no other linear node lies behind on the way to the logits."""
    nodes = reversed(graph.between(graph.inputs, logits))
    return _outermost((node, node.outputs, node.inputs) for node in nodes)


def _outermost(nodes: Iterable[tuple[Node, Sequence[str], Sequence[str]]]) -> set[str]:
    """Names of the linear nodes that are met first; with each node the tensors on its near side and on its far side."""
    passed: set[str] = set()  # tensors on the far side of a linear node
    found = set()
    for node, near, far in nodes:
        beyond = any(name in passed for name in near)
        linear = node.op_type in LINEAR_OPS and any(not node.is_constant(i) for i in range(len(node.inputs)))
        if linear and not beyond:
            found.add(node.name)
        if beyond or linear:
            passed.update(far)
    return found


def needed_taps(graph: Graph, layers: Collection[str], logits: str) -> list[str]:
    """The tensors a walk from `logits` down to `layers` reads, in topological order."""
    wanted = {logits, *layers}
    for node in graph.between(layers, logits):
        wanted.update(name for name in (*node.inputs, *node.outputs) if name and name not in graph.constants)
    order = [*graph.inputs, *(name for node in graph.nodes for name in node.outputs)]
    return [name for name in order if name in wanted]


def propagate(
    graph: Graph,
    taps: Mapping[str, np.ndarray],
    starts: Mapping[str, np.ndarray],
    layers: Collection[str],
    composite: Composite,
    ops: Any,
    cache: dict[tuple[str, str], Array] | None = None,
    images: int | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> Flow:
    """Carry `starts` back to `layers`.

    Args:
        graph: the canonised graph.
        taps: values of the tensors that `needed_taps` names.
        starts: relevance at one or more tensors, each (T, *tensor.shape); usually at the logits.
        layers: names of the tensors whose relevance is wanted.
        composite: which rule applies where.
        ops: the primitives of an engine.
        cache: arrays made from constants of this graph, kept from walk to walk.
        images: how many a batch has, where the starts do not say so by their first axis.
        masks: tensor to what its relevance is multiplied with when it has arrived.

    Returns:
        A `Flow`; a layer that no relevance reaches has no entry.

    Raises:
        ModelError: relevance reaches a node without an operator; the message names it.
    """
    values = TapValues(graph, taps, ops, {} if cache is None else cache)
    # A rule may divide by zero where it drops the quotient a line later.
    with np.errstate(divide="ignore", invalid="ignore"):
        begun = {name: ops.asarray(r) for name, r in starts.items()}
        flow = walk(graph, values, begun, layers, composite, images=images, masks=masks)

    def host(array: Array) -> np.ndarray:
        return np.asarray(ops.to_host(array), np.float64)

    return Flow(
        flow.relevance,
        [
            replace(b, received=host(b.received), handed=host(b.handed), magnitude=host(b.magnitude))
            for b in flow.balances
        ],
    )


def walk(
    graph: Graph,
    values: Values,
    starts: Mapping[str, Array],
    layers: Collection[str],
    composite: Composite,
    balance: bool = True,
    images: Any = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> Flow:
    """The walk itself, on arrays of any engine: `propagate` with the values of a forward pass at hand.

    `balance=False` leaves out the sums over every node.

    Raises:
        ModelError: relevance reaches a node without an operator, or one beyond the engine; the message names it.
    """
    ops = values.ops
    held: dict[str, Array] = dict(starts)
    found: dict[str, Array] = {}
    balances = []
    firsts = first_linear(graph) if composite.first is not None else set()
    lasts = {name for end in starts for name in last_linear(graph, end)} if composite.last is not None else set()

    if images is None:
        images = next((r.shape[1] if r.ndim > 2 else 1 for r in starts.values()), 1)
    path: dict[str, Node] = {n.name: n for target in starts for n in graph.between(layers, target)}
    for node in sorted(path.values(), key=lambda n: n.index, reverse=True):
        arrived = [_masked(ops, held.pop(name, None), (masks or {}).get(name)) for name in node.outputs]
        here = zip(node.outputs, arrived, strict=True)
        found.update((name, r) for name, r in here if name in layers and r is not None)
        if all(r is None for r in arrived):
            continue
        operator = lookup(node)
        rule = composite.rule_for(operator, node.op_type, node.name in firsts, node.name in lasts)
        try:
            shares = rule(At(node, values), operator, arrived)
        except EngineError as error:
            kind = OpenBatchError if isinstance(error, OpenBatchError) else ModelError
            raise kind(f"node {node.name!r} ({node.op_type}): {error}") from error
        for i, share in shares:
            name = node.inputs[i]
            held[name] = held[name] + share if name in held else share
        if balance and composite.conserves:
            row = _balance(ops, node, describe(rule), arrived, shares, images)
            balances += [row] if row is not None else []
    left = ((name, _masked(ops, r, (masks or {}).get(name))) for name, r in held.items() if name in layers)
    found.update((name, r) for name, r in left if r is not None)
    return Flow(found, balances)


def _masked(ops: Any, r: Array | None, mask: np.ndarray | None) -> Array | None:
    return r if r is None or mask is None else r * ops.asarray(mask)


def _balance(
    ops: Any, node: Node, rule: str, arrived: list[Array | None], shares: Sequence[tuple[int, Array]], images: Any
) -> Balance | None:
    """The sums over one node; None where a tensor mixes the images of a batch, so that no sum is one image's."""

    def total(parts: list[tuple[str, Array]]) -> Array:
        sums = [per_image(ops, node.graph, name, a, images) for name, a in parts]
        return sum(sums[1:], sums[0])

    present = [(name, r) for name, r in zip(node.outputs, arrived, strict=True) if r is not None]
    if any(image_axis(node.graph, n, r.shape[1:], images) is None for n, r in present) or any(
        image_axis(node.graph, node.inputs[i], share.shape[1:], images) is None for i, share in shares
    ):
        return None
    received = total(present)
    handed = total([(node.inputs[i], s) for i, s in shares]) if shares else ops.zeros_like(received)
    magnitude = total([(name, ops.abs(r)) for name, r in present])
    return Balance(node.name, node.op_type, rule, received, handed, magnitude)


def image_axis(graph: Graph, tensor: str, sizes: Sequence[Any], images: Any) -> tuple[int, bool] | None:
    """The axis of a tensor that the images of a batch stand in, and whether nothing else does, as windows might.

    It is the one whose length the graph leaves open, mostly, else the first that fits. None where none does.
    """
    known = graph.shape(tensor) or ()
    open_axes = [i for i, n in enumerate(known) if not isinstance(n, int)]
    if len(open_axes) == 1:
        axis = open_axes[0]
        batches = {(graph.shape(name) or (None,))[0] for name in graph.inputs}
        return axis, sizes[axis] == images and (not isinstance(images, str) or known[axis] in batches)
    fits = [i for i, n in enumerate(sizes) if n == images] or [i for i, n in enumerate(sizes) if n % images == 0]
    return (fits[0], sizes[fits[0]] == images) if fits else None


def per_image(ops: Any, graph: Graph, tensor: str, r: Array, images: Any) -> Array:
    """The relevance (T, *shape) of a tensor summed for each target and image, (T, N).

    Raises:
        EngineError: no axis of the tensor holds the images.
    """
    found = image_axis(graph, tensor, r.shape[1:], images)
    if found is None:
        raise EngineError(f"tensor {tensor!r} has no axis for the {images} images of a batch: explain them one by one")
    axis, alone = found
    if not alone:
        others = [i for i in range(r.ndim - 1) if i != axis]
        r, axis = ops.by_image(ops.permute(r, (axis, *others)) if axis else r, images), 0
    return ops.sum(r, tuple(i - r.ndim for i in range(1, r.ndim) if i != axis + 1))
