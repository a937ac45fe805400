"""Methods: how taps and relevance are combined into a map. One line each; everything before it is shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.methods import cams, lrp, relevance_cam, relevance_map
from onnxcam.named import named

if TYPE_CHECKING:
    from onnxcam.layers import Layer

Combine = Callable[[Any, Any, Any], Any]
Needs = Callable[[Graph, str, str], "str | None"]  # (graph, tensor of the layer, logits) -> why not


@dataclass(frozen=True)
class Method:
    """A named combination with the composite and the start it is meant for.

    `combine(ops, activation (N, C, *spatial), relevance (T, N, C, *spatial))` returns (T, N, *spatial).
    `weighs_channels` says that the map is meaningless where activations are negative; `vectors` that the method also
    explains tensors (N, features), which have no map, by one number for each feature; `needs` says of a layer why the
    method means nothing there, None where it does.
    """

    name: str
    combine: Combine
    composite: str
    start: str
    weighs_channels: bool
    about: str
    vectors: bool = False
    needs: Needs | None = None

    def require(self, graph: Graph, layers: Mapping[str, Layer], logits: str) -> None:
        """Refuse layers that the method means nothing at.

        Raises:
            UsageError: names the layer and says why.
        """
        for name, layer in layers.items():
            if self.needs is not None and (why := self.needs(graph, layer.tensor, logits)):
                raise UsageError(f"method {self.name} means nothing at layer {name!r}: {why}")


def _by_gradient(name: str, combine: Combine, weighs_channels: bool, about: str, needs: Needs | None = None) -> Method:
    """A method of the gradient of the logit itself."""
    return Method(name, combine, "gradient", "one-hot", weighs_channels, about, needs=needs)


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
        Method(
            "relevance-map",
            relevance_map.positive,
            "relevance_cam",
            "contrast",
            False,
            "the positive part of the relevance of a layer, channels summed",
        ),
        Method(
            "relevance-layer-cam",
            relevance_map.times_activation,
            "relevance_cam",
            "contrast",
            True,
            "positive relevance times activation, channels summed: LayerCAM with relevance for the gradient",
        ),
        _by_gradient(
            "cam", cams.cam, True, "weights of the classifier times channels (Zhou et al. 2016)", cams.needs_linear_head
        ),
        _by_gradient("grad-cam", cams.grad_cam, True, "channels weighted by mean gradients (Selvaraju et al. 2017)"),
        _by_gradient(
            "grad-cam++",
            cams.grad_cam_plus_plus,
            True,
            "channels weighted by their positive gradients, weighted in turn (Chattopadhay et al. 2018)",
        ),
        _by_gradient(
            "xgrad-cam", cams.xgrad_cam, True, "channels weighted by gradient times activation (Fu et al. 2020)"
        ),
        _by_gradient("hirescam", cams.hires_cam, False, "gradient times activation (Draelos and Carin 2020)"),
        _by_gradient("layercam", cams.layer_cam, True, "positive gradient times activation (Jiang et al. 2021)"),
        _by_gradient(
            "grad-cam-elementwise",
            cams.element_wise,
            False,
            "positive part of gradient times activation, cell by cell (pytorch-grad-cam)",
        ),
        _by_gradient("saliency", cams.saliency, False, "largest gradient of a cell's channels (Simonyan et al. 2014)"),
        _by_gradient(
            "input-x-gradient",
            cams.times_gradient,
            False,
            "gradient times value, signed; take --layer input (Shrikumar et al. 2016)",
        ),
    )
}


def method(name: str | Method) -> Method:
    """The method of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Method) else named("method", name, METHODS)
