"""Einsum is written as transpositions, sums and at most one product of two tensors at a time.

Oracle for values: ONNX Runtime on the file as it is, to 1e-5 as sums are in another order. Oracle for the gradient:
torch's einsum and autograd in float64, 1e-10.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from walking import ENGINES, Walker, canonised, network, relative

from onnxcam.composites import COMPOSITES

# Equation and shapes of the operands.
EQUATIONS: list[tuple[str, tuple[tuple[int, ...], ...]]] = [
    ("ij,jk->ik", ((3, 4), (4, 5))),
    ("ij,kj", ((3, 4), (5, 4))),
    ("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))),
    ("bhid,bhjd->bhij", ((2, 3, 4, 5), (2, 3, 6, 5))),
    ("bhij,bhjd->bihd", ((2, 3, 4, 5), (2, 3, 5, 6))),
    ("byhwc,wkc->byhwk", ((2, 2, 3, 4, 5), (4, 6, 5))),
    ("byhwc,hkc->byhwk", ((2, 2, 3, 4, 5), (3, 6, 5))),
    ("bchw,dc->bdhw", ((2, 3, 4, 5), (6, 3))),
    ("bnc,hcd->bhnd", ((2, 4, 5), (3, 5, 6))),
    ("bnc,chd->bhnd", ((2, 4, 5), (5, 3, 6))),
    ("bnc,cde->bnde", ((2, 4, 5), (5, 3, 2))),
    ("bhnd,hdc->bnc", ((2, 3, 4, 5), (3, 5, 6))),
    ("bhnd,bhn->bhd", ((2, 3, 4, 5), (2, 3, 4))),
    ("bhd,bhd->bh", ((2, 3, 4), (2, 3, 4))),
    ("bi,bj->bij", ((2, 3), (2, 4))),
    ("bchw,bc->bchw", ((2, 3, 4, 5), (2, 3))),
    ("bchw,bkhw->bck", ((2, 3, 4, 5), (2, 6, 4, 5))),
    ("bij,bkl->b", ((2, 3, 4), (2, 5, 2))),
    ("bijk,bjl->bk", ((2, 3, 4, 5), (2, 4, 6))),
    ("...ij,...jk->...ik", ((2, 3, 4, 5), (2, 3, 5, 6))),
    ("...i,...i->...", ((2, 3, 4), (2, 3, 4))),
    ("i...,i...", ((3, 2, 4), (3, 2, 4))),
    ("bij->bji", ((2, 3, 4),)),
    ("bij->b", ((2, 3, 4),)),
    ("bij->bij", ((2, 3, 4),)),
    ("ba", ((3, 4),)),
    ("bic,bcd,bde->bie", ((2, 3, 4), (2, 4, 5), (2, 5, 3))),
    ("bi,bj,bk->bijk", ((2, 3), (2, 4), (2, 2))),
]


def model_of(equation: str, shapes: tuple[tuple[int, ...], ...], weights: bool, opset: int = 17) -> onnx.ModelProto:
    """`equation` over inputs i0, i1, ...; the later ones are weights of the file at will."""
    rng = np.random.default_rng(0)
    arrays = {f"i{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    fixed = {name: a for name, a in arrays.items() if weights and name != "i0"}
    inputs = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}" for n, a in arrays.items() if n not in fixed)
    text = f'({inputs}) => (float y) {{ [einsum] y = Einsum<equation="{equation}">({", ".join(arrays)}) }}'
    return network(text, opset, **fixed)


def feeds_of(shapes: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("weights", [False, True], ids=["all computed", "by a weight"])
@pytest.mark.parametrize("equation, shapes", EQUATIONS)
def test_what_is_written_computes_the_same(equation: str, shapes: tuple[tuple[int, ...], ...], weights: bool) -> None:
    arrays = feeds_of(shapes)
    for opset in (12, 17):
        model = model_of(equation, shapes, weights, opset)
        feeds = {value.name: arrays[int(value.name[1:])] for value in model.graph.input}
        graph = canonised(model)
        assert not any(node.op_type == "Einsum" for node in graph.nodes)
        assert sum(node.op_type in ("MatMul", "Mul") for node in graph.nodes) == len(shapes) - 1
        if len(shapes) == 2:
            assert "einsum" in {node.name for node in graph.nodes if node.op_type in ("MatMul", "Mul")}
        (want,) = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
        got = Walker(graph, list(feeds), "y", "float32").forward(feeds)["y"]
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("equation, shapes", EQUATIONS)
def test_its_gradient_is_that_of_torch(equation: str, shapes: tuple[tuple[int, ...], ...], engine: str) -> None:
    arrays = [a.astype(np.float64) for a in feeds_of(shapes)]
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = torch.einsum(equation, *leaves)
    start = np.random.default_rng(1).standard_normal((2, *y.shape))
    names = [f"i{i}" for i in range(len(arrays))]
    walker = Walker(canonised(model_of(equation, shapes, weights=False)), names, "y", engine=engine)
    walk = walker(dict(zip(names, arrays, strict=True)), start, COMPOSITES["gradient"])
    for name, leaf in zip(names, leaves, strict=True):
        rows = [torch.autograd.grad(y, leaf, torch.from_numpy(u), retain_graph=True)[0].numpy() for u in start]
        assert relative(walk[name], np.stack(rows)) <= 1e-10


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("bnc,cd->bnd", ("N,4,5", (5, 6))),
        ("bchw,dc->bdhw", ("N,3,4,5", (6, 3))),
        ("bnc,hcd->bhnd", ("N,4,5", (3, 5, 6))),
    ],
)
def test_a_batch_of_unknown_size_stays_so(equation: str, shapes: tuple[str, tuple[int, ...]]) -> None:
    """One dense layer, and no Reshape that would need to know the batch: it is recorded and runs at any batch."""
    w = np.random.default_rng(0).standard_normal(shapes[1]).astype(np.float32)
    text = f'(float[{shapes[0]}] x) => (float y) {{ y = Einsum<equation="{equation}">(x, w) }}'
    graph = canonised(network(text, w=w))
    assert [node.op_type for node in graph.nodes].count("MatMul") == 1
    sizes = [int(n) for n in shapes[0].split(",")[1:]]
    x = np.random.default_rng(1).standard_normal((3, *sizes))
    numpy, onnx_ = (Walker(graph, ["x"], "y", engine=engine) for engine in ENGINES)
    values = numpy.forward({"x": x})
    start = np.random.default_rng(2).standard_normal((1, *values["y"].shape))
    one, other = (w.back(values, start, COMPOSITES["epsilon_plus"])["x"] for w in (numpy, onnx_))
    assert relative(other, one) <= 1e-10


def test_a_diagonal_stays_and_is_refused_by_name() -> None:
    model = model_of("bii->bi", ((2, 3, 3),), weights=False)
    graph = canonised(model)
    assert [node.op_type for node in graph.nodes] == ["Einsum"]
    walker = Walker(graph, ["i0"], "y", "float32")
    with pytest.raises(Exception, match=r"'einsum'.*Einsum.*twice"):
        walker({"i0": feeds_of(((2, 3, 3),))[0]}, np.ones((1, 2, 3)), COMPOSITES["gradient"])
