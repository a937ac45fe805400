"""Other explainers on the same weights and the same input, each as its own documentation calls it.

A peer says which job it does: a map of the last layer, or relevance down to the input. It is compared with what onnxcam
takes for the same job. All are optional; what is not installed, or refuses the model, is skipped and the reason noted.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import onnxcam
from benchmarks.models import SUBJECTS, module_of
from benchmarks.timing import Skip

Run = Callable[[], Any]
OPENVINO_XAI = "ONNXCAM_BENCH_OPENVINO_XAI"


@dataclass
class Setting:
    """What the peers explain: a subject by name and file, one picture, and the class to explain out of so many.

    `module` builds the torch module; peers that hook or change it get one each.
    """

    name: str
    file: Path
    x: np.ndarray
    target: int
    classes: int
    threads: int

    def module(self) -> Any:
        if self.name not in SUBJECTS:
            raise Skip("the torch module of this file is not known")
        with missing("torch, torchvision"):
            import torch

            from exporters.torch_common import import_torchvision

            import_torchvision()
            torch.set_num_threads(self.threads)
            return module_of(self.name)

    def last(self, module: Any) -> Any:
        path = SUBJECTS[self.name].last
        if path is None:
            raise Skip("no last layer is known for this model")
        return module.get_submodule(path)


@contextlib.contextmanager
def missing(what: str) -> Iterator[None]:
    """Turn a failed import into a reason to skip."""
    try:
        yield
    except ImportError as error:
        raise Skip(f"{what} not installed ({error})") from error


def torch_inference(setting: Setting) -> Run:
    module = setting.module()
    import torch

    x = torch.from_numpy(setting.x)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return module(x).numpy()

    return run


def pytorch_grad_cam(setting: Setting) -> Run:
    return _of_pytorch_grad_cam(setting, "GradCAM")


def score_cam(setting: Setting) -> Run:
    return _of_pytorch_grad_cam(setting, "ScoreCAM")


def _of_pytorch_grad_cam(setting: Setting, method: str) -> Run:
    module = setting.module()
    with missing("grad-cam"):
        import pytorch_grad_cam
        import torch
        from pytorch_grad_cam import score_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    score_cam.tqdm.tqdm = lambda steps, **_: steps  # no progress bar in the figures
    cam = getattr(pytorch_grad_cam, method)(model=module, target_layers=[setting.last(module)])
    x, targets = torch.from_numpy(setting.x), [ClassifierOutputTarget(setting.target)]
    return lambda: cam(input_tensor=x, targets=targets)


def torch_cam(setting: Setting) -> Run:
    module = setting.module()
    with missing("torchcam"):
        import torch
        from torchcam.methods import GradCAM
    extractor = GradCAM(module, target_layer=setting.last(module))
    x = torch.from_numpy(setting.x)
    return lambda: extractor(setting.target, module(x))[0].numpy()


def zennit_epsilon_plus(setting: Setting) -> Run:
    module = setting.module()
    with missing("zennit"):
        import torch
        from zennit.attribution import Gradient
        from zennit.canonizers import SequentialMergeBatchNorm
        from zennit.composites import EpsilonPlus
        from zennit.torchvision import ResNetCanonizer
    canonizer = ResNetCanonizer() if SUBJECTS[setting.name].stages else SequentialMergeBatchNorm()
    attributor = Gradient(out_of_place(module), EpsilonPlus(canonizers=[canonizer]))
    attributor.__enter__()  # hooks are set once, for all runs
    x, onehot = torch.from_numpy(setting.x), torch.zeros(1, setting.classes)
    onehot[:, setting.target] = 1

    def run() -> np.ndarray:
        return attributor(x.clone().requires_grad_(), lambda logits: logits * onehot)[1].detach().numpy().sum(1)

    return run


def captum_lrp(setting: Setting) -> Run:
    module = out_of_place(setting.module())
    with missing("captum"):
        import torch
        from captum.attr import LRP
    lrp = LRP(module)
    x = torch.from_numpy(setting.x)
    return lambda: lrp.attribute(x, target=setting.target).detach().numpy().sum(1)


def out_of_place(module: Any) -> Any:
    """No activation overwrites its input, which the hooks of zennit and captum need."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    return module


def array_engine(setting: Setting) -> Run:
    model = onnxcam.load(setting.file)
    return lambda: model.explain(setting.x, "auto", setting.target, engine="numpy")


def openvino_xai(setting: Setting) -> Run:
    """In an environment of its own, which a variable names: openvino-xai wants an older NumPy."""
    python = os.environ.get(OPENVINO_XAI)
    if not python:
        raise Skip(f"set {OPENVINO_XAI} to the Python of an environment with openvino-xai")
    worker = Path(__file__).with_name("openvino_worker.py")
    command = [python, str(worker), str(setting.file), str(setting.threads), json.dumps(list(setting.x.shape))]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    if child.stdout.readline().strip() != "ready":
        child.kill()
        raise Skip("openvino-xai cannot explain this model, or is not installed there")

    ask, answer = child.stdin, child.stdout

    def run() -> None:
        print(setting.target, file=ask, flush=True)
        if not answer.readline():
            raise RuntimeError("openvino-xai stopped")

    return run


@dataclass(frozen=True)
class Peer:
    """A peer: its name, the job it does, which column of onnxcam does the same, and what sets it up.

    `claim`: an LRP or gradient method, which onnxcam means to be twice as fast as.
    `once`: far too slow to take turns; it runs a single time, and on the models in `only`.
    """

    title: str
    job: str
    same: str
    make: Callable[[Setting], Run]
    claim: bool = False
    once: bool = False
    only: tuple[str, ...] = ()


LAST, LRP_PLUS, LRP_EPSILON = "map of the last layer", "LRP to the input, z-plus", "LRP to the input, epsilon"

SLOW = ("resnet50", "efficientnet-lite0")

PEERS = {
    "torch": Peer("PyTorch itself", "inference only", "plain", torch_inference),
    "numpy": Peer("onnxcam, `engine=numpy`", LAST, "last", array_engine),
    "pytorch-grad-cam": Peer("pytorch-grad-cam GradCAM", LAST, "last", pytorch_grad_cam, claim=True),
    "torch-cam": Peer("torch-cam GradCAM", LAST, "last", torch_cam, claim=True),
    "openvino-xai": Peer("openvino-xai ReciproCAM", LAST, "last", openvino_xai),
    "zennit": Peer("zennit EpsilonPlus", LRP_PLUS, "lrp-epsilon-plus", zennit_epsilon_plus, claim=True),
    "captum": Peer("captum LRP", LRP_EPSILON, "lrp-epsilon", captum_lrp, claim=True),
    "score-cam": Peer(
        "pytorch-grad-cam ScoreCAM", LAST, "last", score_cam, once=True, only=("resnet50", "efficientnet-lite0")
    ),
}

NOT_RUN = {"the Relevance-CAM authors' code": "not on PyPI, and written for CUDA"}


def make(peer: Peer, setting: Setting) -> Run:
    """A call that explains once with the peer; it has run once.

    Raises:
        Skip: the peer is not installed or fails on this model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = peer.make(setting)
            if not peer.once:
                run()
    except Skip:
        raise
    except Exception as error:  # peers fail in their own ways; the reason goes into the table's notes
        first = (str(error).strip().splitlines() or [""])[0]
        raise Skip(f"fails: {type(error).__name__}: {first[:160]}") from error
    return run


def version(package: str) -> str | None:
    """The installed version of a package."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
