"""From the user's file to the graph that is explained: static, constant-folded, linear maps merged, names kept.

A proto goes in, untouched; an onnx-graphsurgeon graph comes out. The proto's copy is named and its Constant nodes
become initialisers; then passes over the graph, one per file, run until none of them changes anything: constants are
folded, shapes that are known are written down, branches with a known condition are taken, nodes that do nothing go,
and affine maps per channel (BatchNormalization and its spellings) merge into the linear operator beside them. Every
pass takes the graph and the names it must not touch and says whether it changed something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcam.canonise.affine import fold_into_consumers, fold_into_producers
from onnxcam.canonise.branches import take_branches
from onnxcam.canonise.constants import fold_constants, lower_constants
from onnxcam.canonise.identities import drop_identities
from onnxcam.canonise.inference import ask_runtime, infer
from onnxcam.canonise.names import name_nodes
from onnxcam.canonise.order import tidy
from onnxcam.canonise.shapes import fold_shapes
from onnxcam.canonise.specialise import specialise
from onnxcam.canonise.surgery import protected
from onnxcam.canonise.training import refuse_training
from onnxcam.weights import attach

__all__ = ["canonise", "name_nodes"]

Pass = Callable[[gs.Graph, frozenset[str]], bool]

SIMPLIFY: tuple[Pass, ...] = (fold_constants, take_branches, fold_shapes, drop_identities)


def canonise(
    proto: onnx.ModelProto,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    shapes: dict[str, tuple[int | str, ...]] | None = None,
    keep: frozenset[str] = frozenset(),
    fold_batchnorm: bool = True,
) -> gs.Graph:
    """The graph to explain, equal to `proto` in every output and in every tensor of `keep`.

    Args:
        proto: the model, with its weights loaded and without local functions (`onnxcam.reading.read` sees to both);
            it is not changed.
        weights: the values of those initialisers that are stubs in it (see `onnxcam.weights`).
        shapes: input name to shape, for inputs whose sizes are to be fixed; a string is a symbolic axis.
        keep: names of tensors that survive with the values they have in `proto`, whatever could be folded there.
        fold_batchnorm: False leaves affine maps (BatchNormalization, constant Mul and Add) as nodes of their own.

    Returns:
        A graph in topological order; nodes named uniquely; tensors with shape and dtype, where they can be inferred.

    Raises:
        UsageError: `shapes` contradicts the file.
        ModelError: the model computes in training mode.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    # Before IR version 4 every initialiser had to be listed as an input; graph surgeon drops those inputs.
    model.ir_version = max(model.ir_version, 4)
    name_nodes(model.graph)
    lower_constants(model.graph)
    with G_LOGGER.suppress():
        graph = attach(gs.import_onnx(model), weights or {})
        specialise(graph, shapes or {})
        tidy(graph, keep)
        infer(graph)
        _until_stable(graph, SIMPLIFY, keep)
        refuse_training(graph, keep)
        if fold_batchnorm:
            _until_stable(graph, (fold_into_producers,), keep)
            _until_stable(graph, (fold_into_consumers, fold_into_producers), keep)
        ask_runtime(graph)
    return graph


def _until_stable(graph: gs.Graph, passes: tuple[Pass, ...], keep: frozenset[str]) -> None:
    """Run `passes` in turn, with fresh shapes after each round, until a whole round changes nothing."""
    changed = True
    while changed:
        changed = False
        for step in passes:
            changed |= step(graph, protected(graph, keep))
        if changed:
            tidy(graph, keep)
            infer(graph)
