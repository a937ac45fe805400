"""The model as the user holds it: read once, never changed, canonised on demand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from walking import network

import onnxcam
from onnxcam.errors import UsageError
from onnxcam.model import filled, load
from small_nets import classifier, resnet

WEIGHTS = {"w": np.ones((4, 3, 3, 3), np.float32), "v": np.ones((4, 5), np.float32)}
BODY = "c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v)"


def test_importing_onnxcam_imports_no_framework_and_no_runtime():
    heavy = [
        "torch",
        "torchvision",
        "tensorflow",
        "matplotlib",
        "onnxruntime",
        "cupy",
        "rich",
        "ray",
        "scipy",
        "pandas",
    ]
    code = f"import sys, onnxcam; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_without_onnx_runtime_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the import fails from now on
    with pytest.raises(UsageError, match=r"pip install 'onnxcam\[cpu\]'"):
        load(resnet()).explain(np.zeros((1, 3, 16, 16), np.float32))


def test_the_callers_proto_is_not_changed():
    proto = resnet()
    before = proto.SerializeToString(deterministic=True)
    model = load(proto)
    model.layers()
    model.check()
    model.explain(np.ones((1, 3, 16, 16), np.float32), ["all"])
    assert proto.SerializeToString(deterministic=True) == before


def test_an_input_of_any_kind_is_described():
    model = load(resnet(), preprocess="unit", labels=["a", "b", "c", "d", "e"])
    assert (model.name, model.output, model.spec.name, model.spec.layout) == ("model", "y", "x", "NCHW")
    assert (model.preprocess.name, model.preprocess_source) == ("unit", "asked for")
    assert model.labels.name(4) == "e"
    assert "input x ['N', 3, 16, 16], output y" in repr(model)


def test_a_graph_is_canonised_once_for_each_size_and_set_of_kept_tensors():
    model = load(network(f"(float[N,3,H,W] x) => (float[N,5] y) {{ {BODY} }}", **WEIGHTS))
    assert model.canonical((16, 16)) is model.canonical((16, 16))
    assert model.canonical((16, 16)) is not model.canonical((20, 16))
    assert model.canonical((16, 16), frozenset({"c"})) is not model.canonical((16, 16))


def test_layers_of_an_open_size_are_listed_at_the_size_of_the_preset():
    model = load(network(f"(float[N,3,H,W] x) => (float[N,5] y) {{ {BODY} }}", **WEIGHTS))
    assert model.layers()[0].spatial == (222, 222)
    assert model.layers((32, 20))[0].spatial == (30, 18)


def test_another_output_can_be_explained():
    proto = network(f"(float[N,3,16,16] x) => (float[N,5] y, float[N,5] z) {{ {BODY} z = Neg(y) }}", **WEIGHTS)
    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    first, second = load(proto).explain(x), load(proto, output="z").explain(x)
    np.testing.assert_array_equal(first.logits, -second.logits)
    with pytest.raises(UsageError, match="no output is called 'w': there are y, z"):
        load(proto, output="w")


def test_weights_among_the_inputs_are_none():
    proto = classifier("c = Conv(x, w8x3x3_0) r = Relu(c)", "r#8")
    weight = proto.graph.initializer[0]
    proto.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    assert load(proto).spec.name == "x"


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="there is no preprocessing 'imagnet'; there is imagenet"):
        onnxcam.load(resnet(), preprocess="imagnet")


def test_the_hash_is_that_of_the_file(tmp_path):
    import hashlib

    path = tmp_path / "m.onnx"
    onnx.save(resnet(), path)
    model = load(path)
    assert (model.name, model.sha256) == ("m.onnx", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(("count", "fixed"), [(5, None), (2, 2), (1, 3), (2, 4)])
def test_a_batch_of_fixed_size_is_filled_up_with_its_last_image(count, fixed):
    array = np.arange(count)[:, None]
    whole = filled(array, fixed)
    assert len(whole) == (fixed or count)
    np.testing.assert_array_equal(whole[:count], array)
    assert (whole[count:] == array[-1]).all()
