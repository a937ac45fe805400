"""Sessions: ONNX Runtime evaluates a model on the execution providers asked for, in the precision of the file.

Providers are named as ONNX Runtime users name them, in order of preference. One that is not to be had is passed over
in favour of the next, and what was passed over is said in `notes`. Where the first provider is a GPU, inputs and
outputs are bound to it, so that each is copied once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcam.errors import ModelError, UsageError
from onnxcam.runtime import give_back_memory, onnxruntime
from onnxcam.weights import take

WHOLE = 1_500_000_000  # bytes of weights up to which a model is handed over in one piece: a message holds 2 GB

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
}
AUTO = "auto"
FASTEST = tuple(PROVIDERS[name] for name in ("cuda", "rocm", "migraphx", "dml", "cpu"))  # what `auto` tries, in turn
# How to get a provider; where that is not listed, by a build of ONNX Runtime that has it.
INSTALL = {
    CPU: "pip install 'onnxcam[cpu]'",
    "CUDAExecutionProvider": "pip install 'onnxcam[gpu]'",
    "TensorrtExecutionProvider": "pip install 'onnxcam[gpu]'",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
    "DmlExecutionProvider": "pip install onnxruntime-directml",
}
# Where a provider keeps tensors, for those with a memory of their own that outputs can be bound to.
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
GPUS = ("ROCMExecutionProvider", "MIGraphXExecutionProvider", "DmlExecutionProvider")  # others on a GPU

ProviderLike = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Provider:
    """An execution provider by its full name, with its options as ONNX Runtime takes them: pairs of texts."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Settings:
    """Where and how sessions run: providers in order of preference, and threads within one op (None: as many as ONNX
    Runtime likes)."""

    providers: tuple[Provider, ...] = (Provider(CPU),)
    threads: int | None = None

    @classmethod
    def of(cls, providers: ProviderLike | Sequence[ProviderLike] = "cpu", threads: int | None = None) -> Settings:
        """Settings from what users write.

        Args:
            providers: short or full names, `auto`, a list with commas, `cuda:1` for a device, `openvino:GPU` for a
                device type; or (name, options) as ONNX Runtime takes them; or several of these.
            threads: 1 or more.

        Raises:
            UsageError: there is no such provider, or no such number of threads.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise UsageError(f"{threads!r} is no number of threads: give 1 or more, or leave it to ONNX Runtime")
        listed = [providers] if isinstance(providers, str) or _is_pair(providers) else list(providers)
        parts: list[Any] = [p for item in listed for p in (item.split(",") if isinstance(item, str) else [item])]
        found = tuple(dict.fromkeys(p for part in parts for p in _parsed(part)))
        if not found:
            raise UsageError("there is no execution provider to run on: name one, cpu say")
        return cls(found, threads)

    @property
    def on_gpu(self) -> bool:
        """Whether the provider that is preferred computes on a GPU."""
        return self.providers[0].name in DEVICES or self.providers[0].name in GPUS


class RuntimeSession:
    """ONNX Runtime on a model whose outputs are the taps.

    Args:
        model: a model as `taps.expose` makes it, its bytes, or its path; of one above 1.5 GB the weights are taken.
        taps: names for its outputs, in order; by default their own.
        settings: where and how to run.
        bound: copy inputs and outputs by IO binding; by default where the first provider has a memory of its own.

    Attributes:
        providers: full names of the providers that run the model, in the session's order.
        notes: sentences on providers that were asked for and do not run it.

    Raises:
        UsageError: onnxruntime is not installed, or none of the providers is available in it.
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes | Path,
        taps: Sequence[str] | None = None,
        settings: Settings | None = None,
        bound: bool | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ):
        ort = onnxruntime()
        settings = settings or Settings()
        chosen, self.notes = available(settings.providers, ort.get_available_providers())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # As the file means it: integer kernels saturate on some processors, and ONNX Runtime's own rounding of weights
        # between quantised activations is not the file's. One way to compute also makes all sessions agree.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if settings.threads is not None:
            options.intra_op_num_threads = settings.threads
        if isinstance(model, onnx.ModelProto) and sum(len(t.raw_data) for t in model.graph.initializer) > WHOLE:
            # More than one message holds: weights go beside it, and out of `model`.
            taken = {t.name: array for t in model.graph.initializer if (array := take(t)) is not None}
            weights = {**(weights or {}), **taken}
        if weights:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        try:
            self._session = ort.InferenceSession(
                source if isinstance(source, bytes) else str(source),
                options,
                providers=[(p.name, dict(p.options)) if p.options else p.name for p in chosen],
            )
        except Exception as error:  # onnxruntime raises a different class for each status
            raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
        give_back_memory()
        self._taps = tuple(taps or (output.name for output in self._session.get_outputs()))
        self.providers: list[str] = self._session.get_providers()
        self.notes += _lost(chosen, self.providers)
        self._device = DEVICES.get(self.providers[0], "cpu")
        self._device_id = int(dict(chosen[0].options).get("device_id", 0)) if self._device != "cpu" else 0
        self._bound = self._device != "cpu" if bound is None else bound

    @property
    def metadata(self) -> dict[str, str]:
        """The model's `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of the taps by name.

        Raises:
            ModelError: ONNX Runtime fails on this input; the message is its first line.
        """
        try:
            values = self._run_bound(feeds) if self._bound else self._session.run(None, dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model on this input: {first_line(error)}") from error
        return dict(zip(self._taps, values, strict=True))

    def _run_bound(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device, self._device_id)
        self._session.run_with_iobinding(binding)
        values: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return values


def available(wanted: Sequence[Provider], present: Sequence[str]) -> tuple[list[Provider], list[str]]:
    """Those of `wanted` that are `present` in the installed ONNX Runtime, and a note on each that is passed over.

    What `auto` stands for is passed over without a note.

    Raises:
        UsageError: none of them is present; the message says which are and how to get the first.
    """
    names: list[Provider] = []
    for provider in wanted:
        expanded = [Provider(name) for name in FASTEST] if provider.name == AUTO else [provider]
        names += [p for p in expanded if p.name in present and p.name not in [n.name for n in names]]
    missing = [p.name for p in wanted if p.name != AUTO and p.name not in present]
    if not names:
        raise UsageError(
            f"execution provider {missing[0]} is not available here: there are {', '.join(present)}; to have it, "
            f"{_how(missing[0])}"
        )
    return names, [
        f"execution provider {name} is not available in the ONNX Runtime installed here, so {names[0].name} runs the "
        f"model; to have it, {_how(name)}"
        for name in missing
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which is what a user can use of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _lost(chosen: Sequence[Provider], running: Sequence[str]) -> list[str]:
    """A note where ONNX Runtime had a provider but could not start it: it goes on without a word."""
    return [
        f"ONNX Runtime could not start {p.name} (are its driver and libraries installed?), so {running[0]} runs the "
        "model"
        for p in chosen
        if p.name not in running
    ]


def _how(name: str) -> str:
    return INSTALL.get(name, "install a build of ONNX Runtime that has it")


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)


def _parsed(part: Any) -> list[Provider]:
    """The provider that one entry of a list names; none for an empty one."""
    if _is_pair(part):
        name, options = part
        return [Provider(_full(name), tuple(sorted((str(k), str(v)) for k, v in options.items())))]
    if not isinstance(part, str):
        raise UsageError(f"{part!r} is no execution provider: give a name, or (name, options)")
    name, _, device = part.strip().partition(":")
    if not name:
        return []
    full = _full(name)
    if not device:
        return [Provider(full)]
    if full in (AUTO, CPU):
        raise UsageError(f"provider {part!r}: {name} has no devices to choose from")
    if device.isdigit():
        return [Provider(full, (("device_id", device),))]
    if full == PROVIDERS["openvino"]:
        return [Provider(full, (("device_type", device.upper()),))]
    raise UsageError(f"provider {part!r}: the device is a number, as in cuda:1")


def _full(name: str) -> str:
    """The full name of a provider.

    Raises:
        UsageError: ONNX Runtime knows none of that name, in this build or another.
    """
    if name.lower() == AUTO:
        return AUTO
    if (short := PROVIDERS.get(name.lower())) is not None:
        return short
    ort = onnxruntime()
    known = {n.lower(): n for n in (*PROVIDERS.values(), *ort.get_all_providers(), *ort.get_available_providers())}
    if (full := known.get(name.lower()) or known.get(f"{name}ExecutionProvider".lower())) is not None:
        return full
    near = difflib.get_close_matches(name.lower(), [*PROVIDERS, AUTO], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"execution provider {name} is not available: {hint}there are {', '.join(ort.get_available_providers())}"
    )
