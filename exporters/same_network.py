"""One network from every framework, with the same weights: `python -m exporters same-network --framework F -o FILE`.

A small residual network; its weights are drawn once, by NumPy, and put into each framework's own layers. The files are
as different as exporters are, and yet have to give the same predictions and the same maps
(`python -m exporters.same_network a.onnx b.onnx ...` compares).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.common import Export

SIZE, CLASSES = 32, 10
FRAMEWORKS = ("torch", "keras", "flax", "paddle")
# name: (kernel, channels in, channels out, stride)
CONVOLUTIONS = {"stem": (3, 3, 16, 1), "first": (3, 16, 16, 1), "second": (3, 16, 16, 1), "down": (3, 16, 32, 2)}
EPSILON = 1e-5
Weights = dict[str, np.ndarray]


def weights(seed: int = 0) -> Weights:
    """Kernels (out, in, k, k) and BatchNormalization far from identity, by layer; the head (in, out)."""
    rng = np.random.default_rng(seed)
    found: Weights = {}
    for name, (k, before, after, _) in CONVOLUTIONS.items():
        found[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / (k * k * before)), (after, before, k, k))
        found[f"{name}.gamma"] = rng.uniform(0.5, 1.5, after)
        found[f"{name}.beta"] = rng.normal(0, 0.3, after)
        found[f"{name}.mean"] = rng.normal(0, 0.3, after)
        found[f"{name}.variance"] = rng.uniform(0.5, 2, after)
    found["head.weight"] = rng.normal(0, 0.3, (32, CLASSES))
    found["head.bias"] = rng.normal(0, 0.3, CLASSES)
    return {name: value.astype(np.float32) for name, value in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters same-network`."""
    parser.add_argument("--framework", choices=FRAMEWORKS, required=True, help="who builds and exports it")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")


def export(args: argparse.Namespace) -> Export:
    """Build the network in a framework and export it by that framework's own exporter."""
    makers = {"torch": _torch, "keras": _keras, "flax": _flax, "paddle": _paddle}
    return makers[args.framework](weights(args.seed), args.output)


