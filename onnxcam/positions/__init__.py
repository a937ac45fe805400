"""Where in the picture each entry of a tensor lies: positions, carried through the graph from the input on.

A field gives every entry of a tensor a position: which image of the batch, and a coordinate for each axis of the
picture, in its cells. Each coordinate is an array that broadcasts against the tensor, NaN where an entry lies nowhere
in particular, as a class token does. Layout ops move coordinates as they move values, so windows that are cut, rolled
and merged need no special case; convolutions and pools space them out; what mixes channels averages over them. What
mixes all positions has no field. An attention matrix has two: of its rows, the queries, and of its columns, the keys.
"""

from onnxcam.positions.coordinates import Axes, Coordinate, Field, Placed
from onnxcam.positions.tracking import Positions

__all__ = ["Axes", "Coordinate", "Field", "Placed", "Positions"]
