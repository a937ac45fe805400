"""Every operator against ONNX's own node test cases: our vector-Jacobian product is the derivative of the reference.

The oracle is the onnx package's reference evaluator in float64, differentiated numerically; it shares no code with the
operators. The inputs are those of the test case, moved off ties and kinks by a little noise.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import onnx
import onnx.backend.test.case.base as case_base
import onnx.reference.ops.op_erf as op_erf
import onnx.reference.ops.op_pool_common as pools
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from walking import RecordedWalk

from onnxcam.composites import COMPOSITES
from onnxcam.engines.reference import in_double
from onnxcam.errors import ModelError
from onnxcam.operators import registered
from onnxcam.operators.statistics import STOPS
from tests.operators.single_node import Single, Values, agree

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
KNOWN = FLOATS | {
    *(TensorProto.INT64, TensorProto.INT32, TensorProto.UINT64, TensorProto.UINT32),
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL),
}

# Operands that must be constants of the graph.
FIXED = {"BatchNormalization": (1, 2, 3, 4)}

# Operands that say how, not what: they may be computed in the graph, but nothing is handed down to them.
SETTINGS = {
    **{"Clip": (1, 2), "Resize": (1, 2, 3), "Upsample": (1,), "Dropout": (1, 2), "Pad": (2,), "CastLike": (1,)},
    "RoiAlign": (1,),
}

# What operators do not promise, or the reference cannot check: (part of the case's name, why).
OUTSIDE = (
    ("training", "training mode"),
    ("dropout_random", "draws at random"),
    ("empty_set", "a reduction over nothing"),
    ("allowzero", "a tensor of nothing"),
    ("scatter_with", "the reference has no Scatter"),
    ("downsample_scales_linear_align_corners", "ONNX Runtime, which we follow, rounds the resized length first"),
    ("downsample_scales_cubic_align_corners", "ONNX Runtime, which we follow, rounds the resized length first"),
    ("gridsample", "the reference rounds places to float32; see test_sampling"),
    ("deform_conv", "the reference rounds places to float32; see test_sampling"),
    ("roialign_mode_max", "refused"),
    ("maxunpool_export_with_output_shape", "ONNX Runtime, which we follow, counts places in another shape"),
    ("mod_float_edge_cases", "remainders by zero and of what is infinite"),
    ("mvn", "its definition computes in float32; see test_linear"),
    ("reduction_m", "updates multiplied or compared are refused"),
    ("scatternd_m", "updates multiplied or compared are refused"),
)


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    inputs: tuple[np.ndarray, ...]

    @property
    def node(self) -> onnx.NodeProto:
        return self.model.graph.node[0]

    def operands(self, table: dict[str, tuple[int, ...]]) -> set[str]:
        inputs = self.node.input
        return {inputs[i] for i in table.get(self.node.op_type, ()) if i < len(inputs)}

    @property
    def signals(self) -> list[str]:
        """The float operands with a derivative."""
        others = self.operands(FIXED) | self.operands(SETTINGS)
        wanted = set(self.node.input) - others
        values = zip(self.model.graph.input, self.inputs, strict=True)
        return [t.name for t, a in values if a.dtype.kind == "f" and t.name in wanted]


# Rounding has no derivative, integers none either: their straight-through products are in test_quantisation.
QUANTISED = {op for domain, op, _, _ in registered() if domain == "" and ("uantize" in op or "QLinear" in op)} | {
    *("ConvInteger", "MatMulInteger")
}


@functools.cache
def cases() -> dict[str, Case]:
    """ONNX's test cases of one registered node each, float operands and results; names without "test_"."""
    # Neither the text of the cases nor the expected outputs of the pools, which take long, are needed.
    no_text = mock.patch.object(case_base, "process_snippet", lambda op, name, export: ("", ""))
    no_pool = mock.patch.object(
        pools, "pool", lambda x, shape, k, s, out, *_, **__: np.zeros((*shape[:2], *out), x.dtype)
    )
    with warnings.catch_warnings(), no_text, no_pool:
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    known = {op for domain, op, _, _ in registered() if domain == ""} - set(STOPS) - QUANTISED
    found = {}
    for case in collected:
        graph = case.model.graph
        types = [t.type.tensor_type.elem_type for t in (*graph.input, *graph.output)]
        if len(graph.node) != 1 or graph.node[0].domain or graph.node[0].op_type not in known:
            continue
        if not set(types) <= KNOWN or not FLOATS & set(types[: len(graph.input)]):
            continue
        if types[len(graph.input)] in FLOATS and not any(part in case.name for part, _ in OUTSIDE):
            name = case.name.removeprefix("test_")
            found[name] = Case(name, case.model, tuple(_array(a) for a in case.data_sets[0][0]))
    return found


