"""Unroll LSTM, GRU and RNN over their time steps, into dense layers, gates and sums, where the length is known.

Rules, gradients and engines then need to know nothing about them. At each step the input and the state before it enter
one dense layer side by side, so that they share relevance as the inputs of a layer do (Arras et al. 2017): what a gate
multiplies with gets the relevance, the gate none. Both directions of a bidirectional layer run as one, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import Names, constant, detach, has, put_for

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
# Functions without parameters, under the names that nodes have.
FUNCTIONS = {name.lower(): name for name in ("Relu", "Tanh", "Sigmoid", "Softsign", "Softplus")}


def unroll(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace every recurrent node of a known length by its steps; True where there was one."""
    names = Names(graph, protected)
    changed = False
    for node in [n for n in graph.nodes if n.op in GATES and n.outputs and graph.opset >= 13]:
        if why_rolled(node) is None:
            nodes = _Unroller(node, names).write()
            detach(node)
            put_for(graph, node, nodes)
            changed = True
    return changed


def why_rolled(node: gs.Node) -> str | None:
    """Why a recurrent node cannot be unrolled; None where it can, and for any other node."""
    if node.op not in GATES:
        return None
    shape, attrs = node.inputs[0].shape, node.attrs
    time = int(attrs.get("layout", 0))
    if shape is None or len(shape) != 3 or not isinstance(shape[time], int):
        return "its number of time steps is not known"
    if any(has(node, i) and constant(node, i) is None for i in (1, 2, 3)):
        return "its weights are computed in the graph"
    if has(node, 4) and not _all(constant(node, 4), shape[time]):
        return "its sequences differ in length"
    if has(node, 7) and not _all(constant(node, 7), 0):
        return "it has peepholes"
    if attrs.get("clip") is not None or attrs.get("input_forget", 0):
        return "it clips, or couples its gates"
    if any(name not in FUNCTIONS for name in _functions(node)):
        return "it has activations with parameters"
    if len(attrs.get("activations") or ()) > len(_functions(node)) and _functions(node) != _functions(node, 1):
        return "its directions have activations of their own"
    return None


def _functions(node: gs.Node, direction: int = 0) -> list[str]:
    count = len(DEFAULTS[node.op])
    given = node.attrs.get("activations") or DEFAULTS[node.op] * 2
    return [name.lower() for name in given[direction * count : (direction + 1) * count]]


def _all(values: np.ndarray | None, value: float) -> bool:
    return values is not None and bool((values == value).all())


