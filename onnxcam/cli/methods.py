"""`onnxcam methods`: every method with its source, what it costs and what it needs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from onnxcam.methods import METHODS, Method, method as find_method


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("methods", help="what there is to explain by", description=__doc__)
    p.add_argument("names", metavar="NAME", nargs="*", help="one or some of them (default: all)")
    p.add_argument("--black-box", action="store_true", help="those that need no operator to be known")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=run_methods)


def run_methods(arguments: argparse.Namespace) -> int:
    chosen = [find_method(name) for name in arguments.names] or list(METHODS.values())
    if arguments.black_box:
        chosen = [m for m in chosen if not m.walks]
    if arguments.json:
        print(json.dumps([described(m) for m in chosen]))
        return 0
    from onnxcam.cli.tables import print_table, say

    print_table(
        ("method", "explains", "cost", "needs", "compiles", "options", "about"),
        [
            (
                (
                    m.name,
                    "input" if m.at_input else "layers",
                    cost(m),
                    needs(m),
                    "yes" if m.compiles else "no",
                    " ".join(f"{name}={value}" for name, value in m.options().items()),
                    m.about,
                ),
                "",
            )
            for m in chosen
        ],
        spare=("options", "compiles", "explains"),
    )
    say("")
    say("explains: what stands for --layer auto. needs: what must be known of the model; a method that needs nothing")
    say("(--black-box) explains whatever ONNX Runtime runs. options are set with --set NAME=VALUE.")
    return 0


def cost(m: Method) -> str:
    """How many passes one image takes."""
    return m.cost.format(**m.options())


def needs(m: Method) -> str:
    if m.walks:
        return "a linear head" if m.needs is not None else "operators"
    return "attention" if "rollout" in m.name else "nothing"


def described(m: Method) -> dict[str, Any]:
    return {
        "name": m.name,
        "about": m.about,
        "explains": "input" if m.at_input else "layers",
        "cost": cost(m),
        "needs": needs(m),
        "compiles": m.compiles,
        "composite": m.composite if m.walks else None,
        "start": m.start if m.walks else None,
        "options": m.options(),
    }