def _array(value: object) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def variants() -> Iterator[pytest.ParameterSet]:
    """Each case with all operands variable, with all but the first constant, and with the first constant."""
    for case in cases().values():
        names, fixed, signals = [t.name for t in case.model.graph.input], case.operands(FIXED), case.signals
        if not signals:
            continue
        choices = {"all": fixed, "first": set(names) - {signals[0]}, "others": fixed | {signals[0]}}
        seen = []
        for variant, constants in choices.items():
            if constants not in seen and not set(signals) <= constants:
                seen.append(constants)
                yield pytest.param(case, constants, id=f"{case.name}-{variant}")


def prepared(case: Case, constants: set[str]) -> tuple[onnx.ModelProto, Values]:
    """The case in float64 with `constants` as initialisers, and noisy values for the rest."""
    rng = np.random.default_rng(0)
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    del model.graph.input[:]
    if case.node.op_type == "GroupNormalization":  # its definition would compute in float32
        model.graph.node[0].attribute.append(helper.make_attribute("stash_type", TensorProto.DOUBLE))
    feeds = {}
    for value, array in zip(case.model.graph.input, case.inputs, strict=True):
        if "pool" in case.name:  # the reference loops over cells in Python
            array = array[(slice(None), slice(None), *(slice(9),) * (array.ndim - 2))]
        if array.dtype.kind == "f":
            array = array.astype(np.float64)
        if value.name in case.signals and value.name not in constants:
            noise = 0.5 if case.node.op_type == "Acosh" else 1e-3  # its derivative is infinite at 1
            array = np.nan_to_num(array, nan=0.5, posinf=1, neginf=-1) + noise * rng.uniform(0.1, 1, array.shape)
        if value.name in constants:
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        else:
            model.graph.input.append(value)
            feeds[value.name] = array
    return in_double(model), feeds


