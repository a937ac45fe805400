"""The pictures of a set and what is known of them: a class, boxes, a mask.

Boxes come as a CSV (file, x0, y0, x1, y1, in pixels of the upright picture; a class column is ignored), a COCO JSON or
a folder of Pascal VOC XML files; masks as a folder of pictures of the same stems, white where the object is; classes as
a CSV (file, class). Everything that is read is matched by the file's name; rows of a CSV or a COCO JSON also by the
folders before it, where several have one name.
"""

from __future__ import annotations

import csv
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.locations import is_url, name_of
from onnxcam.pictures import open_image, to_rgb

Box = tuple[float, float, float, float]  # x, y, width, height
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Example:
    """One picture: its path or URL, its class if known, and where the object is, as boxes or as a mask."""

    path: str
    label: int | None = None
    boxes: tuple[Box, ...] = ()
    mask: Path | None = None

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def known(self) -> str:
        """A hash of all that is known of it, and of its size in bytes: what a value depends on beside the run."""
        size = "" if is_url(self.path) or not Path(self.path).exists() else Path(self.path).stat().st_size
        label = None if self.label is None else int(self.label)
        boxes = [[float(v) for v in box] for box in self.boxes]
        text = json.dumps([size, label, boxes, None if self.mask is None else str(self.mask)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def located(self) -> bool:
        return bool(self.boxes) or self.mask is not None

    def seen(self, window: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray | None, list[Box]]:
        """The truth as the model sees it: a mask of `size` (height, width), and boxes in its pixels.

        `window` is what the model saw of the picture: left, top, right, bottom (see `Prepared`).
        """
        from onnxcam.metrics.localisation import box_mask

        left, top, right, bottom = window
        if self.mask is not None:
            whole = np.asarray(to_rgb(open_image(str(self.mask))).convert("L")) > 127
            return _sampled(whole, window, size), []
        if not self.boxes:
            return None, []
        wide, high = size[1] / (right - left), size[0] / (bottom - top)
        boxes = []
        for x, y, width, height in self.boxes:
            x0, y0 = max((x - left) * wide, 0.0), max((y - top) * high, 0.0)
            x1, y1 = min((x + width - left) * wide, size[1]), min((y + height - top) * high, size[0])
            if x1 > x0 and y1 > y0:
                boxes.append((x0, y0, x1 - x0, y1 - y0))
        return box_mask(boxes, size), boxes


def _sampled(whole: np.ndarray, window: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The mask at the centres of the cells that the model saw; nothing beyond the picture."""
    left, top, right, bottom = window
    xs = np.floor(left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(int)
    ys = np.floor(top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(int)
    inside = ((ys >= 0) & (ys < whole.shape[0]))[:, None] & ((xs >= 0) & (xs < whole.shape[1]))[None]
    found: np.ndarray = whole[np.clip(ys, 0, whole.shape[0] - 1)][:, np.clip(xs, 0, whole.shape[1] - 1)] & inside
    return found


def examples(
    pictures: Iterable[str | Path],
    *,
    labels: str | Path | None = None,
    boxes: str | Path | None = None,
    masks: str | Path | None = None,
    coco: str | Path | None = None,
    voc: str | Path | None = None,
    offset: int = 0,
) -> list[Example]:
    """The pictures with what the files say of them; `offset` is added to the classes.

    Raises:
        UsageError: a file is missing or says nothing of any of the pictures, or more than one says where objects are.
    """
    paths = list(dict.fromkeys(str(p) for p in pictures))
    if not paths:
        raise UsageError("there is no picture to evaluate on")
    for path in paths:
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{path!r}: tables are UTF-8 and this name is not: rename the file") from None
    given = [name for name, value in (("boxes", boxes), ("masks", masks), ("coco", coco), ("voc", voc)) if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say where the objects are: give one")
    classes = _Named[int]() if labels is None else _classes(Path(labels))
    found = _Named[Box]()
    if boxes is not None:
        found = _csv_boxes(Path(boxes))
    elif coco is not None:
        found = _coco_boxes(Path(coco))
    elif voc is not None:
        found = _voc_boxes(Path(voc), [name_of(p) for p in paths])
    drawn = {} if masks is None else _masks(Path(masks))
    out = []
    for p in paths:
        numbers = set(classes.of(p))
        if len(numbers) > 1:
            raise UsageError(
                f"{labels} gives {p} the classes {' and '.join(str(n) for n in sorted(numbers))}: one is wanted"
            )
        label = next(iter(numbers)) + offset if numbers else None
        out.append(Example(p, label, tuple(found.of(p)), drawn.get(Path(name_of(p)).stem)))
    if labels is not None and all(e.label is None for e in out):
        raise UsageError(f"{labels} names none of the pictures: its first column is the file's name")
    if given and not any(e.located for e in out):
        where = boxes or masks or coco or voc
        raise UsageError(f"{where} says nothing of any of the pictures")
    return out


Value = TypeVar("Value")


class _Named(Generic[Value]):
    """What a file says of pictures, by the names it has for them."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[Value]] = defaultdict(list)
        self.ending: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)

    def add(self, file: str, *values: Value) -> None:
        parts = _parts(file)
        self.values[parts].extend(values)
        for k in range(len(parts)):
            self.ending[parts[k:]].add(parts)

    def of(self, path: str) -> list[Value]:
        """What is said of a picture: by its name, or where that is the name of several, by the folders before it.

        Raises:
            UsageError: several may be meant.
        """
        parts = _parts(path)
        for end in (parts[k:] for k in range(len(parts))):
            files = self.ending.get(end, set())
            if len(files) == 1 or end in files:
                return self.values[end if end in files else next(iter(files))]
            if files:
                some = " and ".join("/".join(file) for file in sorted(files)[:2])
                raise UsageError(f"{path}: {some} have its name, and which is meant cannot be told from the folders")
        return []


def _parts(path: str) -> tuple[str, ...]:
    return PurePath(urlsplit(path).path if is_url(path) else path).parts


TARGETS = ("predicted", "label")


def checked(listed: Sequence[Example], target: str) -> list[Example]:
    """Every picture once, and the class to be explained known: what is predicted, or the label of each.

    Raises:
        UsageError: it is not.
    """
    if target not in TARGETS:
        raise UsageError(f"the class that is explained is {' or '.join(TARGETS)}, not {target!r}")
    if target == "label" and any(e.label is None for e in listed):
        missing = next(e for e in listed if e.label is None)
        raise UsageError(f"the class of {missing.name} is not known: give --labels, or explain what is predicted")
    return list({e.path: e for e in listed}.values())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _table(path: Path, *needed: tuple[str, ...]) -> list[list[str]]:
    """The columns of a CSV by any of their names, in the order asked."""
    rows = list(csv.reader(_text(path).splitlines()))
    head = [name.strip().lower() for name in rows[0]] if rows else []
    places = []
    for names in needed:
        place = next((head.index(name) for name in names if name in head), None)
        if place is None:
            raise UsageError(f"{path} has no column {names[0]!r}: it has {', '.join(head) or 'nothing'}")
        places.append(place)
    return [[row[i] for i in places] for row in rows[1:] if len(row) > max(places)]


FILE = ("file", "image", "filename", "name")


def _classes(path: Path) -> _Named[int]:
    found = _Named[int]()
    try:
        for file, number in _table(path, FILE, ("class", "class_index", "label")):
            found.add(file, int(number))
    except ValueError as error:
        raise UsageError(f"{path}: classes are whole numbers: {error}") from None
    return found


def _csv_boxes(path: Path) -> _Named[Box]:
    found = _Named[Box]()
    corners = (("x0", "xmin", "left"), ("y0", "ymin", "top"), ("x1", "xmax", "right"), ("y1", "ymax", "bottom"))
    for file, *numbers in _table(path, FILE, *corners):
        try:
            x0, y0, x1, y1 = (float(v) for v in numbers)
        except ValueError:
            raise UsageError(f"{path}: {', '.join(numbers)} is no box of {file}") from None
        found.add(file, (x0, y0, x1 - x0, y1 - y0))
    return found


def _coco_boxes(path: Path) -> _Named[Box]:
    found = _Named[Box]()
    try:
        data = json.loads(_text(path))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        for a in data["annotations"]:
            x, y, width, height = a["bbox"]
            found.add(names[a["image_id"]], (float(x), float(y), float(width), float(height)))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no COCO file of boxes: {type(error).__name__}: {error}") from None
    return found


def _voc_boxes(folder: Path, pictures: Sequence[str]) -> _Named[Box]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder of Pascal VOC files")
    found = _Named[Box]()
    for picture in dict.fromkeys(pictures):
        file = folder / f"{Path(picture).stem}.xml"
        if not file.exists():
            continue
        try:
            for box in ElementTree.fromstring(_text(file)).iter("bndbox"):
                x0, y0, x1, y1 = (float(box.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax"))
                found.add(picture, (x0, y0, x1 - x0, y1 - y0))
        except (ElementTree.ParseError, ValueError) as error:
            raise UsageError(f"{file} is no Pascal VOC file: {error}") from None
    return found


def _masks(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder of masks")
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES}
