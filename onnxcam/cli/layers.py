"""`onnxcam layers`: what can be explained, with the best place at each resolution marked."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from onnxcam.cli.options import add_model, add_preprocess, load_model


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("layers", help="what can be explained", description=__doc__)
    add_model(p)
    add_preprocess(p)
    p.add_argument("--suggested", action="store_true", help="the suggested layers only")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=run_layers)


def run_layers(arguments: argparse.Namespace) -> int:
    model = load_model(arguments)
    rows = [row for row in model.layers() if row.suggested or not arguments.suggested]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "index", "node", "op", "tensor", "shape", "stage", "values"):
        table.add_column(column, justify="right" if column in ("index", "stage") else "left", overflow="fold")
    for row in rows:
        table.add_row(
            "*" if row.suggested else "",
            str(row.index),
            escape(row.node),
            row.op,
            escape(row.tensor),
            "x".join(str(n) for n in row.shape),
            str(row.stage),
            row.sign,
            style="bold" if row.suggested else "dim" if row.sign == "signed" else None,
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "* suggested: the last layer of its resolution that cannot be negative; -1 is the last of them, and auto.\n"
        "  'signed' layers can be negative: channel-weighted maps mean little there.",
        soft_wrap=True,
        markup=False,
    )
    return 0
