"""Compiled explanations: the same maps as the array engine, in a file that any ONNX runtime can take.

Oracle, unless a test says otherwise: the array engine in float64 over the reference evaluator. A compiled file computes
in float32, forward and backward; on these small networks its maps differ by up to 1e-5 of their largest value, and by
5e-5 on the fifty layers of the shipped model, where the array engine in float32 differs as much.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from walking import network

import onnxcam
from onnxcam.cli import main
from onnxcam.compile import Compiled
from onnxcam.errors import ModelError, OnnxcamError, UsageError
from small_nets import NETS, classifier, mobilenet, resnet, unet

ROOT = Path(__file__).resolve().parent.parent
SMALL, DEEP = 1e-5, 5e-5


def images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, *(shape or (3, 16, 16)))).astype(np.float32)


def load(net: onnx.ModelProto) -> onnxcam.Model:
    return onnxcam.load(net, preprocess="none")


def session(model: onnx.ModelProto | Path, optimised: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: onnx.ModelProto | Path, x: np.ndarray, targets: Any = None, optimised: bool = True
) -> dict[str, np.ndarray]:
    made = session(model, optimised)
    feeds = {made.get_inputs()[0].name: x}
    if targets is not None:
        feeds[made.get_inputs()[1].name] = np.broadcast_to(np.array(targets, np.int64), (len(x), np.shape(targets)[-1]))
    return dict(zip([o.name for o in made.get_outputs()], made.run(None, feeds), strict=True))


def maps(compiled: Compiled, x: np.ndarray, targets: Any = None, optimised: bool = True) -> dict[str, np.ndarray]:
    """Maps by layer."""
    out = run(compiled.proto, x, targets, optimised)
    return {layer: out[name] for layer, name in compiled.maps.items()}


def agree(ours: dict[str, np.ndarray], exact: dict[str, np.ndarray], tolerance: float = SMALL) -> None:
    assert list(ours) == list(exact)
    for layer, map_ in exact.items():
        assert ours[layer].shape == map_.shape
        np.testing.assert_allclose(ours[layer], map_, rtol=0, atol=tolerance * np.abs(map_).max(), err_msg=layer)


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return NETS[request.param]()


# -- the same maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimised", [True, False], ids=["optimised", "as written"])
def test_a_compiled_explanation_gives_the_maps_of_explain(net: onnx.ModelProto, optimised: bool) -> None:
    """For two images at once, at all suggested layers, for the predicted class."""
    model, x = load(net), images(2)
    ours = maps(onnxcam.compile(model, ["suggested"]), x, [-1], optimised)
    agree(ours, model.explain(x, ["suggested"], engine="numpy", dtype="float64").maps)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {}),
        ("relevance-cam", {"start": "one-hot"}),
        ("relevance-cam", {"composite": "epsilon_plus"}),
        ("lrp", {"composite": "epsilon_plus", "start": "logit"}),
    ],
)
def test_methods_composites_and_starts_are_those_of_explain(method: str, options: dict[str, str]) -> None:
    if unknown := [
        v for k, v in options.items() if v not in {"composite": onnxcam.COMPOSITES, "start": onnxcam.STARTS}[k]
    ]:
        pytest.skip(f"there is no {unknown[0]}")
    model, x = load(resnet()), images(2)
    ours = maps(onnxcam.compile(model, ["suggested"], method=method, **options), x, [-1])
    agree(ours, model.explain(x, ["suggested"], method=method, engine="numpy", dtype="float64", **options).maps)


def test_the_shipped_model_compiles_and_gives_the_maps_of_explain(shipped_model: Path, chelsea: Path) -> None:
    model = onnxcam.load(shipped_model)
    x = model.preprocess.apply(Image.open(chelsea), model.spec).array
    compiled = onnxcam.compile(model, ["auto", "suggested"])
    out = run(compiled.proto, x, [-1])
    assert int(out["logits"].argmax()) == int(out["classes"][0, 0]) == 282  # tiger cat
    ours = {layer: out[name] for layer, name in compiled.maps.items()}
    agree(ours, model.explain(x, ["auto", "suggested"], engine="numpy", dtype="float64").maps, DEEP)


def test_logits_are_those_of_the_users_file(net: onnx.ModelProto) -> None:
    x = images(2)
    np.testing.assert_allclose(
        run(onnxcam.compile(load(net)).proto, x, [-1])["logits"], run(net, x)["y"], rtol=0, atol=1e-5
    )


# -- targets -----------------------------------------------------------------------------------------------------------


def test_the_input_targets_asks_for_classes_and_minus_one_is_the_predicted_one() -> None:
    model, x = load(resnet()), images(3)
    compiled = onnxcam.compile(model, slots=2)
    predicted = run(resnet(), x)["y"].argmax(1)
    out = run(compiled.proto, x, [[3, -1]])
    np.testing.assert_array_equal(out["classes"], np.stack([np.full(3, 3), predicted], axis=1))
    agree(
        maps(compiled, x, [[3, -1]]), model.explain(x, targets=[3, "predicted"], engine="numpy", dtype="float64").maps
    )


def test_each_image_may_ask_for_another_class() -> None:
    model, x = load(resnet()), images(3)
    ours = maps(onnxcam.compile(model), x, [[0], [4], [2]])["auto"]
    for i, target in enumerate((0, 4, 2)):
        agree(
            {"auto": ours[i : i + 1]}, model.explain(x[i : i + 1], targets=target, engine="numpy", dtype="float64").maps
        )


def test_three_targets_at_once_are_three_targets_one_by_one(net: onnx.ModelProto) -> None:
    """Oracle: the same compiler for one target. What is shared among targets is the same; the rest is computed in
    another order, hence 1e-5."""
    model, x = load(net), images(2)
    one, three = onnxcam.compile(model), onnxcam.compile(model, slots=3)
    single = [maps(one, x, [t])["auto"] for t in (4, 0, 2)]
    agree(maps(three, x, [4, 0, 2]), {"auto": np.concatenate(single, axis=1)})


def test_targets_can_be_fixed_in_the_file() -> None:
    labels = ["ant", "bee", "cat", "dog", "eel"]
    model, x = onnxcam.load(resnet(), preprocess="none", labels=labels), images(2)
    compiled = onnxcam.compile(model, targets=["cat", 0, "top2"])
    assert [i.name for i in compiled.proto.graph.input] == ["x"]
    out = run(compiled.proto, x)
    best = np.argsort(-run(resnet(), x)["y"], axis=1)[:, :2]
    np.testing.assert_array_equal(out["classes"], np.concatenate([np.tile([2, 0], (2, 1)), best], axis=1))
    for i in range(2):
        exact = model.explain(x[i : i + 1], targets=out["classes"][i].tolist(), engine="numpy", dtype="float64").maps[
            "auto"
        ]
        for t, target in enumerate(out["classes"][i]):
            exact = model.explain(x[i : i + 1], targets=int(target), engine="numpy", dtype="float64").maps["auto"]
            agree({"auto": out[compiled.maps["auto"]][i : i + 1, t : t + 1]}, {"auto": exact})


def test_a_single_logit_speaks_for_two_classes() -> None:
    net = classifier("c0 = Conv(x, w8x3x3_0) r0 = Relu(c0)", "r0#8", "(float[N,3,16,16] x) => (float[N,1] y)")
    for tensor in net.graph.initializer:
        if tensor.name.startswith("fc_"):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array[..., :1]), tensor.name))
    model, x = load(net), images(4)
    compiled = onnxcam.compile(model, slots=2)
    out = run(compiled.proto, x, [[-1, 0]])
    assert out["logits"].shape == (4, 1)
    np.testing.assert_array_equal(out["classes"][:, 0], (out["logits"][:, 0] > 0).astype(int))
    for i, target in enumerate(out["classes"][:, 0]):
        exact = model.explain(x[i : i + 1], targets=int(target), engine="numpy", dtype="float64").maps
        agree({"auto": out[compiled.maps["auto"]][i : i + 1, :1]}, exact)


# -- batch and size ----------------------------------------------------------------------------------------------------


def test_a_batch_of_two_is_two_batches_of_one(net: onnx.ModelProto) -> None:
    """Oracle: the same file. Runtimes may block a larger batch otherwise, hence 1e-5."""
    compiled, x = onnxcam.compile(load(net), ["suggested"]), images(2)
    both, first, second = (maps(compiled, part, [-1]) for part in (x, x[:1], x[1:]))
    agree(both, {layer: np.concatenate([first[layer], second[layer]]) for layer in both})


def test_a_fixed_batch_stays_fixed() -> None:
    net = classifier("c0 = Conv(x, w8x3x3_0) r0 = Relu(c0)", "r0#8", "(float[2,3,16,16] x) => (float[2,5] y)")
    compiled = onnxcam.compile(load(net))
    assert {v.name: _dims(v)[0] for v in (*compiled.proto.graph.input, *compiled.proto.graph.output)} == {
        "x": 2, "targets": 2, "logits": 2, "classes": 2, compiled.maps["auto"]: 2,
    }  # fmt: skip
    agree(maps(compiled, images(2), [-1]), load(net).explain(images(2), engine="numpy", dtype="float64").maps)


def test_an_open_size_is_fixed_to_the_one_asked_for() -> None:
    model = load(_open_size())
    compiled = onnxcam.compile(model, size=(17, 23))
    assert _dims(compiled.proto.graph.input[0]) == ["N", 3, 17, 23]
    agree(
        maps(compiled, images(2, 3, 17, 23), [-1]),
        model.explain(images(2, 3, 17, 23), engine="numpy", dtype="float64").maps,
    )


def _open_size() -> onnx.ModelProto:
    body = "c0 = Conv<strides=[2,2]>(x, w8x3x3_0) r0 = Relu(c0) c1 = Conv<strides=[2,2]>(r0, w8x8x3_1) r1 = Relu(c1)"
    return classifier(body, "r1#8", "(float[N,3,H,W] x) => (float[N,5] y)")


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


# -- for the eye -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (225, 57)])
def test_upsampled_maps_are_bilinear_with_pixel_centres_aligned(size: tuple[int, int]) -> None:
    """Oracle: Pillow's bilinear filter, which for enlarging is just that, in float32. ONNX Runtime rounds the weights
    of the four neighbours to float32 at another place: 1e-5."""
    model, x = load(_open_size()), images(2, 3, *size)
    plain = maps(onnxcam.compile(model, ["suggested"], slots=2, size=size), x, [-1, 0])
    large = maps(onnxcam.compile(model, ["suggested"], slots=2, size=size, upsample=True), x, [-1, 0])
    for layer, map_ in plain.items():
        pictures = [
            Image.fromarray(m).resize(size[::-1], Image.Resampling.BILINEAR) for m in map_.reshape(-1, *map_.shape[2:])
        ]
        agree({layer: large[layer]}, {layer: np.stack(pictures).reshape(*map_.shape[:2], *size)})


def test_normalised_maps_run_from_zero_to_one(net: onnx.ModelProto) -> None:
    x = images(2)
    plain = maps(onnxcam.compile(load(net), ["suggested"], slots=2), x, [-1, 0])
    ours = maps(onnxcam.compile(load(net), ["suggested"], slots=2, normalise=True), x, [-1, 0])
    low = {layer: m.min((2, 3), keepdims=True) for layer, m in plain.items()}
    span = {layer: m.max((2, 3), keepdims=True) - low[layer] for layer, m in plain.items()}
    # What is lost where a map is nearly constant is its own largest value, not 1.
    for layer, m in plain.items():
        noise = SMALL * np.abs(m).max() / span[layer].min()
        agree({layer: ours[layer]}, {layer: (m - low[layer]) / span[layer]}, max(noise, SMALL))
        assert ours[layer].min() == 0 and ours[layer].max() == 1


def test_a_constant_map_is_normalised_to_zeros() -> None:
    """An image of zeros through layers without biases: no activation, so no relevance and no span."""
    net = classifier("c0 = Conv(x, w8x3x3_0) r0 = Relu(c0)", "r0#8")
    ours = maps(onnxcam.compile(load(net), normalise=True, upsample=True), np.zeros((1, 3, 16, 16), np.float32), [-1])
    np.testing.assert_array_equal(ours["auto"], np.zeros((1, 1, 16, 16)))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_compiled_model_passes_the_checker_with_full_shape_inference(net: onnx.ModelProto) -> None:
    for options in ({}, {"slots": 3}, {"targets": ["top2", 0]}, {"upsample": True, "normalise": True}):
        proto = onnxcam.compile(load(net), ["suggested"], **options).proto
        onnx.checker.check_model(proto, full_check=True)
        assert {n.domain for n in proto.graph.node} <= {"", "ai.onnx"}


def test_outputs_have_the_shapes_that_are_declared(net: onnx.ModelProto) -> None:
    compiled = onnxcam.compile(load(net), ["suggested"], slots=2)
    out = run(compiled.proto, images(2), [-1, 0])
    declared = {v.name: tuple(2 if d == "N" else d for d in _dims(v)) for v in compiled.proto.graph.output}
    assert declared == {name: value.shape for name, value in out.items()}


def test_metadata_says_what_the_file_explains_and_how() -> None:
    model = onnxcam.load(resnet(), preprocess="imagenet", labels=["a", "b", "c", "d", "e"])
    proto = onnxcam.compile(model, ["R4", "R2"], ["b", "predicted"], upsample=True).proto
    found = {p.key.removeprefix("onnxcam."): p.value for p in proto.metadata_props}
    assert (found["method"], found["composite"], found["start"]) == ("relevance-cam", "relevance_cam", "contrast")
    assert json.loads(found["layers"]) == {"R4": "r4", "R2": "r2"}
    assert set(json.loads(found["maps"]).values()) <= {o.name for o in proto.graph.output}
    assert json.loads(found["targets"]) == [1, -1]
    assert json.loads(found["map_values"]) == {"upsampled": True, "normalised": False}
    assert found["source_sha256"] == model.sha256
    assert json.loads(found["preprocess"]) == "imagenet"
    assert json.loads(found["labels"]) == ["a", "b", "c", "d", "e"]
    assert found["version"] == proto.producer_version == onnxcam.__version__
    assert proto.producer_name == "onnxcam"


def test_a_compiled_file_survives_saving_and_loading_twice_in_a_fresh_process(tmp_path: Path) -> None:
    """Bit for bit: the same runtime on the same file, and on the file as the onnx package writes it again."""
    x = images(2)
    compiled = onnxcam.compile(load(unet()), ["suggested"], slots=2)
    compiled.save(tmp_path / "first.onnx")
    np.save(tmp_path / "x.npy", x)
    script = """
