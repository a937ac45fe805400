"""Weights cut out of a file's bytes: what is left and what was taken make the same model again."""

import mmap

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcam.weights import LARGE, attach, cut, is_stub, pieces, stub, take


def model(*weights: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [w.name], [f"y{i}"]) for i, w in enumerate(weights)]
    outputs = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(len(weights))]
    return helper.make_model(helper.make_graph(nodes, "g", [], outputs, list(weights)))


def restored(data: bytes) -> onnx.ModelProto:
    """The oracle: stubs filled in again by hand and the whole compared as protobuf does."""
    rest, weights = cut(data)
    proto = onnx.ModelProto.FromString(rest)
    for tensor in proto.graph.initializer:
        if is_stub(tensor):
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return proto


def test_what_is_cut_and_what_is_left_make_the_whole():
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((64, 32)).astype(kind) for kind in (np.float32, np.float64, np.float16, np.int8, np.uint8)
    ]
    proto = model(
        *(numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)), numpy_helper.from_array(np.ones(3), "b")
    )
    rest, weights = cut(proto.SerializeToString())
    assert len(rest) < 8000
    assert list(weights) == [f"w{i}" for i, a in enumerate(arrays) if a.nbytes >= LARGE]
    for name, values in weights.items():
        np.testing.assert_array_equal(values, arrays[int(name[1:])])
        assert values.flags.aligned and values.flags.writeable
    assert restored(proto.SerializeToString()) == proto


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from([np.float32, np.int64, np.float16, np.bool_])), max_size=5
    ),
    st.text(max_size=200),
)
def test_any_model_is_the_same_after_cutting_and_filling_in(shapes, doc):
    proto = model(*(numpy_helper.from_array(np.arange(n).astype(kind), f"w{i}") for i, (n, kind) in enumerate(shapes)))
    proto.doc_string = doc
    proto.graph.doc_string = doc * 20
    proto.metadata_props.add(key="k", value=doc)
    data = proto.SerializeToString()
    assert restored(data) == proto
    assert onnx.ModelProto.FromString(b"".join(pieces(*cut(data)))) == proto


def test_a_file_that_is_mapped_can_change_afterwards(tmp_path):
    path = tmp_path / "m.onnx"
    array = np.arange(5000, dtype=np.float32)
    path.write_bytes(model(numpy_helper.from_array(array, "w")).SerializeToString())
    with path.open("rb") as stream:
        _, weights = cut(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    path.write_bytes(b"")
    np.testing.assert_array_equal(weights["w"], array)


def test_what_is_not_plain_stays_in_the_model():
    wrong = TensorProto(name="short", dims=[4096], data_type=TensorProto.FLOAT, raw_data=b"\0" * LARGE)
    odd = TensorProto(name="odd", dims=[4096], data_type=TensorProto.BFLOAT16, raw_data=b"\0" * 8192)
    typed = TensorProto(name="typed", dims=[4096], data_type=TensorProto.FLOAT, float_data=[1.0] * 4096)
    proto = model(wrong, odd, typed)
    rest, weights = cut(proto.SerializeToString())
    assert not weights and rest == proto.SerializeToString()
    assert take(odd) is None and odd.raw_data


def test_the_second_of_two_weights_of_one_name_stays():
    twice = [numpy_helper.from_array(np.full(2048, v, np.float32), "w") for v in (1, 2)]
    rest, weights = cut(model(*twice).SerializeToString())
    assert weights["w"][0] == 1
    assert [is_stub(t) for t in onnx.ModelProto.FromString(rest).graph.initializer] == [True, False]


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x3b\x01", b"\x3a\x05\x2a\x7f\x00\x00\x00", b"\xff" * 30])
def test_what_is_no_message_is_an_error(data):
    with pytest.raises(ValueError):
        cut(data)


def test_a_graph_gets_its_values_back():
    array = np.arange(4096, dtype=np.float32)
    rest, weights = cut(model(numpy_helper.from_array(array, "w")).SerializeToString())
    graph = attach(gs.import_onnx(onnx.ModelProto.FromString(rest)), weights)
    assert graph.tensors()["w"].values is weights["w"]
    (exported,) = gs.export_onnx(graph, do_type_check=False).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(exported), array)
    assert not is_stub(exported) and is_stub(stub("w", array))
