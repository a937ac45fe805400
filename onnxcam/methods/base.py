"""What a method is: a combination of taps and relevance, and what has to be computed for it.

Most methods are one line behind one walk, and so can be recorded. The others have a runner of their own that asks for
walks, taps and forward passes (`runners.Means`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.heads import cells_apart

if TYPE_CHECKING:
    from onnxcam.layers import Layer
    from onnxcam.means import Means
    from onnxcam.model import Model
    from onnxcam.runners import Runner

Array = Any
Combine = Callable[[Any, Any, Any], Any]
Needs = Callable[[Graph, str, str], "str | None"]  # (graph, tensor of the layer, logits) -> why not
INPUT = "input"  # the layer that stands for the model's input


@dataclass(frozen=True)
class Method:
    """A named combination with the composite and the start it is meant for.

    `combine(ops, activation (N, C, *spatial), relevance (T, N, C, *spatial))` returns (T, N, *spatial).

    Attributes:
        name: as typed.
        combine: the formula, in the primitives of an engine.
        composite, start: what it is meant for, by name.
        weighs_channels: the map is meaningless where activations are negative.
        about: one line with its source.
        vectors: it also explains tensors (N, features), which have no map, by one number for each feature.
        needs: says of a layer why the method means nothing there, None where it does.
        at_input: meant for the input, which is explained unless another layer is named.
        channels: the result has a number for each channel and no map.
        combine_apart: the formula where nothing between the layer and the logits mixes cells, if that is another.
    """

    name: str
    combine: Combine
    composite: str
    start: str
    weighs_channels: bool
    about: str
    vectors: bool = False
    needs: Needs | None = None
    at_input: bool = False
    channels: bool = False
    combine_apart: Combine | None = None

    compiles: ClassVar[bool] = True  # one model can compute it
    walks: ClassVar[bool] = True  # relevance or gradients are carried back, so that every op on the way must be known
    cost: ClassVar[str] = "1 forward, 1 backward"

    def require(self, graph: Graph, layers: Mapping[str, Layer], logits: str) -> None:
        """Refuse layers that the method means nothing at.

        Raises:
            UsageError: names the layer and says why.
        """
        for name, layer in layers.items():
            if self.needs is not None and (why := self.needs(graph, layer.tensor, logits)):
                raise UsageError(f"method {self.name} means nothing at layer {name!r}: {why}")

    def formula(self, graph: Graph, layer: Layer, logits: str) -> Combine:
        """The combination at a layer."""
        if self.combine_apart is not None and cells_apart(graph, layer.tensor, logits, layer.spatial):
            return self.combine_apart
        return self.combine

    def places(self, typed: Sequence[Any], model: Model) -> list[Any]:
        """The layers that are meant where none was named: the input, for a method that is meant for that; of several
        inputs the one that pictures go to."""
        if not self.at_input or list(typed) != ["auto"]:
            return list(typed)
        return [INPUT] if len(model.inputs) == 1 else [model.spec.name]

    def runner(self, means: Means) -> Runner:
        """Who computes it."""
        return means.walk(self)

    def options(self) -> dict[str, Any]:
        """What can be set, with its values."""
        own = [f.name for f in fields(self) if f.name not in {known.name for known in fields(Method)}]
        return {name: value for name in own if type(value := getattr(self, name)) in (int, float)}

    def with_options(self, given: Mapping[str, Any]) -> Self:
        """The same method with options set; numbers may be texts.

        Raises:
            UsageError: there is no such option, or no such value of it.
        """
        options = self.options()
        values = {}
        for name, value in given.items():
            if name not in options:
                some = f"has {', '.join(options)}" if options else "has none"
                raise UsageError(f"method {self.name} has no option {name!r}: it {some}")
            kind = type(options[name])
            try:
                values[name] = kind(value)
            except (TypeError, ValueError):
                what = "a whole number" if kind is int else "a number"
                raise UsageError(f"option {name} of method {self.name} is {what}, not {value!r}") from None
        made = replace(self, **values)
        made.validate()
        return made

    def validate(self) -> None:
        """Refuse values of options that mean nothing.

        Raises:
            UsageError: names the option.
        """


def at_least(method: Method, least: float, *names: str) -> None:
    """Refuse options below a bound.

    Raises:
        UsageError: names the first that is.
    """
    for name in names:
        if not getattr(method, name) >= least:
            raise UsageError(f"option {name} of method {method.name} is {least} or more, not {getattr(method, name)}")


def raw(ops: Any, activation: Array, relevance: Array) -> Array:
    """What arrived at a layer, (T, N, C, *spatial), as it is: for methods that combine it themselves."""
    return relevance


def raw_of(method: Method) -> Method:
    """A method that hands over what arrives at a layer by the composite and the start of `method`."""
    return Method("raw", raw, method.composite, method.start, False, "", vectors=True)
