"""Methods: how taps and relevance are combined into a map. One line each; everything before it is shared."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.methods import lrp, relevance_cam


@dataclass(frozen=True)
class Method:
    """A named combination with the composite and the start it is meant for.

    `combine(ops, activation (N, C, *spatial), relevance (T, N, C, *spatial))` returns (T, N, *spatial).
    `weighs_channels` says that the map is meaningless where activations are negative.
    """

    name: str
    combine: Callable[[Any, Any, Any], Any]
    composite: str
    start: str
    weighs_channels: bool
    about: str


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "relevance-cam",
            relevance_cam.combine,
            "relevance_cam",
            "contrast",
            True,
            "channels weighted by the spatial mean of their relevance (Lee et al. 2021)",
        ),
        Method("lrp", lrp.combine, "relevance_cam", "contrast", False, "the relevance of a layer, channels summed"),
    )
}


def method(name: str | Method) -> Method:
    """The method of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    if isinstance(name, Method):
        return name
    key = name.replace("_", "-")
    if key not in METHODS:
        near = difflib.get_close_matches(key, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no method named {name!r}: {hint}there are {', '.join(METHODS)}")
    return METHODS[key]
