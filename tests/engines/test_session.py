"""Sessions: which providers run a model, what is said of those that do not, threads, and IO binding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from walking import network

from onnxcam import load
from onnxcam.engines import session as sessions
from onnxcam.engines.session import CPU, Provider, RuntimeSession, Settings, available
from onnxcam.errors import ModelError, UsageError
from small_nets import resnet

CUDA, TENSORRT, OPENVINO = (f"{name}ExecutionProvider" for name in ("CUDA", "Tensorrt", "OpenVINO"))
X = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


def parsed(providers: Any) -> list[tuple[str, dict[str, str]]]:
    return [(p.name, dict(p.options)) for p in Settings.of(providers).providers]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("cpu", [(CPU, {})]),
        ("CPU", [(CPU, {})]),
        (CPU, [(CPU, {})]),
        ("cuda,cpu", [(CUDA, {}), (CPU, {})]),
        ("cuda, cpu,", [(CUDA, {}), (CPU, {})]),
        (["cuda", "tensorrt,cpu"], [(CUDA, {}), (TENSORRT, {}), (CPU, {})]),
        (("cuda", "cpu", "cuda"), [(CUDA, {}), (CPU, {})]),
        ("cuda:1", [(CUDA, {"device_id": "1"})]),
        ("openvino:gpu", [(OPENVINO, {"device_type": "GPU"})]),
        ((CUDA, {"device_id": 1}), [(CUDA, {"device_id": "1"})]),
        ([("cuda", {"device_id": 1}), "cpu"], [(CUDA, {"device_id": "1"}), (CPU, {})]),
        ("xnnpack", [("XnnpackExecutionProvider", {})]),
        ("auto", [("auto", {})]),
    ],
)
def test_providers_are_named_as_users_of_onnx_runtime_name_them(written, meant):
    assert parsed(written) == meant


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("cudo", "did you mean cuda"),
        (["cpu", "abacus"], "abacus is not available"),
        ("cpu:1", "no devices"),
        ("auto:1", "no devices"),
        ("cuda:first", "a number"),
        ("", "name one"),
        ([], "name one"),
        ([7], "7 is no execution provider"),
    ],
)
def test_what_is_no_provider_is_refused(written, says):
    with pytest.raises(UsageError, match=says):
        Settings.of(written)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_threads_is_refused(threads):
    with pytest.raises(UsageError, match="number of threads"):
        Settings.of("cpu", threads)


def chosen(written: Any, present: list[str]) -> tuple[list[str], list[str]]:
    found, notes = available(Settings.of(written).providers, present)
    return [p.name for p in found], notes


def test_a_provider_that_is_not_there_is_passed_over_aloud():
    names, notes = chosen("cuda,cpu", [CPU])
    assert names == [CPU]
    assert len(notes) == 1 and CUDA in notes[0] and f"{CPU} runs the model" in notes[0] and "onnxcam[gpu]" in notes[0]


def test_auto_takes_the_fastest_there_is_without_a_word():
    assert chosen("auto", [TENSORRT, CUDA, CPU]) == ([CUDA, CPU], [])
    assert chosen("auto", ["AzureExecutionProvider", CPU]) == ([CPU], [])


def test_without_any_provider_the_error_says_what_there_is_and_what_to_install():
    with pytest.raises(UsageError, match=rf"{CUDA} is not available here: there are {CPU}; .*onnxcam\[gpu\]"):
        chosen("cuda,tensorrt", [CPU])


def opened(**options: Any) -> RuntimeSession:
    return RuntimeSession(resnet(), ["logits"], **options)


class NoDriver:
    """ONNX Runtime as a build for GPUs is on a machine without one: it has the provider, and goes on without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def InferenceSession(self, model: bytes, options: Any, providers: Any) -> Any:
        assert providers[0] == (CUDA, {"device_id": "1"})
        return onnxruntime.InferenceSession(model, options, providers=[CPU])


def test_a_provider_that_onnx_runtime_drops_silently_is_named(monkeypatch):
    monkeypatch.setattr(sessions, "onnxruntime", NoDriver)
    session = opened(settings=Settings((Provider(CUDA, (("device_id", "1"),)),)))
    assert session.providers == [CPU]
    assert len(session.notes) == 1 and f"could not start {CUDA}" in session.notes[0]
    assert session.run({"x": X})["logits"].shape == (2, 5)


def test_io_binding_changes_no_value():
    plain, bound = (opened(bound=b).run({"x": X[:, ::1]}) for b in (False, True))
    np.testing.assert_array_equal(bound["logits"], plain["logits"])


def test_io_binding_takes_arrays_that_are_not_contiguous():
    flipped = X[..., ::-1]
    plain, bound = (opened(bound=b).run({"x": flipped}) for b in (False, True))
    np.testing.assert_array_equal(bound["logits"], plain["logits"])


def test_io_binding_gives_the_maps_of_a_recorded_explanation(monkeypatch):
    layers = ["suggested"]
    plain = load(resnet()).explain(X, layers, ["top3", 1])
    monkeypatch.setattr(RuntimeSession, "run", lambda self, feeds: dict(zip(self._taps, self._run_bound(feeds))))  # noqa: B905
    bound = load(resnet()).explain(X, layers, ["top3", 1])
    for name, heat in plain.maps.items():
        np.testing.assert_array_equal(bound.maps[name], heat)
    np.testing.assert_array_equal(bound.targets, plain.targets)


def test_an_input_that_does_not_fit_is_one_line():
    for bound in (False, True):
        with pytest.raises(ModelError, match="cannot run the model on this input") as error:
            opened(bound=bound).run({"x": X[:, :, :8]})
        assert "\n" not in str(error.value)


def test_threads_are_set_where_asked_for():
    def threads(number: int | None) -> int:
        return opened(settings=Settings.of("cpu", number))._session.get_session_options().intra_op_num_threads

    assert threads(2) == 2
    assert threads(None) == onnxruntime.SessionOptions().intra_op_num_threads


def test_outputs_keep_their_names_where_no_other_is_given():
    assert set(RuntimeSession(resnet()).run({"x": X})) == {"y"}


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
def test_an_explanation_says_which_provider_ran_and_which_did_not(engine):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    found = load(resnet()).explain(X, providers=["cuda", "cpu"], threads=1, engine=engine)
    assert found.options["providers"] == [CPU]
    assert found.options["threads"] == 1
    assert sum(CUDA in warning for warning in found.warnings) == 1


def test_weights_that_no_message_holds_go_beside_the_model(monkeypatch):
    w = np.random.default_rng(0).standard_normal((64, 3, 5, 5)).astype(np.float32)
    model = network("(float[1,3,8,8] x) => (float y) { y = Conv(x, w) }", w=w)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    whole = RuntimeSession(model, ["y"]).run({"x": x})["y"]
    monkeypatch.setattr(sessions, "WHOLE", 1000)
    np.testing.assert_array_equal(RuntimeSession(model, ["y"]).run({"x": x})["y"], whole)
    assert model.ByteSize() < 2000 < w.nbytes
