"""What a coverage sweep found, as Markdown; and what counts as a failure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.coverage_cases import Case

GRADIENT = 1e-3  # relative to autograd's, by norm
FLOAT64 = 1e-5  # the same where all is computed in float64; exporters fold weights in float32
ENGINES = 1e-3  # largest difference of the engines' maps, relative to the largest value
ROUNDING = 10  # times what a change of the input in its last digits does, where that is more
STEEPEST = 0.1  # no gradient that is further off passes, whatever rounding does
EXPORTED = 1e-2  # largest difference of the logits, likewise
STEPS = ("load", "layers", "cam/onnx", "lrp/onnx", "gradient/onnx", "cam/numpy", "lrp/numpy", "gradient/numpy")

Stored = Mapping[str, Any]
Row = tuple[Case, Stored | None]


@dataclass(frozen=True)
class Failure:
    """Where a case fails: at its export or at a step of the explanation, how, at which op, and what is said of it."""

    step: str
    kind: str
    op: str
    message: str

    @property
    def ours(self) -> bool:
        return self.step != "export"

    def __str__(self) -> str:
        at = f" at {self.op}" if self.op else ""
        return f"{self.step} {self.kind}{at}: {self.message}"


def failure(stored: Stored) -> Failure | None:
    """The first thing that is not as it should be; None where all is well, or has not been tried."""
    if stored["status"] != "ok":
        return Failure("export", stored["status"], stored.get("error", ""), stored.get("message", ""))
    if stored.get("ort", 0.0) > EXPORTED:
        return Failure("export", "differs", "", f"ONNX Runtime's logits are off by {stored['ort']:.0e}")
    steps = (stored.get("explained") or {}).get("steps", {})
    for name in STEPS:
        step = steps.get(name)
        if step is None or step["status"] == "running":
            continue
        if step["status"] != "ok":
            return Failure(name, step["status"], step.get("op") or "", step.get("message", ""))
        bound = max(ENGINES, ROUNDING * step.get("rounding", 0.0))
        if name.startswith("gradient"):
            bends = [steps.get(f"gradient/{engine}", {}).get("beside", 1.0) for engine in ("onnx", "numpy")]
            bound = max(bound, 3 * (stored.get("torch32") or 0.0), STEEPEST if min(bends) <= GRADIENT else 0.0)
            bound = max(bound, _float32(steps))
        if step.get("apart", 0.0) > bound:
            return Failure(name, "engines differ", "", f"by {step['apart']:.0e}")
        agrees = (
            not name.startswith("gradient") or _excused(steps, step) or gradient_agrees(step, stored.get("torch32"))
        )
        if not agrees:
            return Failure(name, "not autograd's", "", _off(step, stored))
    return None


def in_float64(steps: Mapping[str, Any]) -> bool:
    """True where the gradient is autograd's with all computed in float64: what it is off by in float32 is rounding."""
    error = steps.get("float64", {}).get("error")
    return error is not None and error <= FLOAT64


def _float32(steps: Mapping[str, Any]) -> float:
    """What float32 may do to a gradient that is autograd's in float64: three times what it does to engine numpy's,
    which is the same walk in float32."""
    step = steps.get("gradient/numpy", {})
    return 3 * gradient_error(step) if in_float64(steps) and step.get("status") == "ok" else 0.0


def _excused(steps: Mapping[str, Any], step: Stored) -> bool:
    return gradient_error(step) <= _float32(steps)


def _off(step: Stored, stored: Stored) -> str:
    own = f", and PyTorch's float32 from its float64 by {stored['torch32']:.0e}" if stored.get("torch32") else ""
    return f"off by {gradient_error(step):.0e}{own}"


def gradient_error(step: Stored) -> float:
    """Against autograd in float32, or in float64 where that is closer."""
    return float(min(step[bits] for bits in ("torch32", "torch64") if bits in step))


def gradient_agrees(step: Stored, torchs_own: float | None) -> bool:
    """Within 1e-3 of autograd; or no further from it than three times what rounding does to PyTorch's own, or ours.

    Where rounding does more than a tenth of it, nothing can be said, and that is a failure too; but where ours is
    autograd's right beside the input, the two are on different sides of a rectifier's bend.
    """
    if step.get("beside", 1.0) <= GRADIENT:
        return True
    own = torchs_own or 0.0 if "torch64" in step else 0.0
    return gradient_error(step) <= max(GRADIENT, min(STEEPEST, max(3 * own, 3 * step.get("rounding", 0.0))))


