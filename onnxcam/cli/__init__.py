"""The command line: one file per command, each thin: parse, call the API, print.

Errors that are raised on purpose come out as one line; the exit code is 2 for the user's mistake, 3 for a model that
cannot be explained, 1 for a bug.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from onnxcam import __version__
from onnxcam.cli import audit, check, cluster, compare, compile, evaluate, explain, fetch, layers, methods
from onnxcam.errors import OnnxcamError

COMMANDS = (explain, compare, evaluate, audit, cluster, layers, methods, check, compile, fetch)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"onnxcam: error: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="onnxcam", description="Explain ONNX image models on the ONNX graph itself: where did the model look?"
    )
    top.add_argument("--version", action="version", version=f"onnxcam {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal's encoding lacks are no reason to fail
            stream.reconfigure(errors="backslashreplace")
    # What reading a model makes is kept to the end: to look through it again and again for garbage takes a tenth of
    # the time of explaining one picture.
    gc.set_threshold(50_000)
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except OnnxcamError as error:
        return _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output is gone; so that Python does not complain on the way out, neither is there a stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk behind standard output, say
        return _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 2)
    except MemoryError:
        return _fail("out of memory: explain fewer images at a time (--batch-size 1) or fewer layers", 1)
    except Exception as error:
        if os.environ.get("ONNXCAM_DEBUG"):
            raise
        text = " ".join(str(error).split())
        return _fail(
            f"this is a bug in onnxcam, please report it: {type(error).__name__}: {text} (ONNXCAM_DEBUG=1 shows where)",
            1,
        )


def _fail(text: str, code: int) -> int:
    print(f"onnxcam: error: {text}", file=sys.stderr)
    return code
