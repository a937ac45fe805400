"""Which architectures the coverage sweep covers: all of torchvision, a sample of timm, the light models of onnx.

The sample of timm is a committed list (`coverage_timm.txt`), so that a figure is always of the same architectures;
`choose` makes it anew. Cases come in the order of breadth: the smallest architecture of every module first.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).with_name("coverage_timm.txt")
FAMILIES = ("torchvision", "timm", "light")
EXPORTERS = {
    "torchvision": ("torchscript", "dynamo"),
    "timm": ("torchscript", "dynamo"),
    "light": ("shipped", "seeded"),
}
LARGEST = 60e6  # parameters of what is sampled beyond the smallest of a module


@dataclass(frozen=True)
class Case:
    """One architecture out of one exporter.

    Attributes:
        family: torchvision, timm or light.
        name: as the family calls it.
        exporter: torchscript or dynamo; for the light models "shipped", or "seeded" where weights that are all alike
            make room for random ones.
        size: side of the input.
        module: the file of timm that the architecture is in.
        first: only where this exporter gives no model is the case run; None where it is run anyway.
    """

    family: str
    name: str
    exporter: str
    size: int
    module: str = ""
    first: str | None = None

    @property
    def key(self) -> str:
        return f"{self.family}/{self.exporter}/{self.name}"


# Global pooling takes any size; these have an adaptive pooling that exporters only know for a size it divides, or
# positions for one size.
_FULL = re.compile(r"alexnet|vgg|vit|maxvit|swin|inception|googlenet")


def torchvision_cases(exporters: Sequence[str] = EXPORTERS["torchvision"]) -> Iterator[Case]:
    """All classifiers of torchvision, the smallest first."""
    from exporters.torch_common import import_torchvision

    models = import_torchvision().models

    def parameters(name: str) -> int:
        return int(next(iter(models.get_model_weights(name))).meta["num_params"])

    for name in sorted(models.list_models(module=models), key=parameters):
        for exporter in exporters:
            yield Case("torchvision", name, exporter, 224 if _FULL.search(name) else 160)


def timm_cases(exporters: Sequence[str] = EXPORTERS["timm"]) -> Iterator[Case]:
    """The sample: the smallest architecture of every module, then the next of every module; very large ones come last.

    Each is run through the first of the exporters, and through the others where that gives no model.
    """
    ranks: Counter[str] = Counter()
    found = []
    for line in SAMPLE.read_text().splitlines():
        module, name, size, millions = line.split()
        through = [
            Case("timm", name, exporter, int(size), module, exporters[0] if i else None)
            for i, exporter in enumerate(exporters)
        ]
        parameters = float(millions[:-1]) * 1e6
        found.append((parameters > LARGEST, ranks[module], parameters, name, through))
        ranks[module] += 1
    for *_, through in sorted(found):
        yield from through


def light_cases(exporters: Sequence[str] = EXPORTERS["light"]) -> Iterator[Case]:
    """The models of the ONNX zoo of 2017 that the onnx package ships without their weights."""
    for path in sorted(light_folder().glob("light_*.onnx")):
        for exporter in exporters:
            yield Case("light", path.stem, exporter, 224)


def light_folder() -> Path:
    import onnx.backend.test.data as data

    return Path(next(iter(data.__path__)), "light")


def cases(
    families: Iterable[str] = FAMILIES, exporters: Sequence[str] | None = None, match: Sequence[str] = ("*",)
) -> list[Case]:
    """The cases of some families, in turns of one each, so that a sweep that is broken off has seen all kinds."""
    makers = {"torchvision": torchvision_cases, "timm": timm_cases, "light": light_cases}
    lists = []
    for family in families:
        known = [e for e in EXPORTERS[family] if exporters is None or e in exporters]
        lists.append([c for c in makers[family](known) if any(fnmatch.fnmatchcase(c.name, m) for m in match)])
    # Families are of different length: each is spread evenly over the whole.
    order = [((i + 0.5) / len(members), n, c) for n, members in enumerate(lists) for i, c in enumerate(members)]
    return [case for _, _, case in sorted(order, key=lambda row: row[:2])]


# -- the sample of timm ------------------------------------------------------------------------------------------

_SIZES = set(
    "atto femto pico nano tiny mini small medium base large huge giant gigantic enormous so150m so150m2 so400m xxtiny "
    "xtiny xsmall xxsmall xxs xs s m l xl xxl b t n h ti lite micro zepto test mediumd betwixt little wee pwee dpwee "
    "dwee sbb sbb2 intermediate".split()
)


def design(name: str) -> str:
    """The name without what says how large it is: numbers, and words such as tiny or base."""
    words = [re.sub(r"\d+", "#", word) for word in name.split("_") if word not in _SIZES]
    return "_".join(word for word in words if word not in ("#", "x#", "p#", "w#", "#x#"))


def choose(wanted: int = 420) -> list[tuple[str, str, int, int]]:
    """(module, name, size, parameters): of every module its smallest architecture, then one of every design and so on.

    Rounds over the modules: first the smallest of each, then the smallest of designs not seen yet, then what is left,
    each by number of parameters, until there are as many as wanted.
    """
    pool: dict[str, list[tuple[int, str, dict[str, Any]]]] = defaultdict(list)
    for module, name, parameters, config in sorted(_timm()):
        pool[module].append((parameters, name, config))
    taken: dict[str, list[tuple[int, str, dict[str, Any]]]] = {m: [] for m in pool}
    for limit in (LARGEST, float("inf")):
        for module, members in pool.items():
            if not taken[module]:
                taken[module] = sorted((e for e in members if e[0] <= limit), key=lambda e: e[:2])[:1]

    def unseen(module: str, by_design: bool) -> tuple[int, str, dict[str, Any]] | None:
        designs = {design(name) for _, name, _ in taken[module]}
        counts = {parameters for parameters, _, _ in taken[module]}
        found = [
            entry
            for entry in pool[module]
            if entry not in taken[module] and entry[0] <= LARGEST
            and (design(entry[1]) not in designs if by_design else entry[0] not in counts)
        ]  # fmt: skip
        return min(found, key=lambda e: e[:2]) if found else None

    for by_design in (True, False):
        more = True
        while more and sum(map(len, taken.values())) < wanted:
            more = False
            for module in pool:
                entry = unseen(module, by_design)
                if entry is not None and sum(map(len, taken.values())) < wanted:
                    taken[module].append(entry)
                    more = True
    return [(m, name, _side(config), n) for m in pool for n, name, config in taken[m]]


def _timm() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """(module, name, parameters, configuration) of every classifier of timm."""
    import torch

    from exporters.torch_common import import_torchvision

    import_torchvision()
    import timm
    from timm.models import _registry

    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
        except Exception as error:  # some compute with their weights while they are built
            print(f"  {name}: {type(error).__name__}: {error}")
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False)
        yield (
            _registry._model_to_module[name], name, sum(p.numel() for p in model.parameters()), model.pretrained_cfg
        )  # fmt: skip


def _side(config: dict[str, Any]) -> int:
    """160 where the architecture takes any size, else its own."""
    side = int((config.get("input_size") or (3, 224, 224))[-1])
    return side if config.get("fixed_input_size") else min(side, 160)


def write_sample(wanted: int = 420) -> None:
    rows = sorted(choose(wanted), key=lambda row: row[0])
    SAMPLE.write_text("".join(f"{module} {name} {size} {n / 1e6:.1f}M\n" for module, name, size, n in rows))