def whole(stored: Stored | None) -> bool:
    """True where every step has been tried."""
    steps = ((stored or {}).get("explained") or {}).get("steps", {})
    return all(steps.get(name, {}).get("status", "running") != "running" for name in STEPS)


def passed(stored: Stored | None) -> bool:
    return stored is not None and stored["status"] == "ok" and whole(stored) and failure(stored) is None


def outright(stored: Stored) -> bool:
    """True where a case passes without what rounding does being considered."""
    steps = stored["explained"]["steps"]
    apart = max(steps[name].get("apart", 0.0) for name in STEPS)
    error = max(gradient_error(steps[name]) for name in STEPS if name.startswith("gradient"))
    return passed(stored) and apart <= ENGINES and error <= GRADIENT


def autograds(stored: Stored, in_float32: bool = False) -> bool:
    """True where both engines' gradients are autograd's in float32; or else ours in float64, if that may do."""
    steps = stored["explained"]["steps"]
    plainly = all(gradient_error(steps[f"gradient/{engine}"]) <= GRADIENT for engine in ("onnx", "numpy"))
    excused = all(_excused(steps, steps[f"gradient/{engine}"]) for engine in ("onnx", "numpy"))
    return plainly or (not in_float32 and excused)


def summary_line(stored: Stored | None) -> str:
    """One case in one line, for the terminal."""
    if stored is None:
        return "not run"
    if (found := failure(stored)) is not None:
        return f"FAILED {found}"
    steps = (stored.get("explained") or {}).get("steps")
    if steps is None:
        return f"exported in {stored['seconds']} s, {stored['nodes']} nodes"
    took = sum(step.get("seconds", 0.0) for step in steps.values())
    gradient = steps.get("gradient/onnx", {})
    error = f", gradient {gradient_error(gradient):.0e}" if gradient.get("status") == "ok" else ""
    return f"ok, {steps['load'].get('nodes')} nodes, {took:.1f} s{error}"


# -- the page ----------------------------------------------------------------------------------------------------

HOW = """\
# Which architectures are explained

Written by `python -m benchmarks.coverage -o docs/coverage.md`, which goes on where it was broken off. Every
architecture has seeded random weights, far from the identity, and one random picture. It is exported by PyTorch's
TorchScript exporter (opset 17) or its dynamo exporter (opset 20), then, with PyTorch out of sight, explained on both
engines: Relevance-CAM at the suggested layers, LRP to the input, and the gradient at the input, every entry of it,
which is compared with autograd. A case passes where every step gives a finite result, the engines agree to
{engines:.0e} of the largest value, and the gradient is autograd's to {gradient:.0e} by norm. Some networks and rules
are too steep for that in float32 (a rectifier flips, a sum that relevance is divided by is nearly 0). So the engines
may also be {rounding} times as far apart as a change of the input in its last digits (3e-7) moves the maps, and where
the gradient is further off, it is asked again with everything in float64, where it must be autograd's to
{float64:.0e}. Where PyTorch has none in float64, or the reference evaluator does not run the model, it may be three
times as far off as such a change moves it, but never by more than a tenth, or must be autograd's after a step of 1e-5
of the input, where a rectifier stands at its bend. "Outright" counts the cases that need none of this, and "gradient"
those whose gradient does not: in float32, and with float64. What cannot be exported, or what ONNX Runtime does not
run, is counted apart.

{machine} Results of {dates}, by {versions} of onnxcam's code.
"""


