"""One architecture becomes an ONNX file with what PyTorch says of it: logits, and the gradient of one of them.

Weights are seeded and far from the identity. The reference is autograd, in float32 and, where the module can be run so,
in float64: how far the two are apart says how much of an error is PyTorch's own.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.coverage_cases import Case
from benchmarks.coverage_files import Folder, first_line, write_json

OPSETS = {"torchscript": 17, "dynamo": 20}
MODEL, REFERENCE, NOTES = "model.onnx", "reference.npz", "export.json"


def export(case: Case, folder: Folder) -> None:
    """Fill `folder` with the model, the reference and what there is to say of both."""
    started = time.perf_counter()
    notes: dict[str, Any] = {"status": "running", "exporter": case.exporter}
    write_json(folder / NOTES, notes)
    try:
        if case.family == "light":
            from benchmarks.coverage_light import make

            x, logits, gradients = make(case, folder / MODEL)
            notes["size"] = case.size
        else:
            x, logits, gradients = _from_torch(case, folder / MODEL, notes)
        notes |= _described(folder / MODEL)
        notes["ort"] = _against_runtime(folder / MODEL, x, logits)
        kept = {f"gradient{bits}": g for bits, g in gradients.items() if g is not None}
        np.savez(folder / REFERENCE, x=x, logits=logits, **kept)
        notes["torch32"] = relative(gradients["32"], gradients["64"]) if "64" in gradients else None
        notes["status"] = "ok"
    except Exception as error:
        notes |= {"status": "failed", "message": first_line(error), "error": type(error).__name__}
    notes["seconds"] = round(time.perf_counter() - started, 2)
    write_json(folder / NOTES, notes)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(ours - wide) / max(np.linalg.norm(wide), np.finfo(np.float64).tiny))


def _described(path: Path) -> dict[str, Any]:
    model = onnx.load(path, load_external_data=False)
    files = [path, *path.parent.glob("*.data")]
    return {
        "nodes": len(model.graph.node),
        "ops": dict(Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)),
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "megabytes": round(sum(f.stat().st_size for f in files) / 1e6, 1),
    }


def _against_runtime(path: Path, x: np.ndarray, logits: np.ndarray) -> float:
    """Largest difference of ONNX Runtime's logits from the reference's, relative to the largest logit."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    if found.shape != logits.shape:
        raise ValueError(f"ONNX Runtime gives logits of shape {found.shape}, PyTorch {logits.shape}")
    return float(np.abs(found - logits).max() / np.abs(logits).max())


# -- PyTorch -----------------------------------------------------------------------------------------------------


def _from_torch(case: Case, path: Path, notes: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Export, first as a user would; with timm's fused attention switched off where that fails.

    Random weights make some networks so steep that float32 says little, be it PyTorch's or ours. The first kind of
    `WEIGHTS` is taken with which it does, or else the best of them.
    """
    import torch

    from exporters.torch_common import import_torchvision

    import_torchvision()
    torch.set_num_threads(1)
    best: tuple[float, str] | None = None
    for weights in WEIGHTS:
        model, x = _built(case, True, notes, weights)
        steepness = _steepness(_gradients(model, x, notes))
        if best is None or steepness < best[0]:
            best = (steepness, weights)
        if steepness <= 1e-5:
            break
    assert best is not None
    notes["weights"] = best[1]
    attempts = (True, False) if case.family == "timm" else (True,)
    for fused in attempts:
        notes["fused_attention"] = fused
        try:
            model, x = _built(case, fused, notes, best[1])
            with torch.no_grad():
                expected = model(torch.from_numpy(x))
            if not isinstance(expected, torch.Tensor) or expected.ndim != 2:
                raise ValueError("the model returns no (N, classes) tensor")
            if not torch.isfinite(expected).all():
                raise ValueError("the logits are not finite with seeded weights")
            _to_onnx(model, x, case.exporter, path)
            _against_runtime(path, x, expected.numpy())
            break
        except Exception:
            if fused is attempts[-1]:
                raise
    return x, expected.numpy(), _gradients(model, x, notes)


def _steepness(gradients: dict[str, np.ndarray]) -> float:
    """How far PyTorch's float32 gradient is from that of float64, where there is one."""
    if not np.isfinite(gradients["32"]).all():
        return float("inf")
    return relative(gradients["32"], gradients["64"]) if "64" in gradients else 0.0


def calibrate(model: Any, shape: tuple[int, ...]) -> None:
    """Statistics of BatchNormalization from a random batch, as training would leave them."""
    import torch
    from torch import nn

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn((4, *shape[1:]), generator=torch.Generator().manual_seed(1)))
    for norm in norms:
        norm.eval()


# Everything seeded; the statistics of BatchNormalization those of what passes through; and dense layers as the
# architecture begins them.
WEIGHTS = ("seeded", "calibrated", "gentle")


