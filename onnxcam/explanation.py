"""The result of explaining: raw maps, what they are maps of, and the check they carry along."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from onnxcam.errors import UsageError
from onnxcam.files import safe_name, writable_folder, write_atomically
from onnxcam.layers import Layer
from onnxcam.segment import Segment, require_outlines, segment as find_segment

if TYPE_CHECKING:
    from onnxcam.model import Model
    from onnxcam.preprocess import Prepared

SCHEMA_VERSION = 1
PNG_LEVEL = 3  # of 9: a tenth larger than the smallest, in a sixth of the time


@dataclass(frozen=True)
class Picture:
    """A picture that was explained: its name (a path, where it came from a file) and what the model saw of it.

    The view is made again each time it is asked for, so that many pictures need no memory; an array has none.
    """

    name: str
    prepare: Callable[[], Prepared] | None = None

    @property
    def drawable(self) -> bool:
        return self.prepare is not None

    @property
    def view(self) -> Image.Image | None:
        return None if self.prepare is None else self.prepare().view


@dataclass(frozen=True)
class NodeBalance:
    """Relevance that came to a node and that it handed on, one number for each image and target: (images, T)."""

    node: str
    op_type: str
    rule: str
    received: np.ndarray
    handed: np.ndarray
    magnitude: np.ndarray

    @property
    def dropped(self) -> np.ndarray:
        return self.received - self.handed


@dataclass(frozen=True)
class Conservation:
    """The check that a result carries: is relevance conserved, and if not, where was it dropped?

    Attributes:
        start: sum of the relevance the walk began with, (images, T); `start_magnitude` sums its absolute values.
        at_layers: sum of the relevance at each layer, (images, T).
        nodes: the balance of every node on the way; empty for the gradient, which conserves nothing, and where images
            took different ways.
    """

    start: np.ndarray
    start_magnitude: np.ndarray
    at_layers: dict[str, np.ndarray]
    nodes: list[NodeBalance] = field(default_factory=list)

    def first(self, count: int) -> Conservation:
        """That of the first `count` images."""
        return Conservation(
            self.start[:count],
            self.start_magnitude[:count],
            {name: sums[:count] for name, sums in self.at_layers.items()},
            [
                NodeBalance(n.node, n.op_type, n.rule, n.received[:count], n.handed[:count], n.magnitude[:count])
                for n in self.nodes
            ],
        )

    @classmethod
    def merge(cls, parts: Sequence[Conservation]) -> Conservation:
        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(arrays)

        same_way = len({tuple(n.node for n in p.nodes) for p in parts}) == 1
        return cls(
            joined([p.start for p in parts]),
            joined([p.start_magnitude for p in parts]),
            {name: joined([p.at_layers[name] for p in parts]) for name in parts[0].at_layers},
            [
                NodeBalance(
                    same[0].node,
                    same[0].op_type,
                    same[0].rule,
                    joined([b.received for b in same]),
                    joined([b.handed for b in same]),
                    joined([b.magnitude for b in same]),
                )
                for same in zip(*(p.nodes for p in parts if same_way), strict=True)
            ],
        )

    @property
    def residual(self) -> float | None:
        """Largest imbalance of any node relative to the relevance that came to it, in absolute values; None where no
        balance was kept."""
        if not self.nodes:
            return None
        tiny = np.finfo(np.float32).tiny
        return float(max(np.max(np.abs(n.dropped) / np.maximum(n.magnitude, tiny)) for n in self.nodes))

    def dropped(self) -> list[tuple[NodeBalance, float]]:
        """The nodes with the share of the start's magnitude that each dropped, mean over images and targets; the
        largest first."""
        rows = [(n, float(np.mean(np.abs(n.dropped) / self.start_magnitude))) for n in self.nodes]
        return sorted(rows, key=lambda row: -row[1])

    def to_json(self, worst: int = 10) -> dict[str, Any]:
        return {
            "start_sum": self.start.tolist(),
            "start_magnitude": self.start_magnitude.tolist(),
            "layer_sums": {name: sums.tolist() for name, sums in self.at_layers.items()},
            "largest_node_residual": self.residual,
            "dropped_share_of_start": [
                {"node": n.node, "op": n.op_type, "rule": n.rule, "share": share}
                for n, share in self.dropped()[:worst]
                if share > 0
            ],
        }


@dataclass(frozen=True)
class Explanation:
    """Maps of several images, targets and layers.

    Attributes:
        maps: layer name to raw map, (images, targets, *spatial) float32, at the layer's own resolution.
        targets: class numbers, (images, targets).
        logits: (images, classes). probabilities: the same after softmax, or the sigmoid that the file ends in.
        layers: layer name to what it is.
        pictures: names, and what the model saw.
        conservation: the check.
        options: method, composite, start, engine and the like, as used.
        warnings: sentences that a user should read.
    """

    model: Model
    pictures: list[Picture]
    layers: dict[str, Layer]
    maps: dict[str, np.ndarray]
    targets: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    conservation: Conservation
    options: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        maps = ", ".join(f"{name} {heat.shape}" for name, heat in self.maps.items())
        return f"<onnxcam.Explanation of {self.model.name}: {self.options['method']}, maps {maps}>"

    def label(self, image: int, target: int) -> str:
        return self.model.labels.name(int(self.targets[image, target]))

    def probability(self, image: int, target: int) -> float:
        """Of the target's class; where a single logit speaks for two classes, of the one that is meant."""
        row, c = self.probabilities[image], int(self.targets[image, target])
        return float(row[c]) if len(row) > 1 else float(row[0] if c else 1 - row[0])

    def logit(self, image: int, target: int) -> float:
        row, c = self.logits[image], int(self.targets[image, target])
        return float(row[c]) if len(row) > 1 else float(row[0] if c else -row[0])

    def is_vector(self, layer: str) -> bool:
        """True where there is a number for each feature or channel, and no map."""
        return len(self.layers[layer].shape) == 2 or bool(self.options.get("per_channel"))

    def top_features(
        self, layer: str | None = None, image: int = 0, target: int = 0, count: int = 10
    ) -> list[tuple[int, float]]:
        """The features of a layer (N, F) with the most relevance, for the class or against it: (feature, relevance)."""
        name = layer if layer is not None else next(iter(self.maps))
        row = self.maps[name][image, target].ravel()
        order = np.argsort(-np.abs(row), kind="stable")[:count]
        return [(int(k), float(row[k])) for k in order]

    def overlay(self, layer: str | None = None, image: int = 0, target: int = 0, **options: Any) -> Image.Image:
        """One map drawn over what the model saw, with a colour bar and a caption; options as `render.overlay`.

        Raises:
            UsageError: there is no such layer, image or target; the input was an array, or the map is not
                two-dimensional: there is nothing to draw on.
        """
        name = layer if layer is not None else next(iter(self.maps))
        if name not in self.maps:
            raise UsageError(f"there is no map of layer {name!r}; there is {', '.join(self.maps)}")
        images, targets = self.targets.shape
        if not (-images <= image < images and -targets <= target < targets):
            raise UsageError(f"there is no map of image {image}, target {target}: there are {images} and {targets}")
        heat, view = self.maps[name][image, target], self.pictures[image].view
        if view is None or heat.ndim != 2:
            raise UsageError("there is no picture to draw the map on: the input was an array, or the map is no image")
        return self._draw(view, name, image, target, options)

    def _draw(self, view: Image.Image, layer: str, image: int, target: int, options: dict[str, Any]) -> Image.Image:
        from onnxcam.render.overlay import overlay

        return overlay(view, self.maps[layer][image, target], caption=self.caption(layer, image, target), **options)

    def caption(self, layer: str, image: int, target: int) -> list[str]:
        where = self.layers[layer]
        size = "x".join(map(str, self.maps[layer].shape[2:]))
        method = self.options["method"]
        extra = [self.options[k] for k in ("composite", "start") if self.options[k]]
        kept = [f"{layer}: {', '.join(map(str, c))}" for layer, c in self.options["concepts"].items()]
        return [
            f"{self.label(image, target)}  {self.probability(image, target):.1%}",
            f"layer {where.node} ({size})  {', '.join([method, *extra, *kept])}",
        ]

    def segment(
        self, layer: str | None = None, image: int = 0, target: int = 0, quantile: float | None = None
    ) -> Segment:
        """Where a map is high, on the picture that the model saw: above its mean plus one standard deviation, or a
        quantile.

        Raises:
            UsageError: there is no picture, or the map is none in two dimensions.
        """
        name = layer if layer is not None else next(iter(self.maps))
        self._require_pictures([name])
        view = self.pictures[image].view
        assert view is not None
        return find_segment(self.maps[name][image, target], (view.height, view.width), quantile)

    def _require_pictures(self, layers: Sequence[str] | None = None) -> None:
        """Refuse to segment where there is no picture, or no map of it.

        Raises:
            UsageError: says which, or that outlines cannot be drawn.
        """
        if not all(picture.drawable for picture in self.pictures):
            raise UsageError("there is no picture to segment: the input was an array")
        if flat := [name for name in layers or self.maps if self.maps[name].ndim != 4]:
            raise UsageError(f"there is no map to segment at layer {flat[0]!r}")
        require_outlines()

    def save(
        self,
        out: str | Path,
        overlays: bool = True,
        segments: bool = False,
        quantile: float | None = None,
        **drawing: Any,
    ) -> list[Path]:
        """Write `OUT/<image>/class-<c>-layer-<name>.npy` and `-overlay.png`, and `OUT/manifest.json` last.

        With `segments` also `-mask.png` and `-segment.json`, see `segment`. `drawing` are options of `render.overlay`,
        such as `kind="minmax"` or `alpha=0.5`.

        Returns:
            The files written. Each appears whole or not at all.

        Raises:
            UsageError: the folder cannot be written to.
        """
        if segments:
            self._require_pictures()
        folder = writable_folder(out)
        (folder / "manifest.json").unlink(missing_ok=True)  # it would not be true of what is written from here on
        written: list[Path] = []
        entries = []
        stems = self._stems()
        for i, (picture, directory) in enumerate(zip(self.pictures, self.folders(), strict=True)):
            place = writable_folder(folder / directory)
            view = picture.view if overlays else None
            targets = []
            for t in range(self.targets.shape[1]):
                files = {}
                for name in self.maps:
                    stem = f"class-{self.targets[i, t]}-layer-{stems[name]}"
                    heat = self.maps[name][i, t]
                    written.append(write_atomically(place / f"{stem}.npy", partial(_write_array, heat)))
                    files[name] = {
                        "npy": f"{directory}/{stem}.npy",
                        "shape": list(heat.shape),
                        "min": float(heat.min()),
                        "max": float(heat.max()),
                    }
                    if view is not None and heat.ndim == 2:
                        drawn = self._draw(view, name, i, t, drawing)
                        written.append(write_atomically(place / f"{stem}-overlay.png", partial(_write_image, drawn)))
                        files[name]["overlay"] = f"{directory}/{stem}-overlay.png"
                    if segments:
                        found = self.segment(name, i, t, quantile)
                        who = {"class": int(self.targets[i, t]), "label": self.label(i, t)}
                        text = json.dumps(who | found.to_json())
                        for what, write in (
                            ("mask.png", partial(_write_image, found.image)),
                            ("segment.json", partial(_write_text, text)),
                        ):
                            written.append(write_atomically(place / f"{stem}-{what}", write))
                            files[name][what.split(".")[0]] = f"{directory}/{stem}-{what}"
                targets.append(
                    {
                        "class": int(self.targets[i, t]),
                        "label": self.label(i, t),
                        "logit": self.logit(i, t),
                        "probability": self.probability(i, t),
                        "maps": files,
                    }
                )
            entries.append({"name": picture.name, "folder": directory, "targets": targets})
        manifest = self.manifest() | {"images": entries}
        # What is no UTF-8 in a file's name is escaped as JSON does.
        whole = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        written.append(write_atomically(folder / "manifest.json", lambda s: s.write(whole)))
        return list(dict.fromkeys(written))

    def _stems(self) -> dict[str, str]:
        """What each layer is called in file names: its node, or its tensor where another layer has the node's name.

        Names that differ in capitals only are told apart too: some file systems do not.
        """
        stems: dict[str, str] = {}
        tensors: dict[str, str] = {}  # stem, in small letters -> tensor
        for name, layer in self.layers.items():
            stem, k = safe_name(layer.node), 2
            if tensors.get(stem.lower(), layer.tensor) != layer.tensor:
                stem = safe_name(layer.tensor)
            first = stem
            while tensors.setdefault(stem.lower(), layer.tensor) != layer.tensor:
                stem, k = f"{first}-{k}", k + 1
            stems[name] = stem
        return stems

    def folders(self) -> list[str]:
        """A folder name for each picture: its stem, numbered where two pictures share one."""
        names: list[str] = []
        taken: set[str] = set()  # in small letters: some file systems do not tell capitals apart
        for picture in self.pictures:
            stem = safe_name(Path(picture.name).stem)
            name, k = stem, 2
            while name.lower() in taken:
                name, k = f"{stem}-{k}", k + 1
            taken.add(name.lower())
            names.append(name)
        return names

    def manifest(self) -> dict[str, Any]:
        """Everything about the result but the maps, ready for JSON."""
        import onnx

        import onnxcam

        versions = {"onnxcam": onnxcam.__version__, "numpy": np.__version__, "onnx": onnx.__version__}
        versions["python"] = platform.python_version()
        try:
            import onnxruntime

            versions["onnxruntime"] = onnxruntime.__version__
        except ImportError:
            pass
        model = self.model
        drawn = self.pictures[0].drawable
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {"name": model.name, "sha256": model.sha256, "input": model.spec.name, "output": model.output},
            "preprocess": json.loads(model.preprocess.to_json()) if drawn else None,
            "preprocess_source": model.preprocess_source if drawn else None,
            "options": self.options,
            "versions": versions,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "conservation": self.conservation.to_json(),
            "warnings": self.warnings,
        }


def _write_array(array: np.ndarray, stream: IO[bytes]) -> None:
    np.save(stream, array)


def _write_text(text: str, stream: IO[bytes]) -> None:
    stream.write((text + "\n").encode())


def _write_image(image: Image.Image, stream: IO[bytes]) -> None:
    image.save(stream, "PNG", compress_level=PNG_LEVEL)
