"""Write an Einsum as what it is: transpositions, sums, and products of at most two tensors, a Mul or a MatMul.

So a dense layer written as an Einsum gets the rule of a dense layer, attention is recognised as attention, and no
engine needs an Einsum of its own. More than two operands are multiplied pair by pair, from the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import Names, detach, put_for

Size = int | str | None


@dataclass(frozen=True)
class Term:
    """A tensor and a letter for each of its axes."""

    tensor: gs.Tensor
    letters: str

    def size(self, letter: str) -> Size:
        shape: Sequence[Size] = self.tensor.shape
        return shape[self.letters.index(letter)]


def parse(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Letters of the operands and of the output, an ellipsis written out with letters of its own.

    None where a letter stands twice in one term, which takes a diagonal, or where the ranks do not fit.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    free = [c for c in ascii_letters if c not in equation]
    spans = [rank - len(term.replace(".", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(span < 0 or (span > 0 and "..." not in term) for span, term in zip(spans, terms, strict=True)):
        return None
    widest = max(spans, default=0)
    if widest > len(free):
        return None
    dots = "".join(free[:widest])
    written = [term.replace("...", dots[widest - span :]) for term, span in zip(terms, spans, strict=True)]
    right = right.replace("...", dots)
    if any(len(set(term)) < len(term) for term in (*written, right)):
        return None
    return written, right


def lower_einsum(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace every Einsum whose operands' ranks are known; True where there was one."""
    names = Names(graph, protected)
    changed = False
    for node in [n for n in graph.nodes if n.op == "Einsum" and n.outputs]:
        shapes = [t.shape for t in node.inputs]
        if any(shape is None for shape in shapes):
            continue
        parsed = parse(str(node.attrs["equation"]), [len(shape) for shape in shapes])
        nodes = parsed and _Writer(node, names, graph.opset).write(*parsed)
        if nodes:
            detach(node)
            put_for(graph, node, nodes)
            changed = True
    return changed


def why_kept(node: gs.Node) -> str | None:
    """Why an Einsum has not been replaced; None for any other node."""
    if node.op != "Einsum":
        return None
    shapes = [t.shape for t in node.inputs]
    if any(shape is None for shape in shapes):
        return "the number of axes of an operand is not known"
    if parse(str(node.attrs["equation"]), [len(shape) for shape in shapes]) is None:
        return "an index stands twice in one term, which takes a diagonal"
    return "the sizes of its operands are not known well enough"


class _Unclear(Exception):
    """The sizes do not tell how to write it."""


