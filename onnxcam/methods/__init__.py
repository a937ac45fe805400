"""Methods: how taps and relevance are combined into a map. One line each; everything before it is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnxcam.methods import lrp, relevance_cam
from onnxcam.named import named


@dataclass(frozen=True)
class Method:
    """A named combination with the composite and the start it is meant for.

    `combine(ops, activation (N, C, *spatial), relevance (T, N, C, *spatial))` returns (T, N, *spatial).
    `weighs_channels` says that the map is meaningless where activations are negative; `vectors` that the method also
    explains tensors (N, features), which have no map, by one number for each feature.
    """

    name: str
    combine: Callable[[Any, Any, Any], Any]
    composite: str
    start: str
    weighs_channels: bool
    about: str
    vectors: bool = False


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
        Method(
            "lrp",
            lrp.combine,
            "relevance_cam",
            "contrast",
            False,
            "the relevance of a layer, channels summed; of each feature where there is no map",
            vectors=True,
        ),
    )
}


def method(name: str | Method) -> Method:
    """The method of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Method) else named("method", name, METHODS)
