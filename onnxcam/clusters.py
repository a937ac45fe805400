"""Spectral relevance analysis: do the maps of a class fall into groups, one of which looks at a watermark?

The maps of all pictures of a class are brought to one small size and clustered by spectral clustering on the graph of
nearest neighbours (SpRAy, Lapuschkin et al. 2019): a model that recognises a class by a copyright tag in some of its
pictures shows as a cluster of maps that lie on the tag. How many clusters there are is said by the largest gap between
the eigenvalues of the graph's Laplacian. scikit-learn does the clustering and the embedding.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from onnxcam.errors import NotFiniteError, PictureError, UsageError
from onnxcam.evaluation.examples import Example, checked
from onnxcam.files import writable_folder, write_atomically
from onnxcam.methods import Method, method as find_method
from onnxcam.methods.upsample import upsampled
from onnxcam.model import Model
from onnxcam.pictures import open_image, why_left_out
from onnxcam.pool import Pool, shared_out

SIDE = 16  # cells of the maps that are compared
FEWEST = 8  # pictures that a class must have
MOST = 8  # clusters that are looked for
SHOWN = 24  # pictures of a gallery
TILE = 144
SAME = 1e-6  # what maps of a class must differ by somewhere


@dataclass(frozen=True)
class Clusters:
    """The maps of one class, clustered.

    Attributes:
        number, label: of the class.
        pictures: their paths.
        maps: what was compared: (pictures, SIDE, SIDE), positive parts that sum to 1.
        cluster: of each picture; 0 is the largest. There is one where all maps are the same.
        places: of each picture in the plane, by t-SNE of the maps.
        eigenvalues: of the Laplacian, smallest first; `gap` is the step behind as many as there are clusters, as a
            share of the next: 1 where the clusters are not connected at all.
        apart: silhouette of the clusters in the spectral embedding, -1..1: near 0 they are not groups but a continuum.
        asked: whether the number of clusters was asked for.
    """

    number: int
    label: str
    pictures: list[str]
    maps: np.ndarray
    cluster: np.ndarray
    places: np.ndarray
    eigenvalues: np.ndarray
    gap: float
    apart: float
    asked: bool = False

    @property
    def count(self) -> int:
        return int(self.cluster.max()) + 1

    def heat(self, cluster: int) -> np.ndarray:
        """The mean map of a cluster."""
        mean: np.ndarray = self.maps[self.cluster == cluster].mean(0)
        return mean

    def typical(self, cluster: int) -> list[int]:
        """The pictures of a cluster, those nearest to its mean map first."""
        members = np.flatnonzero(self.cluster == cluster)
        far = ((self.maps[members] - self.heat(cluster)) ** 2).sum((1, 2))
        return [int(i) for i in members[np.argsort(far, kind="stable")]]


def cluster(
    model: Model,
    examples: Sequence[Example],
    layer: str | int = "auto",
    *,
    classes: Sequence[int] | None = None,
    count: int | None = None,
    method: str | Method = "contrast-map",
    options: Mapping[str, Any] | None = None,
    target: str = "predicted",
    progress: Callable[[int, int], None] | None = None,
    left_out: Callable[[str, str], None] | None = None,
    threads: int | None = None,
    engine_pool: str | Pool | None = None,
    workers: int | None = None,
    **how: Any,
) -> list[Clusters]:
    """Cluster the maps of each class.

    Args:
        model: from `onnxcam.load`.
        examples: pictures, with their classes where `target` is "label".
        layer: one, as for `explain`.
        classes: which; by default all with at least 8 pictures.
        count: of clusters; by default where the eigenvalues have their largest gap, 2 to 8.
        method, options, how: as for `explain`.
        target: "predicted" or "label": which pictures a class has, and what is explained.
        progress: called with (done, total) pictures.
        left_out: called with a picture that could not be read, and why; without it they go unsaid.
        threads, engine_pool, workers: as for `evaluate`.

    Raises:
        UsageError: scikit-learn is not installed; no class has enough pictures; something means nothing.
        ModelError: as `explain`.
    """
    _require()
    examples = checked(examples, target)
    if count is not None and count < 2:
        raise UsageError(f"clusters are 2 or more, not {count}")
    wanted = list(model.resolve([layer]))
    if len(wanted) != 1:
        raise UsageError(f"maps of one layer are clustered, and {layer!r} means {len(wanted)}")
    who, threads = shared_out(engine_pool, workers, how.get("providers", "cpu"), threads)
    only = None if classes is None else frozenset(classes)
    work = _Mapping(
        model, wanted[0], find_method(method), dict(options or {}), target, only, len(examples) > 1,
        dict(how, threads=threads),
    )  # fmt: skip
    reasons: list[str] = []
    found: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for done, (example, (number, heat, why)) in enumerate(zip(examples, who.run(work, examples), strict=True), 1):
        if why:
            reasons.append(why)
            if left_out is not None:
                left_out(example.path, why)
        if heat is not None:
            found[number].append((example.path, heat))
        if progress is not None:
            progress(done, len(examples))
    if only is None:
        enough = {n: some for n, some in found.items() if len(some) >= max(FEWEST, (count or 0) + 1)}
        if not enough:
            if len(reasons) == len(examples):
                raise UsageError(reasons[0])
            least = max(FEWEST, (count or 0) + 1)
            raise UsageError(f"no class has {least} pictures or more, which clusters want")
    else:
        enough = {n: found.get(n, []) for n in sorted(only)}
        few = next((n for n, some in enough.items() if len(some) < FEWEST), None)
        if few is not None:
            raise UsageError(f"class {few} has {len(enough[few])} pictures, and clusters want {FEWEST} or more")
    return [
        clustered(n, model.labels.name(n), [p for p, _ in some], np.stack([m for _, m in some]), count)
        for n, some in sorted(enough.items())
    ]


@dataclass(frozen=True)
class _Mapping:
    """The work on one picture: its class, and its map if that class is wanted."""

    model: Model
    layer: str
    method: Method
    options: dict[str, Any]
    target: str
    only: frozenset[int] | None
    lenient: bool
    how: dict[str, Any]

    def begin(self) -> Callable[[Example], tuple[int, np.ndarray | None, str]]:
        def mapped(example: Example) -> tuple[int, np.ndarray | None, str]:
            try:
                return (*found(example), "")
            except (PictureError, NotFiniteError) as error:
                if not self.lenient:
                    raise
                return -1, None, why_left_out(example.path, error)

        def found(example: Example) -> tuple[int, np.ndarray | None]:
            wanted = "predicted" if self.target == "predicted" else int(example.label or 0)
            if self.only is not None and self.target == "label" and wanted not in self.only:
                return int(example.label or 0), None
            e = self.model.explain(
                example.path, [self.layer], [wanted], method=self.method, options=self.options, **self.how
            )
            number = int(e.targets[0, 0])
            heat = next(iter(e.maps.values()))[0, 0]
            if heat.ndim != 2:
                raise UsageError(f"method {self.method.name} gives no map of two dimensions at layer {self.layer!r}")
            if self.only is not None and number not in self.only:
                return number, None
            return number, upsampled(heat.astype(np.float64), (SIDE, SIDE))  # all that is kept of a picture

        return mapped


def clustered(
    number: int, label: str, pictures: Sequence[str], maps: np.ndarray, count: int | None = None, seed: int = 0
) -> Clusters:
    """Cluster maps (pictures, h, w), of any scale; of each the positive part counts, as shares of its sum.

    Raises:
        UsageError: scikit-learn is not installed, or there are no more maps than clusters asked for.
    """
    _require()
    if count is not None and count >= len(maps):
        raise UsageError(
            f"{count} clusters of {len(maps)} pictures of {label}: fewer are wanted than there are pictures"
        )
    from sklearn.cluster import SpectralClustering
    from sklearn.manifold import TSNE, spectral_embedding
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import kneighbors_graph

    positive = np.maximum(upsampled(np.asarray(maps, np.float64), (SIDE, SIDE)), 0)
    total = positive.sum((1, 2), keepdims=True)
    shares = np.where(total > 0, positive / np.where(total > 0, total, 1), 1 / SIDE**2)
    rows = np.sqrt(shares).reshape(len(shares), -1)  # Hellinger's distance: shares are compared as distributions
    if np.ptp(rows, axis=0).max() < SAME:
        flat = np.zeros(len(rows), int)
        return Clusters(number, label, list(pictures), shares, flat, np.zeros((len(rows), 2)), np.zeros(1), 0.0, 0.0)
    neighbours = min(max(int(np.ceil(np.log(len(rows)))) + 2, 4), len(rows) - 1)
    graph = kneighbors_graph(rows, neighbours, include_self=True).toarray()
    graph = 0.5 * (graph + graph.T)
    degrees = graph.sum(1)
    laplacian = np.eye(len(rows)) - graph / np.sqrt(degrees[:, None] * degrees[None])
    eigenvalues = np.linalg.eigvalsh(laplacian)[: MOST + 1]
    # As many groups as eigenvalues near 0: the largest step, as a share of where it leads to.
    few = eigenvalues[: max(min(MOST, len(rows) // 4) + 1, 3)]
    steps = np.diff(few) / (few[1:] + 1e-3)
    k = count or min(int(np.argmax(steps[1:])) + 2 if len(steps) > 1 else 2, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of graphs in several pieces, which is what clusters are
        groups = (
            SpectralClustering(k, affinity="precomputed", random_state=seed, assign_labels="kmeans").fit(graph).labels_
        )
        embedded = spectral_embedding(graph, n_components=k, random_state=seed, drop_first=False)
        places = TSNE(
            perplexity=min(30.0, (len(rows) - 1) / 3), init="pca", random_state=seed, metric="euclidean"
        ).fit_transform(rows.astype(np.float32))
    order = np.argsort(-np.bincount(groups, minlength=k), kind="stable")
    renamed = np.argsort(order)[groups]
    several = 1 < len(np.unique(groups)) < len(rows)
    apart = float(silhouette_score(embedded, groups)) if several else 0.0
    gap = float(steps[k - 1]) if k - 1 < len(steps) else 0.0
    return Clusters(
        number, label, list(pictures), shares, renamed, np.asarray(places, np.float64), eigenvalues, gap, apart,
        count is not None,
    )  # fmt: skip


def _require() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError("clusters need scikit-learn: pip install 'onnxcam[audit]'") from None


# -- written -----------------------------------------------------------------------------------------------------


def save(found: Sequence[Clusters], model: Model, out: str | Path) -> list[Path]:
    """Write `clusters.csv`, `manifest.json` and, for each class, a plot of the embedding and a gallery of each cluster.

    Raises:
        UsageError: the folder cannot be written to.
    """
    folder = writable_folder(out)
    written = []
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["image", "class", "cluster", "x", "y"])
    for old in _of_a_run_before(folder):
        old.unlink(missing_ok=True)
    for c in found:
        for picture, group, (x, y) in zip(c.pictures, c.cluster, c.places, strict=True):
            rows.writerow([picture, c.number, int(group), f"{x:.5g}", f"{y:.5g}"])
        for k in range(c.count):
            image = gallery(c, model, k)
            path = folder / f"class-{c.number}-cluster-{k}.jpg"
            written.append(write_atomically(path, lambda s, i=image: i.save(s, "JPEG", quality=85)))  # type: ignore[misc]
        written.append(_plot(c, folder / f"class-{c.number}.png"))
    content = stream.getvalue().encode()
    written.append(write_atomically(folder / "clusters.csv", lambda s: s.write(content)))
    manifest = {
        "model": {"name": model.name, "sha256": model.sha256},
        "classes": [
            {
                "class": c.number, "label": c.label, "pictures": len(c.pictures), "gap": c.gap, "silhouette": c.apart,
                "clusters": np.bincount(c.cluster).tolist(), "eigenvalues": c.eigenvalues.tolist(),
            }
            for c in found
        ],
    }  # fmt: skip
    text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    written.append(write_atomically(folder / "manifest.json", lambda s: s.write(text)))
    return written


def _of_a_run_before(folder: Path) -> list[Path]:
    """The pictures that the folder's manifest speaks of."""
    try:
        classes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["classes"]
        listed = [(int(c["class"]), len(c["clusters"])) for c in classes]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    galleries = [folder / f"class-{number}-cluster-{k}.jpg" for number, count in listed for k in range(count)]
    return galleries + [folder / f"class-{number}.png" for number, _ in listed]


