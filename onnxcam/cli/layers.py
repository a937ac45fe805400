"""`onnxcam layers`: what can be explained, with the best place at each resolution marked."""

from __future__ import annotations

import argparse
import json

from onnxcam.cli.options import add_model, add_preprocess, load_model, say_what_else

COLUMNS = ("", "index", "node", "op", "shape", "map", "stage", "values", "tensor", "module")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("layers", help="what can be explained", description=__doc__)
    add_model(p)
    add_preprocess(p)
    p.add_argument("--suggested", action="store_true", help="the suggested layers only")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=run_layers)


def run_layers(arguments: argparse.Namespace) -> int:
    model = load_model(arguments)
    listed = model.layers()
    rows = [row for row in listed if row.suggested or not arguments.suggested]
    if arguments.json:
        print(json.dumps([row.to_json() for row in rows]))
        return 0
    from onnxcam.cli.tables import print_table, say

    if not rows:
        say("no layer has a map: no tensor on the way to the logits has a spatial extent that is known")
        say("the relevance of each feature of the input: onnxcam explain MODEL --input FILE.npy --method lrp")
        return 0
    print_table(
        COLUMNS,
        [
            (
                (
                    "*" if row.suggested else "",
                    str(row.index),
                    row.node,
                    row.op,
                    "x".join(str(n) for n in row.shape),
                    "x".join(str(n) for n in row.spatial) if row.reaches else "-",
                    str(row.stage),
                    row.sign,
                    row.tensor,
                    row.path,
                ),
                "bold" if row.suggested else "dim" if row.sign == "signed" or not row.reaches else "",
            )
            for row in rows
        ],
        right=("index", "stage"),
        spare=("module", "tensor"),
    )
    say("* suggested: at each resolution, the last layer that all evidence passes through, rather one that cannot be")
    say("  negative; the last of them all is -1, or auto")
    if any(row.sign == "signed" for row in rows):
        say("  signed: values can be negative, so maps that weigh channels mean less there")
    if any(not row.reaches for row in rows):
        say("  no map (-): behind the last attention only the class token is read, and no other token leads to the")
        say("  logits; so the suggested layer lies before that attention")
    if apart := sorted({row.form.describe() for row in rows if row.form is not None and row.form.apart}):
        say("  tokens: " + "; ".join(apart))
    say_what_else(model)
    return 0