def _torch(w: Weights, path: Path) -> Export:
    import torch
    from torch import nn

    from exporters.common import finish
    from exporters.torch_common import to_onnx

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (k, before, after, stride) in CONVOLUTIONS.items():
                conv = nn.Conv2d(before, after, k, stride, 1, bias=False)
                norm = nn.BatchNorm2d(after, eps=EPSILON)
                conv.weight.data = torch.tensor(w[f"{name}.weight"])
                norm.weight.data, norm.bias.data = (torch.tensor(w[f"{name}.{p}"]) for p in ("gamma", "beta"))
                norm.running_mean, norm.running_var = (torch.tensor(w[f"{name}.{p}"]) for p in ("mean", "variance"))
                self.add_module(name, nn.Sequential(conv, norm))
            self.head = nn.Linear(32, CLASSES)
            self.head.weight.data, self.head.bias.data = torch.tensor(w["head.weight"].T), torch.tensor(w["head.bias"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stem, first, second, down = (self.get_submodule(name) for name in CONVOLUTIONS)
            x = torch.relu(stem(x))
            x = torch.relu(x + second(torch.relu(first(x))))
            x = torch.relu(down(nn.functional.max_pool2d(x, 2)))
            return self.head(x.mean((2, 3)))

    model, sample, expected = to_onnx(Net(), size=SIZE)
    return finish(model, path, sample=sample, expected=expected, description="same network, PyTorch")


def _keras(w: Weights, path: Path) -> Export:
    import keras
    from keras import layers as kl

    from exporters.keras_models import write

    def block(x: Any, name: str) -> Any:
        k, _, after, stride = CONVOLUTIONS[name]
        # Padding by one on all sides, as the others have it; "same" pads a stride on one side.
        x = kl.Conv2D(after, k, stride, use_bias=False, name=name)(kl.ZeroPadding2D(1)(x))
        return kl.BatchNormalization(epsilon=EPSILON, name=f"{name}_norm")(x)

    inputs = keras.Input((SIZE, SIZE, 3))
    x = kl.ReLU()(block(inputs, "stem"))
    x = kl.ReLU()(kl.Add()([x, block(kl.ReLU()(block(x, "first")), "second")]))
    x = kl.ReLU()(block(kl.MaxPooling2D(2)(x), "down"))
    model = keras.Model(inputs, kl.Dense(CLASSES, name="head")(kl.GlobalAveragePooling2D()(x)))
    for name in CONVOLUTIONS:
        model.get_layer(name).set_weights([w[f"{name}.weight"].transpose(2, 3, 1, 0)])
        norm = [w[f"{name}.{p}"] for p in ("gamma", "beta", "mean", "variance")]
        model.get_layer(f"{name}_norm").set_weights(norm)
    model.get_layer("head").set_weights([w["head.weight"], w["head.bias"]])
    sample = np.random.default_rng(0).standard_normal((3, SIZE, SIZE, 3)).astype(np.float32)
    return write(model, path, sample=sample, description=f"same network, Keras on {keras.backend.backend()}")


def _flax(w: Weights, path: Path) -> Export:
    import jax.numpy as jnp
    from flax import nnx

    from exporters.flax_models import write

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            for name, (k, before, after, stride) in CONVOLUTIONS.items():
                conv = nnx.Conv(before, after, (k, k), strides=stride, padding=1, use_bias=False, rngs=rngs)
                norm = nnx.BatchNorm(after, epsilon=EPSILON, rngs=rngs)
                conv.kernel[...] = jnp.asarray(w[f"{name}.weight"].transpose(2, 3, 1, 0))
                norm.scale[...], norm.bias[...] = (jnp.asarray(w[f"{name}.{p}"]) for p in ("gamma", "beta"))
                norm.mean[...], norm.var[...] = (jnp.asarray(w[f"{name}.{p}"]) for p in ("mean", "variance"))
                setattr(self, name, conv)
                setattr(self, f"{name}_norm", norm)
            self.head = nnx.Linear(32, CLASSES, rngs=rngs)
            self.head.kernel[...], self.head.bias[...] = jnp.asarray(w["head.weight"]), jnp.asarray(w["head.bias"])

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.stem_norm(self.stem(x)))
            inner = nnx.relu(self.first_norm(self.first(x)))
            x = nnx.relu(x + self.second_norm(self.second(inner)))
            x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
            x = nnx.relu(self.down_norm(self.down(x)))
            return self.head(jnp.mean(x, (1, 2)))

    return write(Net(nnx.Rngs(0)), path, size=SIZE, about="same network, Flax")


def _paddle(w: Weights, path: Path) -> Export:
    import paddle
    from paddle import nn

    from exporters.paddle_models import write

    class Net(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            for name, (k, before, after, stride) in CONVOLUTIONS.items():
                conv = nn.Conv2D(before, after, k, stride, 1, bias_attr=False)
                norm = nn.BatchNorm2D(after, epsilon=EPSILON)
                conv.weight.set_value(paddle.to_tensor(w[f"{name}.weight"]))
                for variable, part in ((norm.weight, "gamma"), (norm.bias, "beta"), (norm._mean, "mean"),
                                       (norm._variance, "variance")):  # fmt: skip
                    variable.set_value(paddle.to_tensor(w[f"{name}.{part}"]))
                self.add_sublayer(name, nn.Sequential(conv, norm))
            self.head = nn.Linear(32, CLASSES)
            self.head.weight.set_value(paddle.to_tensor(w["head.weight"]))
            self.head.bias.set_value(paddle.to_tensor(w["head.bias"]))
            self.pool = nn.MaxPool2D(2)

        def forward(self, x: Any) -> Any:
            relu = nn.functional.relu
            x = relu(self.stem(x))
            x = relu(x + self.second(relu(self.first(x))))
            x = relu(self.down(self.pool(x)))
            return self.head(x.mean([2, 3]))

    return write(Net(), path, size=SIZE, about="same network, Paddle")


# -- compared ----------------------------------------------------------------------------------------------------


def compare(paths: Sequence[Path], images: int = 4) -> list[tuple[str, str, float, float]]:
    """(one file, another, largest difference of the logits relative to the largest, lowest correlation of the
    Relevance-CAM maps) of every two, at the layers of every resolution, over random pictures."""
    import onnxcam

    pictures = np.random.default_rng(1).standard_normal((images, 3, SIZE, SIZE)).astype(np.float32)
    found = {}
    for path in paths:
        model = onnxcam.load(path, preprocess="unit")
        x = pictures.transpose(0, 2, 3, 1) if model.spec.layout == "NHWC" else pictures
        # Each exporter has its own layers; the suggested one of each resolution is in all of them.
        e = model.explain(np.ascontiguousarray(x), "suggested", [3])
        found[path.stem] = e.logits, {e.layers[name].spatial: heat for name, heat in e.maps.items()}
    rows = []
    for one, other in itertools.combinations(found, 2):
        (logits, maps), (others, more) = found[one], found[other]
        shared = sorted(set(maps) & set(more))
        assert shared, f"{one} and {other} have no resolution in common"
        lowest = min(
            float(np.corrcoef(maps[s][i].ravel(), more[s][i].ravel())[0, 1]) for s in shared for i in range(images)
        )
        rows.append((one, other, float(np.abs(logits - others).max() / np.abs(logits).max()), lowest))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print how files compare."""
    paths = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    print("| one | another | logits differ by | lowest correlation of maps |\n| --- | --- | --- | --- |")
    for one, other, gap, correlation in compare(paths):
        print(f"| {one} | {other} | {gap:.1e} | {correlation:.6f} |")


if __name__ == "__main__":
    main()