def document(rows: Sequence[Row]) -> str:
    """Everything as one page."""
    from benchmarks.peers import version
    from benchmarks.table import machine

    known = [
        (case, stored)
        for case, stored in rows
        if stored is not None and stored["status"] != "running" and not _superseded(case, stored, rows)
    ]
    stamps = sorted(s["explained"]["date"][:10] for _, s in known if s.get("explained"))
    codes = {s["explained"]["code"] for _, s in known if s.get("explained")}
    dates = " to ".join(dict.fromkeys((stamps[0], stamps[-1]))) if stamps else "no day"
    parts = [
        HOW.format(
            engines=ENGINES, gradient=GRADIENT, rounding=ROUNDING, float64=FLOAT64, dates=dates,
            machine=f"{machine()[:-1]}, timm {version('timm')}.",
            versions=f"{len(codes)} version{'s' if len(codes) != 1 else ''}",
        ),
        "\n## In numbers\n\n", counts(known, rows),
        "\n## How exact\n\n", exactness(known),
        "\n## What fails\n\n", failures(known),
    ]  # fmt: skip
    for family, table in (("torchvision", by_exporter), ("timm", by_module), ("light", by_exporter)):
        members = [(case, stored) for case, stored in known if case.family == family]
        if members:
            parts += [f"\n## {family}\n\n", table(members)]
    return "".join(parts)


def _superseded(case: Case, stored: Stored, rows: Sequence[Row]) -> bool:
    """True for an export that failed where another exporter, which was to stand in for it, has given a model."""
    return stored["status"] != "ok" and any(
        other.first == case.exporter and other.name == case.name and found is not None and found["status"] == "ok"
        for other, found in rows
    )


