"""`onnxcam check`: can every node on the way be explained, by which operator and rule, and what would it cost?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from onnxcam.cli.options import add_attention, add_model, load_model, say_what_else
from onnxcam.errors import ModelError


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("check", help="can it be explained, and what would it cost?", description=__doc__)
    add_model(p)
    p.add_argument("--composite", "-c", metavar="C", help="which rules apply; by default those of relevance-cam")
    add_attention(p)
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=run_check)


def _macs(count: int) -> str:
    """Multiply-adds in a unit that leaves three digits."""
    return f"{count / 1e9:.3g} GMAC" if count >= 1e9 else f"{count / 1e6:.3g} MMAC"


def run_check(arguments: argparse.Namespace) -> int:
    model = load_model(arguments)
    found = model.check(arguments.composite, arguments.attention)
    problems = found.problems
    if arguments.json:
        print(
            json.dumps(
                {
                    "logits": found.logits,
                    "composite": found.composite,
                    "explainable": not problems,
                    "macs": found.macs,
                    "walk_macs": found.walk_macs,
                    "nodes": [asdict(row) for row in found.rows],
                }
            )
        )
        return ModelError.exit_code if problems else 0
    from onnxcam.cli.tables import print_table, say

    print_table(
        ("node", "op", "kind", "rule"),
        [
            ((row.node, row.op_type, row.kind or "none", row.rule or "none"), "bold red" if row.reason else "")
            for row in found.rows
        ],
    )
    say(
        f"from the logits {found.logits!r} to the input: {len(found.rows)} nodes; forward {_macs(found.macs)}, "
        f"relevance to the input about {_macs(found.walk_macs)} a target"
    )
    for row in problems:
        say(f"cannot be explained: {row.reason}")
    say_what_else(model)
    if not problems:
        say("every node on the way can be explained")
    return ModelError.exit_code if problems else 0
