"""What was measured, one JSON line for each model and contender, so that a broken-off run goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.timing import summary


@dataclass(frozen=True)
class Record:
    """One contender on one model.

    Attributes:
        model, contender: keys.
        times: seconds of every run by who ran; `plain` is inference in the same turns, `same` onnxcam at the same job.
        figures: other numbers.
        key: of what was measured; where it differs now, the record is out of date.
    """

    model: str
    contender: str
    times: Mapping[str, list[float]]
    figures: Mapping[str, float] = field(default_factory=dict)
    key: str = ""

    def seconds(self, who: str, statistic: str = "median") -> float:
        return summary(self.times[who], statistic)

    def ratio(self, to: str = "plain", statistic: str = "median") -> float:
        """How many times the time of `to` the contender takes."""
        return self.seconds(self.contender, statistic) / self.seconds(to, statistic)


class Results:
    """Records by (model, contender), kept in a file of JSON lines; the last line of a pair counts."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[tuple[str, str], Record] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = Record(**json.loads(line))
                self.records[record.model, record.contender] = record

    def get(self, model: str, contender: str, key: str) -> Record | None:
        """The record, where there is one and it is of `key`."""
        found = self.records.get((model, contender))
        return found if found is not None and found.key == key else None

    def add(self, record: Record) -> Record:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.records[record.model, record.contender] = record
        return record


def sources_hash() -> str:
    """Changes with any line of onnxcam, so that figures are never of another version than the one at hand."""
    import onnxcam

    digest = hashlib.sha256()
    for path in sorted(Path(onnxcam.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