class _Unroller:
    """Writes the nodes of one recurrent node. Tensors of a step are (batch, features), both directions side by side."""

    def __init__(self, node: gs.Node, names: Names):
        self.node, self.names = node, names
        self.nodes: list[gs.Node] = []
        self._joined: dict[tuple[int, ...], gs.Constant] = {}
        w, r = constant(node, 1), constant(node, 2)
        assert w is not None and r is not None
        self.w, self.r = w, r
        self.directions, rows = w.shape[:2]
        self.hidden = rows // GATES[node.op]
        self.width = self.directions * self.hidden
        self.dtype = w.dtype
        bias = constant(node, 3)
        self.bias = np.zeros((self.directions, 2 * rows), w.dtype) if bias is None else bias
        self.layout = int(node.attrs.get("layout", 0))
        self.steps = int(node.inputs[0].shape[self.layout])
        self.functions = [FUNCTIONS[name] for name in _functions(node)]
        self.reverse = node.attrs.get("direction", "forward") == "reverse"
        self.turned = np.arange(self.steps)[::-1].copy()

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _add(self, op: str, inputs: Sequence[Any], outputs: int = 1, **attrs: Any) -> Any:
        name = self.names.fresh(f"{self.node.name}_{op}")
        made = [gs.Variable(name if i == 0 else self.names.fresh(name), self.dtype) for i in range(outputs)]
        operands = [t if isinstance(t, gs.Tensor) else self._constant(t) for t in inputs]
        self.nodes.append(gs.Node(op, name, attrs, operands, made))
        return made[0] if outputs == 1 else made

    def _split(self, x: gs.Tensor, count: int, size: int, axis: int) -> list[gs.Tensor]:
        made = self._add("Split", [x, np.full(count, size, np.int64)], count, axis=axis)
        return made if isinstance(made, list) else [made]

    def _constant(self, value: Any) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{self.node.name}_constant"), np.asarray(value))

    def _dense(self, terms: Sequence[tuple[gs.Tensor | None, np.ndarray]], bias: gs.Tensor) -> Any:
        """A dense layer of all terms (tensor, weight) side by side; a tensor that is None is zero."""
        present = [(x, w) for x, w in terms if x is not None]
        x = present[0][0] if len(present) == 1 else self._add("Concat", [x for x, _ in present], axis=1)
        key = tuple(id(w) for _, w in present)
        if key not in self._joined:
            self._joined[key] = self._constant(np.concatenate([w for _, w in present], axis=0))
        return self._add("Gemm", [x, self._joined[key], bias])

    # -- the whole -----------------------------------------------------------------------------------------------

    def write(self) -> list[gs.Node]:
        xs = self._inputs()
        h, c = self._state(5), self._state(6)
        step: Callable[..., Any] = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.node.op]()
        hs = []
        for x in xs:
            h, c = step(x, h, c)
            hs.append(h)
        self._outputs(hs, h, c)
        return self.nodes

    def _inputs(self) -> list[gs.Tensor]:
        """The input of each step, in the order in which each direction takes them."""
        x = self.node.inputs[0]
        if self.layout:
            x = self._add("Transpose", [x], perm=[1, 0, 2])
        if self.directions == 2:
            x = self._add("Concat", [x, self._add("Gather", [x, self.turned], axis=0)], axis=2)
        parts = self._split(x, self.steps, 1, 0)
        first = np.array([0], np.int64)
        parts = [self._add("Squeeze", [part, first]) for part in parts]
        return parts[::-1] if self.reverse else parts

    def _state(self, i: int) -> gs.Tensor | None:
        """An initial state; None where there is none, or it is zero."""
        if not has(self.node, i) or _all(constant(self.node, i), 0):
            return None
        state = self.node.inputs[i]
        state = state if self.layout else self._add("Transpose", [state], perm=[1, 0, 2])
        return self._add("Reshape", [state, np.array([-1, self.width], np.int64)])

    def _outputs(self, hs: list[gs.Tensor], h: gs.Tensor, c: gs.Tensor | None) -> None:
        outputs = self.node.outputs
        if _wanted(outputs, 0):
            perm = [2, 0, 1, 3] if self.layout else [0, 1, 2, 3]
            self._hand("Transpose", [self._sequence(hs)], outputs[0], perm=perm)
        for i, state in ((1, h), (2, c)):
            if _wanted(outputs, i):
                target = np.array([-1, self.directions, self.hidden], np.int64)
                last = self._add("Reshape", [state, target])
                self._hand("Transpose", [last], outputs[i], perm=[0, 1, 2] if self.layout else [1, 0, 2])

    def _sequence(self, hs: list[gs.Tensor]) -> gs.Tensor:
        """(steps, directions, batch, hidden), each direction turned to the order of the input."""
        axis = np.array([0], np.int64)
        y = self._add("Concat", [self._add("Unsqueeze", [h, axis]) for h in (hs[::-1] if self.reverse else hs)], axis=0)
        parts = self._split(y, self.directions, self.hidden, 2)
        if self.directions == 2:
            parts[1] = self._add("Gather", [parts[1], self.turned], axis=0)
        return self._add("Concat", [self._add("Unsqueeze", [part, axis + 1]) for part in parts], axis=1)

    def _hand(self, op: str, inputs: Sequence[gs.Tensor], output: gs.Tensor, **attrs: Any) -> None:
        self.nodes.append(gs.Node(op, self.names.fresh(f"{self.node.name}_{op}"), attrs, list(inputs), [output]))

    # -- steps: (x, h, c) -> (h, c) ------------------------------------------------------------------------------

    def _rows(self, array: np.ndarray, *gates: int) -> np.ndarray:
        """The weight of the numbered gates, (in, out): directions are blocks on the diagonal of each."""
        features = array.shape[2]
        w = np.zeros((self.directions, features, len(gates), self.directions, self.hidden), array.dtype)
        for d in range(self.directions):
            for i, g in enumerate(gates):
                w[d, :, i, d] = array[d, g * self.hidden : (g + 1) * self.hidden].T
        return w.reshape(self.directions * features, -1)

    def _shift(self, *gates: int, which: Sequence[int] = (0, 1)) -> gs.Constant:
        """The biases of the numbered gates, those of the input (0) and of the state (1) added up."""
        parts = self.bias.reshape(self.directions, 2, GATES[self.node.op], self.hidden)
        total = parts[:, list(which)].sum(1)[:, list(gates)]
        return self._constant(total.swapaxes(0, 1).reshape(-1).astype(self.dtype))

    def _gates(self, count: int, x: Any) -> list[gs.Tensor]:
        return self._split(self._add(self.functions[0], [x]), count, self.width, 1)

    def _lstm(self) -> Callable[..., Any]:
        """Gates in the order i, o, f, c (ONNX spec): c = f c + i tanh(...), h = o tanh(c)."""
        gates = (self._rows(self.w, 0, 1, 2), self._rows(self.r, 0, 1, 2))
        cell = (self._rows(self.w, 3), self._rows(self.r, 3))
        shifts = self._shift(0, 1, 2), self._shift(3)

        def step(x: gs.Tensor, h: gs.Tensor | None, c: gs.Tensor | None) -> tuple[gs.Tensor, gs.Tensor]:
            i, o, f = self._gates(3, self._dense([(x, gates[0]), (h, gates[1])], shifts[0]))
            new = self._add(self.functions[1], [self._dense([(x, cell[0]), (h, cell[1])], shifts[1])])
            new = self._add("Mul", [i, new])
            if c is not None:
                new = self._add("Add", [self._add("Mul", [f, c]), new])
            return self._add("Mul", [o, self._add(self.functions[2], [new])]), new

        return step

    def _gru(self) -> Callable[..., Any]:
        """Gates in the order z, r, h (ONNX spec): h = (1 - z) new + z h."""
        gates = (self._rows(self.w, 0, 1), self._rows(self.r, 0, 1))
        new_x, new_h = self._rows(self.w, 2), self._rows(self.r, 2)
        shift, both = self._shift(0, 1), self._shift(2)
        of_x, of_h = self._shift(2, which=(0,)), self._shift(2, which=(1,))
        before = bool(self.node.attrs.get("linear_before_reset", 0))
        one = self._constant(np.ones((), self.dtype))

        def step(x: gs.Tensor, h: gs.Tensor | None, _: None) -> tuple[gs.Tensor, None]:
            z, r = self._gates(2, self._dense([(x, gates[0]), (h, gates[1])], shift))
            if before:
                state: gs.Tensor = of_h if h is None else self._dense([(h, new_h)], of_h)
                inner = self._add("Add", [self._dense([(x, new_x)], of_x), self._add("Mul", [r, state])])
            else:
                reset = None if h is None else self._add("Mul", [r, h])
                inner = self._dense([(x, new_x), (reset, new_h)], both)
            new = self._add(self.functions[1], [inner])
            new = self._add("Mul", [self._add("Sub", [one, z]), new])
            return (new if h is None else self._add("Add", [new, self._add("Mul", [z, h])])), None

        return step

    def _rnn(self) -> Callable[..., Any]:
        w, r, shift = self._rows(self.w, 0), self._rows(self.r, 0), self._shift(0)

        def step(x: gs.Tensor, h: gs.Tensor | None, _: None) -> tuple[gs.Tensor, None]:
            return self._add(self.functions[0], [self._dense([(x, w), (h, r)], shift)]), None

        return step


def _wanted(outputs: Sequence[gs.Tensor], i: int) -> bool:
    return i < len(outputs) and not outputs[i].is_empty()