def gallery(c: Clusters, model: Model, k: int, columns: int = 6) -> Image.Image:
    """The mean map of a cluster, and the pictures nearest to it with their maps drawn over them."""
    from onnxcam.render import text
    from onnxcam.render.overlay import blend

    chosen = c.typical(k)[:SHOWN]
    tiles = [blend(Image.new("RGB", (TILE, TILE), "white"), c.heat(k), size=TILE)]
    for i in chosen:
        view = model.preprocess.apply(open_image(c.pictures[i]), model.spec).view
        tiles.append(blend(view, c.maps[i], size=TILE).resize((TILE, TILE)))
    face = text.font(15)
    line = text.line_height(face) + 8
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 6) + 6, lines * (TILE + 6) + 6 + line), "white")
    draw = ImageDraw.Draw(sheet)
    size = int((c.cluster == k).sum())
    title = f"{c.label}: cluster {k}, {size} of {len(c.pictures)} pictures; first its mean map"
    draw.text((8, 6), title, fill=text.INK, font=face)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (6 + i % columns * (TILE + 6), line + 6 + i // columns * (TILE + 6)))
    return sheet


def _plot(c: Clusters, path: Path) -> Path:
    """The embedding, and the eigenvalues that say how many clusters there are."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the plot needs matplotlib: pip install 'onnxcam[audit]'") from None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for k in range(c.count):
        members = c.cluster == k
        left.scatter(*c.places[members].T, s=18, label=f"{k}: {int(members.sum())} pictures", color=f"C{k}")
    left.set(xticks=[], yticks=[])
    left.set_title(f"{c.label}, {len(c.pictures)} maps (t-SNE)", parse_math=False)
    left.legend(fontsize=8, title="cluster", title_fontsize=8)
    right.plot(np.arange(1, len(c.eigenvalues) + 1), c.eigenvalues, "o-", color="0.3", markersize=4)
    why = "asked for" if c.asked else "largest gap" if c.count > 1 else "all the same"
    right.axvline(c.count + 0.5, color="C3", linestyle=":", label=f"{why}: {c.count} clusters")
    right.set(title="eigenvalues of the Laplacian", xlabel="number")
    right.legend(fontsize=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scripts that the font has no letters for, and plots that are full
        return write_atomically(path, lambda s: figure.savefig(s, format="png", dpi=130))
