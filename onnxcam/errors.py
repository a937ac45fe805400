"""The errors onnxcam raises on purpose.

Each carries one line that says what is wrong and what to do about it; the command line prints that line and exits with
`exit_code`. Anything else that escapes is a bug (exit code 1).
"""


class OnnxcamError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UsageError(OnnxcamError):
    """What was asked for cannot be done as asked: a wrong name, a missing file, an unreadable picture."""

    exit_code = 2


class PictureError(UsageError):
    """One picture cannot be read or turned into numbers; of several, the others may be fine."""


class ModelError(OnnxcamError):
    """The model itself cannot be read or explained: a broken file, an operator that onnxcam does not know."""

    exit_code = 3


class NotFiniteError(ModelError):
    """A map overflowed on one input; another may be fine."""


class EngineError(ModelError):
    """An engine cannot do what it is asked to do; the walk adds at which node that was."""


class OpenBatchError(EngineError):
    """Something cannot be recorded while it is open how many images a batch has."""
