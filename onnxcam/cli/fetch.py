"""`onnxcam fetch`: a trained model from the catalogue, checked by its SHA-256."""

from __future__ import annotations

import argparse


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("fetch", help="a trained model from the catalogue", description=__doc__)
    p.add_argument("name", metavar="NAME", nargs="?", help="which; without one the catalogue is listed")
    p.add_argument("--out", "-o", metavar="DIR", default="models", help="where to (default: models)")
    p.add_argument("--catalogue", metavar="FILE", help="another catalogue, in the form of models/catalogue.toml")
    p.set_defaults(run=run_fetch)


def run_fetch(arguments: argparse.Namespace) -> int:
    from onnxcam.catalogue import catalogue, fetch
    from onnxcam.cli.explain import Bar
    from onnxcam.cli.tables import print_table, say
    from onnxcam.named import named

    known = catalogue(arguments.catalogue)
    if arguments.name is None:
        rows = [((e.name, f"{e.size / 2**20:.0f} MiB", e.licence, e.about), "") for e in known.values()]
        print_table(("name", "size", "licence", ""), rows, right=("size",))
        return 0
    entry = named("model", arguments.name, known)
    with Bar(entry.size, f"fetching {entry.name}") as bar:
        path = fetch(entry, arguments.out, progress=bar.update)
    say(f"{path}: {entry.about}; {entry.licence}")
    say(f"onnxcam explain {path} IMAGE --preprocess {entry.preprocess}")
    return 0