@pytest.fixture(autouse=True)
def erf_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference computes the error function in float32."""
    double = np.vectorize(math.erf, otypes=["d"])
    monkeypatch.setattr(op_erf.Erf, "_run", lambda self, x: (double(x),))


@pytest.mark.parametrize("case, constants", list(variants()))
def test_the_product_with_a_cotangent_is_the_derivative_of_the_reference(case: Case, constants: set[str]) -> None:
    """Oracle: central differences of onnx.reference in float64. Linear operators are exact at any step, hence 1e-10;
    elsewhere two steps are extrapolated (error h^4, rounding 1e-12) and 1e-6 is asked."""
    model, feeds = prepared(case, constants)
    rng = np.random.default_rng(1)
    reference = ReferenceEvaluator(model)
    names = [t.name for t in model.graph.output]
    outputs = dict(zip(names, reference.run(None, feeds), strict=True))
    single = Single(model, feeds, [outputs.get(o) for o in case.node.output])

    targets = 2
    starts = {
        name: rng.standard_normal((targets, *y.shape))
        for name, y in outputs.items()
        if y.dtype.kind == "f" and (case.node.op_type == "Split" or name == case.node.output[0])
    }
    directions = {name: rng.standard_normal(a.shape) for name, a in feeds.items() if name in case.signals}
    back = single.back(starts)

    def along(step: float) -> np.ndarray:
        """Differences of <start, output>, (targets,)."""
        ends = []
        for sign in (0.5, -0.5):
            moved = feeds | {n: feeds[n] + sign * step * d for n, d in directions.items()}
            ends.append(dict(zip(names, reference.run(None, moved), strict=True)))
        return sum(((ends[0][n] - ends[1][n]) * u).reshape(targets, -1).sum(1) / step for n, u in starts.items())

    got, scale = np.zeros(targets), np.full(targets, 1e-12)
    for name, direction in directions.items():
        if name in back:
            assert back[name].shape == (targets, *direction.shape)
            got += (back[name] * direction).reshape(targets, -1).sum(1)
            scale += np.linalg.norm(back[name].reshape(targets, -1), axis=1) * np.linalg.norm(direction)
    linear = single.operator.kind in ("linear", "additive") or (
        single.operator.kind == "averaging" and single.operator.gradient is None
    )
    expected = along(1.0) if linear else (4 * along(1e-4) - along(2e-4)) / 3
    assert np.abs(got - expected).max() <= (1e-10 if linear else 1e-6) * scale.max()


def recordable(case: Case, symbolic: bool) -> tuple[onnx.ModelProto, Values]:
    """The case as exporters write it: what says how is constant. Shapes are inferred, axis 0 as a symbol at will.

    Inference has no answer for some ops in float64; a static shape is then taken from the values.
    """
    model, feeds = prepared(case, case.operands(FIXED))
    values = ReferenceEvaluator(model).run(None, feeds)
    for value in list(model.graph.input):
        if feeds[value.name].dtype.kind != "f" or value.name in case.operands(SETTINGS):
            model.graph.initializer.append(numpy_helper.from_array(feeds.pop(value.name), value.name))
            model.graph.input.remove(value)
    for value in model.graph.input:
        n, *rest = feeds[value.name].shape or (1,)
        _declare(value, ["N", *rest] if symbolic and rest and n > 1 else feeds[value.name].shape)
    for value, array in zip(model.graph.output, values, strict=True):
        _declare(value, None if symbolic else array.shape)
    return onnx.shape_inference.infer_shapes(model), feeds


def _declare(value: onnx.ValueInfoProto, shape: Sequence[int | str] | None) -> None:
    kind = value.type.tensor_type
    kind.CopyFrom(helper.make_tensor_type_proto(kind.elem_type, shape).tensor_type)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases().values() if c.signals])
def test_what_is_recorded_is_what_the_array_engine_computes(case: Case, symbolic: bool) -> None:
    """Both in float64, hence 1e-12. A static batch is never refused; where a symbolic one is, for an op that works
    along the batch, the message says what to do."""
    model, feeds = recordable(case, symbolic)
    reference = ReferenceEvaluator(model)
    outputs = dict(zip((t.name for t in model.graph.output), reference.run(None, feeds), strict=True))
    single = Single(model, feeds, [outputs.get(o) for o in case.node.output])
    rng, targets = np.random.default_rng(1), 1 if symbolic else 2
    starts = {
        name: rng.standard_normal((targets, *y.shape))
        for name, y in outputs.items()
        if y.dtype.kind == "f" and (case.node.op_type == "Split" or name == case.node.output[0])
    }
    shapes = {name: r.shape for name, r in starts.items()}
    try:
        recorded = RecordedWalk(single.graph, shapes, single.graph.inputs, COMPOSITES["gradient"])
    except ModelError as error:
        assert symbolic
        assert "--engine numpy" in str(error)
        assert any(f"'{name}'" in str(error) for name in (single.node.name, *case.node.input, *case.node.output))
        return
    got, want = recorded(feeds, starts).relevance, single.back(starts)
    assert set(got) == set(want)
    for name, r in want.items():
        agree(got[name], r, 1e-12)


PICKING = ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "MaxUnpool", "TopK")


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name) for c in cases().values() if c.signals and c.node.op_type in PICKING]
)
def test_indices_that_only_the_running_model_knows_are_recorded(case: Case, targets: int) -> None:
    """Oracle: the array engine, which is held against the reference above and has the indices at hand; 1e-12."""
    model, feeds = prepared(case, set())
    outputs = dict(zip((t.name for t in model.graph.output), ReferenceEvaluator(model).run(None, feeds), strict=True))
    for value, array in zip(model.graph.output, outputs.values(), strict=True):
        _declare(value, array.shape)
    if case.node.op_type == "TopK":  # how many is no index
        model.graph.initializer.append(numpy_helper.from_array(feeds.pop(case.node.input[1]), case.node.input[1]))
        del model.graph.input[1]
    single = Single(model, feeds, [outputs.get(o) for o in case.node.output])
    y = outputs[case.node.output[0]]
    start = {case.node.output[0]: np.random.default_rng(1).standard_normal((targets, *y.shape))}
    shapes = {name: r.shape for name, r in start.items()}
    recorded = RecordedWalk(single.graph, shapes, single.graph.inputs, COMPOSITES["gradient"])
    got, want = recorded(feeds, start).relevance, single.back(start)
    assert set(got) == set(want)
    for name, r in want.items():
        agree(got[name], r, 1e-12)


def is_linear(case: Case) -> bool:
    return case.node.op_type in (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "AveragePool", "GlobalAveragePool", "Resize", "Upsample"),
        *("ReduceMean", "ReduceSum", "CumSum", "Col2Im", "RoiAlign"),
    )


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases().values() if is_linear(c)])
def test_what_rules_see_of_a_linear_operator_gives_its_output(case: Case) -> None:
    """`bind(at)` is what rules divide by. Oracle: onnx.reference in float64, 1e-10."""
    if case.node.op_type == "Resize" and ("cubic" in case.name or "extrapolation_value" in case.name):
        pytest.skip("relevance is shared by another map on purpose: see test_resize")
    model, feeds = prepared(case, {n.name for n in case.model.graph.input} - {case.signals[0]})
    y = ReferenceEvaluator(model).run(None, feeds)[0]
    single = Single(model, feeds, [y])
    linear = single.operator.bind(single.at)
    z = linear.apply(linear.x, linear.weight)
    agree(z if linear.bias is None else z + linear.bias, y, 1e-10)


# Operators without a usable node case, and the test that covers them.
ELSEWHERE = {
    **{"MeanVarianceNormalization": "test_linear", "GridSample": "test_sampling", "DeformConv": "test_sampling"},
    **{"Scatter": "test_selection", "Trilu": "test_selection", "GlobalLpPool": "test_pooling"},
}


def test_every_operator_that_hands_down_something_has_a_case() -> None:
    """An operator added without a test fails here. `STOPS` lists the op types that are statistics."""
    known = {op for domain, op, _, _ in registered() if domain == ""}
    assert set(STOPS) <= known
    covered = {param.values[0].node.op_type for param in variants()}
    assert known - set(STOPS) - set(ELSEWHERE) - QUANTISED == covered
