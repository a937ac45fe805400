"""Which branches are taken: conditions of If that are only known when the model runs, evaluated for an input at hand.

With them known the graph is canonised without the If, and explained as the straight line that the input goes along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcam.engines.session import RuntimeSession, Settings
from onnxcam.errors import ModelError
from onnxcam.graph import Graph, Node
from onnxcam.input_spec import Given
from onnxcam.taps import expose

if TYPE_CHECKING:
    from onnxcam.model import Model


def open_branches(graph: Graph) -> list[Node]:
    """The nodes that choose what to compute when they run."""
    return [node for node in graph.nodes if node.op_type == "If" and not node.domain]


def branches_taken(model: Model, given: Given, feeds: Mapping[str, np.ndarray]) -> Given:
    """`given` with the branches that this input takes; branches within branches too.

    Raises:
        ModelError: a condition cannot be evaluated.
    """
    while True:
        graph = model.canonical(given).graph
        names = list(dict.fromkeys(n.inputs[0] for n in open_branches(graph)))
        if not names:
            return given
        known = {name for name, _ in given.branches}
        if stuck := [name for name in names if name in known]:
            raise ModelError(f"the branch that {stuck[0]!r} chooses cannot be taken: export the model again without If")
        values = RuntimeSession(expose(graph, names), names, Settings()).run(feeds)
        taken = tuple((name, bool(np.ravel(values[name])[0])) for name in names)
        given = replace(given, branches=given.branches + taken)


def either_way(model: Model, given: Given, value: bool) -> Given:
    """`given` with every branch taken that a true, or a false, condition leads to."""
    while names := {n.inputs[0] for n in open_branches(model.canonical(given).graph)}:
        if names <= {name for name, _ in given.branches}:
            return given
        given = replace(given, branches=given.branches + tuple((name, value) for name in sorted(names)))
    return given
