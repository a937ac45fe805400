"""`python -m exporters EXPORTER ... -o FILE`: export one model to ONNX."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters import EXPORTERS

INSTALL = "pip install '.[cpu,export]'"
INSTALLS = {  # what else, by exporter
    "timm": "pip install '.[cpu,export]' timm",
    "keras": "pip install '.[cpu]' keras tensorflow-cpu tf2onnx, or keras jax jax2onnx with KERAS_BACKEND=jax",
    "tflite": "pip install '.[cpu]' tensorflow-cpu tf2onnx",
    "flax": "pip install '.[cpu]' flax jax2onnx",
    "paddle": "pip install '.[cpu]' paddlepaddle paddle2onnx",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Export the model the command line names; the exit code is 0 if the file was written."""
    listing = "\n".join(f"  {name:20} {summary}" for name, (_, summary) in EXPORTERS.items())
    parser = argparse.ArgumentParser(
        prog="python -m exporters",
        description="Export a framework's model to ONNX, checked against the framework's own output.",
        epilog=f"exporters (each has its own --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("exporter", choices=EXPORTERS, metavar="EXPORTER", help="one of those listed below")
    arguments = list(sys.argv[1:] if argv is None else argv)
    exporter = parser.parse_args(arguments[:1]).exporter

    module_name, summary = EXPORTERS[exporter]
    try:
        module = importlib.import_module(f"exporters.{module_name}")
        from onnxcam.errors import OnnxcamError, UsageError
        from onnxcam.files import check_writable
    except ModuleNotFoundError as error:
        print(f"error: {error}; install what exporting needs: {INSTALLS.get(exporter, INSTALL)}", file=sys.stderr)
        return 2
    own = argparse.ArgumentParser(prog=f"{parser.prog} {exporter}", description=summary)
    own.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    module.add_arguments(own)
    options = own.parse_args(arguments[1:])
    try:
        check_writable(options.output.parent)
        if options.output.is_dir():
            raise UsageError(f"{options.output} is a folder: name the file to write")
        print(module.export(options).summary())
    except OnnxcamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
