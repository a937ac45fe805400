"""`onnxcam cluster`: do the maps of a class fall into groups? A watermark that is looked at shows as one (SpRAy)."""

from __future__ import annotations

import argparse
import sys

from onnxcam.cli.explain import Bar, add_pool, add_running, find_pictures
from onnxcam.cli.options import add_model, add_options, add_preprocess, add_truth, load_model, options_of, read_examples
from onnxcam.composites import COMPOSITES
from onnxcam.files import check_writable
from onnxcam.methods import METHODS


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("cluster", help="groups among the maps of a class", description=__doc__)
    add_model(p)
    p.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of them")
    p.add_argument("--out", "-o", metavar="DIR", default="onnxcam-clusters", help="where to write")
    p.add_argument(
        "--class", metavar="N", type=int, action="append", dest="classes",
        help="which; repeatable (default: all with 8 pictures or more)",
    )  # fmt: skip
    p.add_argument("--layer", "-l", metavar="L", default="auto", help="one layer (default: auto)")
    p.add_argument("--clusters", metavar="K", type=int, help="how many (default: as the eigenvalues say, 2 to 8)")
    p.add_argument("--method", "-m", metavar="M", default="contrast-map", help=f"one of {', '.join(METHODS)}")
    p.add_argument("--composite", "-c", metavar="C", help=f"for methods of relevance: {', '.join(COMPOSITES)}")
    p.add_argument("--start", metavar="S", help="likewise")
    p.add_argument(
        "--target", choices=("predicted", "label"), default="predicted",
        help="which pictures a class has, and what is explained",
    )  # fmt: skip
    add_truth(p, located=False)
    add_options(p)
    add_preprocess(p, names="--class-names")
    add_running(p, batches=False)
    add_pool(p)
    p.set_defaults(run=run_cluster)


def run_cluster(arguments: argparse.Namespace) -> int:
    from onnxcam.cli.tables import print_table, say
    from onnxcam.clusters import cluster, save

    check_writable(arguments.out)
    listed = read_examples(arguments, find_pictures(arguments.images))
    model = load_model(arguments)
    skipped: dict[str, str] = {}
    with Bar(len(listed), "explaining") as bar:
        found = cluster(
            model, listed, arguments.layer, classes=arguments.classes, count=arguments.clusters,
            method=arguments.method, options=options_of(arguments), target=arguments.target, progress=bar.update,
            left_out=skipped.__setitem__,
            threads=arguments.threads, engine_pool=arguments.engine_pool, workers=arguments.workers,
            composite=arguments.composite, start=arguments.start, engine=arguments.engine,
            providers=arguments.providers or "cpu", dtype=arguments.dtype,
        )  # fmt: skip
    written = save(found, model, arguments.out)
    for path, why in skipped.items():
        print(f"onnxcam: warning: {path} is left out: {why}", file=sys.stderr)
    print_table(
        ("class", "pictures", "clusters", "of sizes", "gap", "silhouette"),
        [
            (
                (
                    c.label, str(len(c.pictures)), str(c.count), ", ".join(str((c.cluster == k).sum()) for k in
                    range(c.count)), f"{c.gap:.3f}", f"{c.apart:.2f}",
                ),
                "",
            )
            for c in found
        ],
        right=("pictures", "clusters", "gap", "silhouette"),
    )  # fmt: skip
    say(f"{len(written)} files in {arguments.out}; look at class-N.png and class-N-cluster-K.jpg")
    return 0