def _built(case: Case, fused: bool, notes: dict[str, Any], weights: str) -> tuple[Any, np.ndarray]:
    """The module with its weights, and an input; of the architecture's own size where it takes no other."""
    import torch

    torch.manual_seed(0)
    if case.family == "torchvision":
        from torchvision import models

        more = {"aux_logits": False} if case.name in ("googlenet", "inception_v3") else {}
        more |= {"init_weights": False} if more else {}
        model = models.get_model(case.name, **more)
        sizes = [case.size]
    else:
        import timm

        timm.layers.set_fused_attn(fused)
        model = timm.create_model(case.name, pretrained=False)
        sizes = [case.size, int((model.pretrained_cfg.get("input_size") or (3, 224, 224))[-1])]
    seed_weights(model.eval(), dense=weights != "gentle")
    notes["parameters"] = sum(p.numel() for p in model.parameters())
    channels = int((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0])
    for size in sizes:
        notes["size"] = size
        x = np.random.default_rng(0).standard_normal((1, channels, size, size)).astype(np.float32)
        try:
            with torch.no_grad():
                model(torch.from_numpy(x))
            if weights != "seeded":
                calibrate(model, x.shape)
            return model, x
        except Exception:
            if size is sizes[-1]:
                raise
    raise AssertionError


def seed_weights(model: Any, dense: bool = True) -> None:
    """Reproducible weights that hide no mistake: every parameter by its name, and none left at a constant.

    Convolutions and dense layers get He-normal weights and biases of 0.3 N(0, 1), normalisations weights from
    U(0.5, 1.5), biases and running means of 0.3 N(0, 1), running variances from U(0.3, 2). Other parameters keep what
    the architecture gives them, unless that is one number throughout: 0 becomes 0.1 N(0, 1), what is close to 0 (a
    layer scale) U(0.1, 0.5), all else U(0.7, 1.3) times itself. `dense` False leaves the weights of convolutions and
    dense layers as they are, too.
    """
    import torch
    from torch import nn

    matrices = (nn.modules.conv._ConvNd, nn.Linear)
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, p in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                seed = torch.Generator().manual_seed(zlib.crc32(f"{path}.{name}".encode()))
                buffer = not isinstance(p, nn.Parameter)
                if not p.is_floating_point() or p.numel() == 0:
                    continue
                if name == "running_mean":
                    p.normal_(0, 0.3, generator=seed)
                elif name == "running_var":
                    p.uniform_(0.3, 2.0, generator=seed)
                elif buffer:
                    continue
                elif isinstance(module, matrices) and name == "weight" and dense:
                    nn.init.kaiming_normal_(p, nonlinearity="relu", generator=seed)
                elif isinstance(module, norms) and name == "weight":
                    p.uniform_(0.5, 1.5, generator=seed)
                elif isinstance(module, (*matrices, *norms)) and name == "bias":
                    p.normal_(0, 0.3, generator=seed)
                elif bool((p == p.flatten()[0]).all()):
                    value = float(p.flatten()[0])
                    if value == 0:
                        p.normal_(0, 0.1, generator=seed)
                    elif abs(value) < 0.05:
                        p.uniform_(0.1, 0.5, generator=seed)
                    else:
                        p.uniform_(0.7, 1.3, generator=seed).mul_(value)


def _to_onnx(model: Any, x: np.ndarray, exporter: str, path: Path) -> None:
    import torch

    from exporters.torch_common import exporting

    sample = (torch.from_numpy(x),)
    names: dict[str, Any] = {
        "input_names": ["input"],
        "output_names": ["logits"],
        "opset_version": OPSETS[exporter],
    }
    large = sum(p.numel() for p in model.parameters()) > 4e8  # no more than 2 GB fit into one file
    with exporting(), torch.no_grad():
        if exporter == "dynamo":
            program = torch.onnx.export(model, sample, dynamo=True, verbose=False, **names)
            assert program is not None
            program.save(path, external_data=large)
        elif large:
            scratch = path.with_name("scattered")
            scratch.mkdir(exist_ok=True)
            torch.onnx.export(
                model, sample, str(scratch / "model.onnx"), dynamo=False, **names
            )  # a Path is no path to it
            whole = onnx.load(scratch / "model.onnx")
            onnx.save(whole, path, save_as_external_data=True, location="model.onnx.data")
            shutil.rmtree(scratch)
        else:
            torch.onnx.export(model, sample, path, dynamo=False, **names)


def _gradients(model: Any, x: np.ndarray, notes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of the largest logit with respect to the input, by autograd: "32" and, where the module runs in it, "64"."""
    import torch

    def gradient(module: Any, dtype: Any, target: int | None) -> tuple[np.ndarray, int]:
        for part in module.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.register_forward_hook(_contiguous)
        leaf = torch.from_numpy(x).to(dtype).requires_grad_()
        logits = module(leaf * 1)  # modules may overwrite what they are given
        target = int(logits.argmax()) if target is None else target
        (found,) = torch.autograd.grad(logits[0, target], leaf)
        return found.numpy(), target

    for p in model.parameters():
        p.requires_grad_(False)
    single, target = gradient(model, torch.float32, None)
    notes["target"] = target
    out = {"32": single}
    with contextlib.suppress(Exception):  # what casts to float32 inside cannot be run so
        double = gradient(copy.deepcopy(model).double(), torch.float64, target)[0]
        if np.isfinite(double).all():
            out["64"] = double
    return out


def _contiguous(module: Any, inputs: Any, output: Any) -> None:
    """PyTorch 2.13 gives a wrong gradient behind BatchNormalization where what comes back to it lies in memory with its
    channels last and the batch is 1, as from tokens: its own finite differences say so (xcit_nano_12_p8_224)."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