def counts(known: Sequence[Row], rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = defaultdict(list)
    planned: Counter[str] = Counter()
    for case, _ in rows:
        planned[_group(case)] += case.first is None
    for case, stored in known:
        groups[_group(case)].append((case, stored))
    lines = []
    for name, members in groups.items():
        good = [s for _, s in members if s is not None and not ((f := failure(s)) is not None and not f.ours)]
        tried = [s for s in good if s.get("explained")]
        full = sum(passed(s) for s in tried)
        plainly = sum(passed(s) and outright(s) for s in tried)
        single = sum(passed(s) and autograds(s, in_float32=True) for s in tried)
        exact = sum(passed(s) and autograds(s) for s in tried)
        ours = sum(failure(s) is not None for s in tried)
        share = f"{100 * full / (full + ours):.1f} %" if full + ours else "–"
        lines.append(
            [
                name,
                *map(str, (planned[name], len(members), len(good), len(tried), full, plainly, single, exact, ours)),
                share,
            ]
        )
    head = [
        "", "planned", "tried", "exported, and runs", "explained", "pass", "outright", "gradient, float32",
        "gradient, float32 or 64", "fail", "share",
    ]  # fmt: skip
    return _markdown(head, lines)


def _group(case: Case) -> str:
    return case.family if case.family == "timm" else f"{case.family}, {case.exporter}"


def exactness(known: Sequence[Row]) -> str:
    """How many of the cases lie within 1e-5, 1e-4, 1e-3."""

    def figures(step: str, name: Callable[[Stored], float | None]) -> list[float]:
        found = []
        for _, stored in known:
            entry = ((stored or {}).get("explained") or {}).get("steps", {}).get(step, {})
            if entry.get("status") == "ok" and (value := name(entry)) is not None:
                found.append(value)
        return found

    wanted = {
        "gradient, engine onnx, to autograd": figures("gradient/onnx", gradient_error),
        "gradient, engine numpy, to autograd": figures("gradient/numpy", gradient_error),
        "gradient, all in float64, to autograd": figures("float64", lambda s: s.get("error")),
        "engines apart, Relevance-CAM": figures("cam/numpy", lambda s: s.get("apart")),
        "engines apart, LRP to the input": figures("lrp/numpy", lambda s: s.get("apart")),
        "engines apart, gradient": figures("gradient/numpy", lambda s: s.get("apart")),
        "LRP to the input moved by rounding, where that was asked": figures("lrp/numpy", lambda s: s.get("rounding")),
        "relevance lost on the way to the input": figures("lrp/onnx", lambda s: s.get("residual")),
    }
    lines = []
    for name, values in wanted.items():
        if values:
            middle = sorted(values)[len(values) // 2]
            within = [f"{sum(v <= bound for v in values)}" for bound in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)]
            lines.append([name, str(len(values)), f"{middle:.1e}", *within])
    return _markdown(["", "cases", "median", "≤ 1e-6", "≤ 1e-5", "≤ 1e-4", "≤ 1e-3", "≤ 1e-2"], lines)


def failures(known: Sequence[Row]) -> str:
    """Grouped by what is said, the exporters' own apart."""
    groups: dict[tuple[bool, str, str, str], list[str]] = defaultdict(list)
    for case, stored in known:
        found = failure(stored) if stored is not None else None
        if found is not None:
            engine = found.step.partition("/")[2]
            groups[found.ours, f"{found.kind}, {engine or found.step}", found.op, plain(found.message)].append(
                _short(case)
            )
    if not groups:
        return "Nothing.\n"
    lines = []
    for (ours, kind, op, message), names in sorted(groups.items(), key=lambda g: (not g[0][0], -len(g[1]))):
        who = "onnxcam" if ours else "exporter"
        lines.append([who, kind, op or "–", message, str(len(names)), ", ".join(names)])
    return _markdown(["whose", "what", "op", "message", "cases", "which"], lines)


def plain(message: str, width: int = 140) -> str:
    """A message without the names of nodes and tensors, so that like ones are alike."""
    import re

    text = re.sub(r"'[^']*'", "…", message)
    text = re.sub(r"\d[\d, x]*\d|\d", "#", text)
    return text[:width].replace("|", "\\|")


def _short(case: Case) -> str:
    return f"{case.name} ({case.exporter})" if case.family != "timm" else case.name


def by_exporter(members: Sequence[Row]) -> str:
    """A row for each architecture, a column for each exporter."""
    found: dict[str, dict[str, Stored | None]] = defaultdict(dict)
    for case, stored in members:
        found[case.name][case.exporter] = stored
    exporters = list(dict.fromkeys(case.exporter for case, _ in members))
    lines = []
    for name, stored in found.items():
        any_of = next(s for s in stored.values() if s is not None)
        size, parameters = any_of.get("size", ""), any_of.get("parameters")
        millions = f"{parameters / 1e6:.1f} M" if parameters else ""
        lines.append([name, millions, str(size), *(_cell(stored.get(e)) for e in exporters)])
    return _markdown(["", "parameters", "side", *exporters], lines)


def _cell(stored: Stored | None) -> str:
    """Nodes, gradient error and how far the engines are apart; or where it fails."""
    if stored is None:
        return "not run"
    if (found := failure(stored)) is not None:
        return f"**{found.step} {found.kind}**{f' ({found.op})' if found.op else ''}"
    steps = (stored.get("explained") or {}).get("steps", {})
    if steps.get("gradient/onnx", {}).get("status", "running") == "running":
        return "begun" if steps else "exported"
    apart = max(
        (steps[f"{what}/numpy"].get("apart", 0.0) for what in ("cam", "lrp") if f"{what}/numpy" in steps), default=None
    )
    text = f"{steps['load'].get('nodes')} nodes, {gradient_error(steps['gradient/onnx']):.0e}"
    return f"{text}, {apart:.0e}" if apart is not None else f"{text}, engine onnx only"


def by_module(members: Sequence[Row]) -> str:
    """A row for each file of timm."""
    found: dict[str, list[Row]] = defaultdict(list)
    for case, stored in members:
        found[case.module].append((case, stored))
    lines = []
    for module, rows in sorted(found.items()):
        good = [case.name for case, s in rows if passed(s)]
        bad = [case.name for case, s in rows if s is not None and failure(s) is not None]
        rest = [case.name for case, s in rows if case.name not in good and case.name not in bad]
        worst = _worst(s for _, s in rows if s is not None)
        names = ", ".join([*good, *(f"**{name}**" for name in bad), *(f"({name})" for name in rest)])
        lines.append([module, f"{len(good)}/{len(good) + len(bad)}", worst, names])
    head = ["module", "pass", "gradient, worst", "architectures (**failed**, (not run to the end))"]
    return _markdown(head, lines)


def _worst(stored: Iterable[Stored]) -> str:
    errors = []
    for s in stored:
        step = (s.get("explained") or {}).get("steps", {}).get("gradient/onnx", {})
        if step.get("status") == "ok":
            errors.append(gradient_error(step))
    return f"{max(errors):.0e}" if errors else "–"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))
