"""Reading accepts what ONNX Runtime runs, and says in one line what is wrong with the rest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcam.errors import ModelError, OnnxcamError, UsageError
from onnxcam.reading import read


def small(opset: int = 17) -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2, 1, 1), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, 4, 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def refused(source: object, error: type[OnnxcamError], *says: str) -> None:
    with pytest.raises(error) as caught:
        read(source)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    for words in says:
        assert words in text


def test_a_file_its_bytes_and_its_proto_read_alike(tmp_path):
    proto = small()
    helper.set_model_props(proto, {"author": "me"})
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    data = path.read_bytes()
    for source in (path, str(path), data):
        model = read(source)
        assert model.proto == proto
        assert model.sha256 == hashlib.sha256(data).hexdigest()
        assert model.metadata == {"author": "me"}
    assert read(path).path == path
    assert read(data).path is None
    assert read(proto).proto == proto
    assert read(proto).sha256 == hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def test_a_path_that_leads_nowhere_is_the_users_mistake(tmp_path):
    refused(tmp_path / "none.onnx", UsageError, "none.onnx", "no such file")
    refused(tmp_path, UsageError, "is a directory")


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"", "is empty"),
        (b"\x10\x00\x00\x00ORTM\x00\x00\x00", ".ort file; explain the .onnx file it was made from"),
        (b"\x1c\x00\x00\x00TFL3\x00\x00", "TensorFlow Lite"),
        (b"PK\x03\x04\x14\x00\x08", "zip archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!doctype html><html>", "HTML page"),
        (b"layer { name: 'conv1' }\n", "text file"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, start, says):
    path = tmp_path / "m.onnx"
    path.write_bytes(start)
    refused(path, UsageError, says, "m.onnx")
    refused(start, UsageError, says)


def test_an_ort_file_is_known_by_its_suffix_too(tmp_path):
    path = tmp_path / "m.ort"
    path.write_bytes(b"\x00" * 32)
    refused(path, UsageError, ".ort file")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_file_that_is_cut_short_is_refused(part):
    data = small().SerializeToString()
    refused(data[: int(len(data) * part)], ModelError, "cut short")


def test_a_protobuf_that_is_no_model_is_refused():
    refused(b"\x00\x01\x02\x03\xff\xfe", ModelError, "no ONNX model")
    refused(onnx.ModelProto(), ModelError, "no ONNX model")
    tensor = onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), "t")
    refused(tensor.SerializeToString(), ModelError, "no ONNX model")


def test_a_model_without_nodes_is_refused():
    proto = small()
    del proto.graph.node[:]
    refused(proto, ModelError, "no nodes")


def test_an_opset_that_is_too_old_or_too_new_is_refused_with_advice():
    refused(small(6), ModelError, "opset 6", "version_converter")
    newest = onnx.defs.onnx_opset_version()
    refused(small(newest + 1), ModelError, f"opset {newest + 1}", "upgrade onnx")
    assert read(small(7)).proto.opset_import[0].version == 7


def test_a_model_that_only_knows_other_domains_is_refused():
    proto = small()
    proto.opset_import[0].domain = "ai.onnx.ml"
    refused(proto, ModelError, "which opset")


def test_what_the_checker_refuses_and_the_runtime_too_is_refused():
    proto = small()
    proto.graph.node[0].op_type = "NoSuchOperator"
    refused(proto, ModelError, "no valid ONNX model", "NoSuchOperator")
    proto = small()
    proto.graph.node[0].input[1] = "missing"
    refused(proto, ModelError, "no valid ONNX model", "missing")


def test_an_op_type_that_is_not_utf8_is_refused():
    data = small().SerializeToString().replace(b"Relu", b"R\xff\xfeu")
    refused(data, ModelError)


def test_a_model_that_only_the_checker_dislikes_is_read():
    proto = small()
    first, second = list(proto.graph.node)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in (second, first)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)  # not in topological order
    assert len(read(proto).proto.graph.node) == 2


def test_missing_shapes_are_no_obstacle():
    proto = small()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert read(proto).proto == proto


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model whose weights lie in another file."""
    path = tmp_path / "m.onnx"
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save_model(small(), path, **options)
    return path


def test_weights_in_another_file_are_loaded(outside):
    (weight,) = read(outside).proto.graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight).ravel(), np.arange(6))
    assert weight.data_location == TensorProto.DEFAULT


def test_large_weights_are_kept_beside_the_model_wherever_they_lie(tmp_path):
    values = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    proto = small()
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    proto.graph.output[0].type.tensor_type.shape.ClearField("dim")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "inside.onnx")
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save_model(proto, tmp_path / "outside.onnx", **options)  # empties the weights of the proto
    models = [
        read(tmp_path / "inside.onnx"),
        read((tmp_path / "inside.onnx").read_bytes()),
        read(tmp_path / "outside.onnx"),
    ]
    for model in models:
        np.testing.assert_array_equal(model.weights["w"], values)
        assert not model.proto.graph.initializer[0].raw_data
    assert models[2].content() != models[2].sha256
    (tmp_path / "weights.bin").write_bytes(np.zeros_like(values).tobytes())
    assert read(tmp_path / "outside.onnx").sha256 == models[2].sha256
    assert read(tmp_path / "outside.onnx").content() != models[2].content()


def test_missing_weights_are_named(outside):
    (outside.parent / "weights.bin").unlink()
    refused(outside, UsageError, "'weights.bin'", "missing")


def test_weights_that_are_cut_short_are_named(outside):
    (outside.parent / "weights.bin").write_bytes(b"\x00" * 8)
    refused(outside, ModelError, "'weights.bin'")


def test_weights_outside_the_models_folder_are_not_read(outside):
    secret = outside.parent.parent / "secret.bin"
    secret.write_bytes(b"\x00" * 24)
    proto = onnx.load(outside, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../secret.bin"
    outside.write_bytes(proto.SerializeToString())
    refused(outside, ModelError, "secret.bin")


def test_bytes_cannot_bring_weights_in_another_file(outside):
    refused(outside.read_bytes(), UsageError, "pass the path")


def test_local_functions_are_inlined():
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    proto = small()
    proto.graph.node[1].CopyFrom(helper.make_node("Double", ["c"], ["y"], domain="local"))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.functions.append(double)
    before = proto.SerializeToString(deterministic=True)
    model = read(proto)
    assert [n.op_type for n in model.proto.graph.node] == ["Conv", "Add"]
    assert not model.proto.functions
    assert proto.SerializeToString(deterministic=True) == before


def test_a_model_with_training_operators_is_refused():
    proto = small()
    proto.opset_import.append(helper.make_opsetid("ai.onnx.preview.training", 1))
    node = helper.make_node("Gradient", ["x"], ["g"], "grad", domain="ai.onnx.preview.training", xs=["x"], y="y")
    proto.graph.node.append(node)
    refused(proto, ModelError, "'grad'", "training")
