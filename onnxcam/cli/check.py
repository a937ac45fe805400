"""`onnxcam check`: can every node on the way be explained, by which operator and rule, and what would it cost?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from onnxcam.cli.options import add_model, load_model
from onnxcam.errors import ModelError


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("check", help="can it be explained, and what would it cost?", description=__doc__)
    add_model(p)
    p.add_argument("--composite", "-c", metavar="C", default="relevance_cam", help="which rules apply")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    found = load_model(arguments).check(arguments.composite)
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "op", "kind", "rule"):
        table.add_column(column, overflow="fold")
    for row in found.rows:
        if row.reason is None:
            table.add_row(escape(row.node), row.op_type, row.kind, escape(row.rule or ""))
        else:
            table.add_row(escape(row.node), row.op_type, "none", escape(row.reason), style="bold red")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"from the logits {found.logits!r} to the input: {len(found.rows)} nodes, {len(problems)} without an operator; "
        f"forward {found.macs / 1e9:.2f} GMAC, relevance to the input about {found.walk_macs / 1e9:.2f} GMAC a target",
        soft_wrap=True,
        markup=False,
    )
    return ModelError.exit_code if problems else 0