class _Writer:
    """Writes the nodes of one Einsum; the product, or the last node where there is none, takes its name."""

    def __init__(self, node: gs.Node, names: Names, opset: int):
        self.node, self.names, self.opset = node, names, opset
        self.nodes: list[gs.Node] = []

    def write(self, letters: list[str], right: str) -> list[gs.Node]:
        terms = [Term(tensor, term) for tensor, term in zip(self.node.inputs, letters, strict=True)]
        output = self.node.outputs[0]
        try:
            while len(terms) > 1:
                later = {c for term in terms[2:] for c in term.letters} | set(right)
                terms[:2] = [self._product(terms[0], terms[1], later, right if len(terms) == 2 else "")]
            done = self._ordered(self._summed(terms[0], set(right)), right)
        except _Unclear:
            return []
        if not self.nodes:
            done = self._add("Identity", [done.tensor], done.letters, done.tensor.shape)
        last = self.nodes[-1]
        last.outputs[0] = output
        bearer = next((n for n in reversed(self.nodes) if n.op in ("MatMul", "Mul")), last)
        bearer.name = self.node.name
        return self.nodes

    def _add(self, op: str, inputs: Sequence[gs.Tensor], letters: str, shape: Sequence[Size], **attrs: object) -> Term:
        name = self.names.fresh(f"{self.node.name}_{op}")
        made = gs.Variable(name, self.node.outputs[0].dtype, list(shape))
        self.nodes.append(gs.Node(op, name, dict(attrs), list(inputs), [made]))
        return Term(made, letters)

    def _at_axes(
        self, op: str, tensor: gs.Tensor, axes: Sequence[int], letters: str, shape: Sequence[Size], **attrs: object
    ) -> Term:
        """Squeeze, Unsqueeze or ReduceSum, whose axes are an attribute up to opset 12, an input after."""
        if self.opset < 13:
            return self._add(op, [tensor], letters, shape, axes=list(axes), **attrs)
        return self._add(op, [tensor, self._constant(axes)], letters, shape, **attrs)

    def _constant(self, values: Sequence[int]) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{self.node.name}_sizes"), np.array(values, np.int64))

    def _summed(self, term: Term, wanted: set[str]) -> Term:
        """Summed over the letters that nobody wants."""
        axes = [i for i, c in enumerate(term.letters) if c not in wanted]
        if not axes:
            return term
        kept = [c for c in term.letters if c in wanted]
        sizes = [term.size(c) for c in kept]
        return self._at_axes("ReduceSum", term.tensor, axes, "".join(kept), sizes, keepdims=0)

    def _ordered(self, term: Term, letters: str) -> Term:
        """Transposed to the order of `letters`; an axis of length 1 for those that it lacks."""
        if missing := [i for i, c in enumerate(letters) if c not in term.letters]:
            present = self._ordered(term, "".join(c for c in letters if c in term.letters))
            sizes = [1 if c not in term.letters else term.size(c) for c in letters]
            return self._at_axes("Unsqueeze", present.tensor, missing, letters, sizes)
        if term.letters == letters:
            return term
        perm = [term.letters.index(c) for c in letters]
        return self._add("Transpose", [term.tensor], letters, [term.size(c) for c in letters], perm=perm)

    def _product(self, a: Term, b: Term, later: set[str], right: str) -> Term:
        a, b = self._summed(a, set(b.letters) | later), self._summed(b, set(a.letters) | later)
        inner = [c for c in a.letters if c in b.letters and c not in later]
        if not inner:
            letters = right or "".join(dict.fromkeys(a.letters + b.letters))
            letters = "".join(c for c in letters if c in a.letters or c in b.letters)
            sides = [self._ordered(term, letters) for term in (a, b)]
            return self._add("Mul", [t.tensor for t in sides], letters, self._sizes(a, b, letters))
        if any(a.size(c) != b.size(c) for c in inner):
            raise _Unclear
        shared = "".join(c for c in a.letters if c in b.letters and c in later)
        rows = "".join(c for c in a.letters if c not in b.letters)
        columns = "".join(c for c in b.letters if c not in a.letters)
        if len(columns) > 1 and len(rows) <= 1:
            a, b, rows, columns = b, a, columns, rows
        return self._matmul(a, b, shared, rows, "".join(inner), columns)

    def _matmul(self, a: Term, b: Term, shared: str, rows: str, inner: str, columns: str) -> Term:
        """(*front, *shared, row, inner) by (*shared, inner, columns): what `a` has of its own goes to the front."""
        front, row = rows[:-1], rows[-1:]
        left = self._ordered(a, front + shared + row + inner)
        other = self._ordered(b, shared + inner + columns)
        lead = front + shared
        x = self._merged(left, [*lead, row or None, inner])
        w = self._merged(other, [*shared, inner, columns or None])
        sizes = [*self._sizes(a, b, lead), a.size(row) if row else 1, self._whole(b, columns) if columns else 1]
        y = self._add("MatMul", [x, w], lead + "mn", sizes)
        whole = lead + row + columns
        if len(row) == len(columns) == 1:
            return Term(y.tensor, whole)
        if len(columns) > 1:
            wide = [*self._sizes(a, b, lead), *([a.size(row)] if row else []), *(b.size(c) for c in columns)]
            return self._add("Reshape", [y.tensor, self._target(wide, len(lead))], whole, wide)
        axes = [len(lead) + i for i, letters in enumerate((row, columns)) if not letters]
        return self._at_axes("Squeeze", y.tensor, axes, whole, self._sizes(a, b, whole))

    def _merged(self, term: Term, axes: Sequence[str | None]) -> gs.Tensor:
        """`term` with letters that stand together in `axes` as one axis, and one of length 1 for None."""
        if all(letters is not None and len(letters) == 1 for letters in axes):
            return term.tensor
        sizes = [1 if letters is None else self._whole(term, letters) for letters in axes]
        same = 0
        while same < len(axes) and axes[same] is not None and axes[same] == term.letters[same : same + 1]:
            same += 1
        return self._add("Reshape", [term.tensor, self._target(sizes, same)], "", sizes).tensor

    def _target(self, sizes: Sequence[Size], same: int) -> gs.Constant:
        """The target of a Reshape to `sizes`, whose first `same` axes stay as they are."""
        target = [0 if i < same else n if isinstance(n, int) else -1 for i, n in enumerate(sizes)]
        if target.count(-1) > 1:
            raise _Unclear
        return self._constant(target)

    @staticmethod
    def _whole(term: Term, letters: str) -> Size:
        sizes = [term.size(c) for c in letters]
        if len(sizes) == 1:
            return sizes[0]
        known = [n for n in sizes if isinstance(n, int)]
        return int(np.prod(known)) if len(known) == len(sizes) else None

    @staticmethod
    def _sizes(a: Term, b: Term, letters: str) -> list[Size]:
        """The size of each letter; an axis of length 1 gives way to the other operand's."""
        found: list[Size] = []
        for c in letters:
            sizes = [term.size(c) for term in (a, b) if c in term.letters]
            found.append(next((n for n in sizes if n != 1), 1))
        return found
