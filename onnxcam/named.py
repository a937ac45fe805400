"""Finding a thing in a table by the name a user typed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from onnxcam.errors import UsageError

T = TypeVar("T")


def named(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of that name; dashes and underscores count as the same.

    Raises:
        UsageError: there is none; the message offers the nearest name and all of them.
    """
    plain = {key.replace("_", "-"): key for key in table}
    wanted = name.replace("_", "-")
    if wanted in plain:
        return table[plain[wanted]]
    near = difflib.get_close_matches(wanted, plain, n=1)
    hint = f"did you mean {plain[near[0]]}? " if near else ""
    raise UsageError(f"no {what} named {name!r}: {hint}there are {', '.join(table)}")