import numpy as np, onnx, onnxruntime, sys
onnx.save(onnx.load("first.onnx"), "second.onnx")
for name in ("first", "second"):
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    x = np.load("x.npy")
    out = session.run(None, {"x": x, "targets": np.array([[-1, 0]] * len(x))})
    np.savez(name, **dict(zip([o.name for o in session.get_outputs()], out)))
assert not any(m.startswith("onnxcam") for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    here = run(compiled.proto, x, [-1, 0])
    for name in ("first.npz", "second.npz"):
        there = np.load(tmp_path / name)
        assert set(there) == set(here)
        for output in here:
            np.testing.assert_array_equal(there[output], here[output])


def test_weights_are_not_stored_twice(shipped_model: Path) -> None:
    """All suggested layers of the shipped model: 18 MB of weights, and less than 2 % more for everything else."""
    compiled = onnxcam.compile(onnxcam.load(shipped_model), ["suggested"])
    assert compiled.proto.ByteSize() < 1.02 * shipped_model.stat().st_size


def test_only_small_constants_are_added(net: onnx.ModelProto) -> None:
    def bytes_in(proto: onnx.ModelProto) -> int:
        return sum(t.ByteSize() for t in proto.graph.initializer)

    # Axes, sizes and class numbers; in a small network they weigh more than 2 %.
    assert bytes_in(onnxcam.compile(load(net), ["suggested"], slots=3).proto) < bytes_in(net) + 4096


@pytest.mark.parametrize("opset", [9, 13, 16, "newest"])
def test_models_of_old_and_new_opsets_compile(opset: int | str) -> None:
    """The newest is the newest that both onnx and ONNX Runtime know; below 17 the opset is raised, and that is said."""
    net, x = resnet(), images(2)
    version = _newest() if opset == "newest" else int(opset)
    net.opset_import[0].version = version
    model = load(net)
    compiled = onnxcam.compile(model, ["suggested"])
    used = next(o.version for o in compiled.proto.opset_import if o.domain == "")
    assert used == max(version, 17)
    assert compiled.notes == (
        [f"opset raised from {version} to 17, which the explanation needs"] if version < 17 else []
    )
    onnx.checker.check_model(compiled.proto, full_check=True)
    agree(maps(compiled, x, [-1]), model.explain(x, ["suggested"], engine="numpy", dtype="float64").maps)


def _newest() -> int:
    for version in range(onnx.defs.onnx_opset_version(), 17, -1):
        model = network("(float[1] x) => (float[1] y) { y = Relu(x) }", opset=version)
        try:
            session(model)
        except Exception:
            continue
        return version
    raise AssertionError("ONNX Runtime knows no opset after 17")


def test_compiling_changes_neither_the_model_nor_what_it_explains() -> None:
    net, x = mobilenet(), images(1)
    before = net.SerializeToString()
    model = load(net)
    maps_before = model.explain(x, ["suggested"], engine="numpy").maps
    first = onnxcam.compile(model, ["suggested"])
    assert onnxcam.compile(model, ["suggested"]).proto.SerializeToString() == first.proto.SerializeToString()
    agree(model.explain(x, ["suggested"], engine="numpy").maps, maps_before, 0)
    assert net.SerializeToString() == before


def test_names_of_the_users_file_are_kept_and_ours_keep_out_of_their_way() -> None:
    """A file that already has tensors called as we would call ours."""
    net = classifier("targets = Conv(x, w8x3x3_0) logits = Relu(targets) map_C = Relu(logits)", "map_C#8")
    net.graph.node[2].name = "C"
    model, x = load(net), images(2)
    compiled = onnxcam.compile(model, ["C"])
    assert len({v.name for v in (*compiled.proto.graph.input, *compiled.proto.graph.output)}) == 5
    assert set(compiled.maps.values()) <= {o.name for o in compiled.proto.graph.output}
    agree(maps(compiled, x, [-1]), model.explain(x, ["C"], engine="numpy", dtype="float64").maps)


@pytest.mark.parametrize("composite", ["relevance_cam", "epsilon_gamma_box", "gradient"])
def test_no_transposed_convolution_shares_its_weight_with_a_convolution(net: onnx.ModelProto, composite: str) -> None:
    """OpenVINO is silently wrong where they do, also where one of them is the user's; see `_own_copy`."""
    nodes = onnxcam.compile(load(net), ["suggested"], method="lrp", composite=composite).proto.graph.node
    readers = {op: {n.input[1] for n in nodes if n.op_type == op} for op in ("Conv", "ConvTranspose")}
    assert not readers["Conv"] & readers["ConvTranspose"]


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_a_compiled_file_runs_in_pure_numpy(name: str) -> None:
    """By onnx.reference, which computes in float32 and sums in another order: 1e-4."""
    model, x = load(NETS[name]()), images(1, 3, 16, 16)
    compiled = onnxcam.compile(model, ["auto"])
    evaluator = ReferenceEvaluator(compiled.proto)
    out = dict(zip(evaluator.output_names, evaluator.run(None, {"x": x, "targets": np.array([[-1]])}), strict=True))
    agree({"auto": out[compiled.maps["auto"]]}, model.explain(x, engine="numpy", dtype="float64").maps, 1e-4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/deploy/prepare.py makes of a small network."""
    work = tmp_path_factory.mktemp("deploy")
    onnx.save(resnet(), work / "net.onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(work / "a.png")
    _script("prepare.py", work / "net.onnx", work / "a.png", work)
    return work


def _script(name: str, *arguments: Any, with_: Sequence[str] = (sys.executable,)) -> str:
    command = [*with_, ROOT / "examples" / "deploy" / name, *arguments]
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, timeout=120).stdout


def _openvino() -> str | None:
    python = os.environ.get("ONNXCAM_OPENVINO", ROOT.parent / "venv" / "openvino" / "bin" / "python")
    return str(python) if Path(python).exists() else None


@pytest.mark.parametrize("runtime", ["python", "reference", "openvino", "node", "chromium"])
def test_the_deployment_examples_agree_to_four_digits(runtime: str, prepared: Path) -> None:
    """Relative error of each map as the scripts print it, against float64."""
    has_web = (ROOT / "examples" / "deploy" / "node" / "node_modules").is_dir()
    if runtime == "python":
        said = _script("python_onnxruntime.py", prepared)
    elif runtime == "reference":
        said = _script("reference_run.py", prepared)
    elif runtime == "openvino":
        python = _openvino()
        if python is None:
            pytest.skip("no OpenVINO: its Python goes into ONNXCAM_OPENVINO")
        said = _script("openvino_run.py", prepared, with_=[python])
    elif not has_web or not shutil.which(runtime):
        pytest.skip(f"no {runtime}, or `npm install` was not run in examples/deploy/node")
    elif runtime == "node":
        said = _script("node/run.mjs", prepared, with_=["node"])
    else:
        said = _script("browser/serve.py", prepared, "chromium")
    errors = [float(e) for e in re.findall(r"relative error (\S+)", said)]
    assert len(errors) == len(json.loads((prepared / "about.json").read_text())["maps"])
    assert max(errors) < 1e-4


# -- what cannot be compiled -------------------------------------------------------------------------------------------


def _foreign() -> onnx.ModelProto:
    return classifier("c0 = Conv(x, w8x3x3_0) r0 = Relu(c0) d = Det(r0) c1 = Conv(r0, w8x8x3_1)", "c1#8")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"layers": ["nowhere"]}, UsageError, "nowhere"),
        ({"slots": 0}, UsageError, "0 targets"),
        ({"targets": []}, UsageError, "no target to explain"),
        ({"targets": [5]}, UsageError, "classes run from 0 to 4"),
        ({"targets": ["top9"]}, UsageError, "5 classes"),
        ({"targets": ["cat"]}, UsageError, "have no names"),
        ({"method": "magic"}, UsageError, "magic"),
        ({"composite": "magic"}, UsageError, "magic"),
        ({"start": "magic"}, UsageError, "magic"),
    ],
)
def test_what_was_asked_for_wrongly_is_said_in_one_line(
    options: dict[str, Any], error: type[OnnxcamError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        onnxcam.compile(load(resnet()), **options)
    assert "\n" not in str(caught.value)


def test_an_operator_without_an_adjoint_is_named_with_its_node() -> None:
    net = network(
        "(float[N,3,6,6] x) => (float[N,4] y) { c = Conv(x, w) r = Relu(c) d = Det(r) y = Gemm(d, v) }",
        w=np.ones((4, 3, 3, 3), np.float32), v=np.ones((4, 4), np.float32),
    )  # fmt: skip
    with pytest.raises(ModelError, match="Det") as caught:
        onnxcam.compile(load(net), ["r"])
    assert "\n" not in str(caught.value)


def test_an_opset_that_cannot_be_raised_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's converter gives up on files that it does not understand, at length."""

    def give_up(*_: Any) -> None:
        raise RuntimeError("[ShapeInferenceError] no adapter for Upsample\nat line 1\nat line 2")

    net = resnet()
    net.opset_import[0].version = 11
    monkeypatch.setattr(onnx.version_converter, "convert_version", give_up)
    with pytest.raises(ModelError, match=r"opset 11.*17.*no adapter for Upsample.*--engine numpy") as caught:
        onnxcam.compile(load(net))
    assert "\n" not in str(caught.value)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(resnet(), "net.onnx")
    return tmp_path


def test_the_command_writes_the_model_and_says_what_goes_in_and_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("compile net.onnx -o out.onnx -l suggested --targets 2".split()) == 0
    said = capsys.readouterr().out
    proto = onnx.load("out.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        assert re.search(rf"\b{re.escape(value.name)}\b.*\b{'x'.join(map(str, _dims(value)))}\b", said)
    assert "opset 17" in said and "wrote out.onnx" in said
    expected = load(resnet()).explain(images(1), ["suggested"], [0, 3], engine="numpy", dtype="float64").maps
    found = json.loads({p.key: p.value for p in proto.metadata_props}["onnxcam.maps"])
    out = run(Path("out.onnx"), images(1), [0, 3])
    agree({layer: out[name] for layer, name in found.items()}, expected)


def test_the_command_says_that_it_raised_the_opset(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = resnet()
    net.opset_import[0].version = 11
    onnx.save(net, "old.onnx")
    assert main("compile old.onnx -o out.onnx".split()) == 0
    assert "opset raised from 11 to 17" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("net.onnx", 2, "say where to write"),
        ("net.onnx -o net.onnx", 2, "stays as it is"),
        ("net.onnx -o ./link.onnx", 2, "stays as it is"),
        ("net.onnx -o .", 2, "is a folder"),
        ("net.onnx -o no/where.onnx", 2, "no folder"),
        ("missing.onnx -o out.onnx", 2, "no such file"),
        ("net.onnx -o out.onnx --target 9", 2, "classes run from 0 to 4"),
        ("net.onnx -o out.onnx --targets 0", 2, "no number of targets"),
        ("net.onnx -o out.onnx --targets 2 --target 1", 2, "not allowed with"),
        ("net.onnx --triton net.onnx", 2, "cannot write"),
    ],
)
def test_the_command_fails_with_one_line_and_writes_nothing(
    arguments: str, code: int, says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "link.onnx").symlink_to(place / "net.onnx")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    try:
        assert main(f"compile {arguments}".split()) == code
    except SystemExit as exit_:  # what argparse itself refuses
        assert exit_.code == code
    said = capsys.readouterr()
    assert said.out == "" and says in said.err and said.err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


# -- Triton ------------------------------------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Any]:
    """Enough of protobuf's text format for a config.pbtxt: fields, lists of scalars, lists of messages."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', text)

    def value() -> Any:
        token = tokens.pop(0)
        if token == "[":
            items = []
            while tokens[0] != "]":
                items.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return items
        if token == "{":
            return message("}")
        return json.loads(token) if token[0] == '"' or token.lstrip("-").isdigit() else token

    def message(end: str | None) -> dict[str, Any]:
        fields = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            assert name.isidentifier() and name not in fields
            if tokens[0] == ":":
                tokens.pop(0)
            fields[name] = value()
        if end:
            tokens.pop(0)
        return fields

    return message(None)


def test_triton_gets_a_repository_whose_configuration_is_that_of_the_model(place: Path) -> None:
    """Oracle: the file as ONNX Runtime reads it. The batch is open, so Triton's dims leave the first axis out."""
    assert main("compile net.onnx --triton repository -l suggested --targets 3 -o where.onnx".split()) == 0
    config = parse((place / "repository/where/config.pbtxt").read_text())
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("where", "onnxruntime_onnx", 8)
    model = session(place / "repository/where/1/model.onnx")
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for side, members in (("input", model.get_inputs()), ("output", model.get_outputs())):
        assert config[side] == [{"name": m.name, "data_type": types[m.type], "dims": m.shape[1:]} for m in members]
    assert (place / "where.onnx").read_bytes() == (place / "repository/where/1/model.onnx").read_bytes()


def test_a_fixed_batch_is_one_of_tritons_dims(place: Path) -> None:
    net = classifier("c0 = Conv(x, w8x3x3_0) r0 = Relu(c0)", "r0#8", "(float[1,3,16,16] x) => (float[1,5] y)")
    onnx.save(net, "fixed.onnx")
    assert main("compile fixed.onnx --triton repository --target 1".split()) == 0
    config = parse((place / "repository/fixed-explained/config.pbtxt").read_text())
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 3, 16, 16]}]
    assert all(output["dims"][0] == 1 for output in config["output"])
