"""From the user's file to the graph that is explained: static, constant-folded, linear maps merged, names kept.

A proto goes in, untouched; an onnx-graphsurgeon graph comes out. The proto's copy is named and its Constant nodes
become initialisers; then passes over the graph, one per file, run until none of them changes anything: fused ops are
written out in simpler ones, constants are folded, shapes that are known are written down, branches with a known
condition are taken, nodes that do nothing go, and affine maps per channel (BatchNormalization and its spellings) merge
into the linear operator beside them. Every pass takes the graph and the names it must not touch and says whether it
changed something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcam.canonise.affine import fold_into_consumers, fold_into_producers
from onnxcam.canonise.branches import take_branches, take_known
from onnxcam.canonise.channels_last import affine_to_linear, pool_each_channel
from onnxcam.canonise.constants import fold_constants, lower_constants
from onnxcam.canonise.einsum import lower_einsum
from onnxcam.canonise.examples import lacking, learned, open_batch, settle, write_down
from onnxcam.canonise.expansion import expand
from onnxcam.canonise.identities import drop_identities
from onnxcam.canonise.inference import ask_runtime, infer, spell_out_axes
from onnxcam.canonise.names import name_nodes
from onnxcam.canonise.order import tidy
from onnxcam.canonise.quantised import lower_quantised
from onnxcam.canonise.quantised.layout import join_rounding, move_real_values
from onnxcam.canonise.quantised.weights import turn_weights
from onnxcam.canonise.recurrent import unroll
from onnxcam.canonise.shapes import fold_shapes
from onnxcam.canonise.specialise import drop_foreign_outputs, specialise
from onnxcam.canonise.surgery import protected
from onnxcam.canonise.training import refuse_training
from onnxcam.canonise.transposes import join_transposes
from onnxcam.input_spec import Given
from onnxcam.weights import attach

__all__ = ["canonise", "name_nodes"]

Pass = Callable[[gs.Graph, frozenset[str]], bool]

SIMPLIFY: tuple[Pass, ...] = (
    expand,
    fold_constants,
    take_branches,
    fold_shapes,
    lower_einsum,
    lower_quantised,
    turn_weights,
    join_rounding,
    move_real_values,
    pool_each_channel,
    join_transposes,
    drop_identities,
)


def canonise(
    proto: onnx.ModelProto,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    shapes: dict[str, tuple[int | str, ...]] | None = None,
    given: Given | None = None,
    keep: frozenset[str] = frozenset(),
    fold_batchnorm: bool = True,
) -> gs.Graph:
    """The graph to explain, equal to `proto` in every output and in every tensor of `keep`.

    Args:
        proto: the model, with its weights loaded and without local functions (`onnxcam.reading.read` sees to both);
            it is not changed.
        weights: the values of those initialisers that are stubs in it (see `onnxcam.weights`).
        shapes: input name to shape, for inputs whose sizes are to be fixed; a string is a symbolic axis.
        given: the same, and more that is known about the inputs.
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
        drop_foreign_outputs(graph)
        spell_out_axes(graph)
        given = given or Given(tuple((shapes or {}).items()))
        specialise(graph, dict(given.shapes), {s.name: s.array for s in given.settings})
        tidy(graph, keep)
        infer(graph)
        _until_stable(graph, (partial(take_known, conditions=dict(given.branches)), *SIMPLIFY), keep)
        refuse_training(graph, keep)
        if fold_batchnorm:
            _until_stable(graph, (affine_to_linear, fold_into_producers), keep)
            _until_stable(graph, (affine_to_linear, fold_into_consumers, fold_into_producers), keep)
            _until_stable(graph, (join_transposes, drop_identities), keep)
        if unroll(graph, protected(graph, keep)):
            tidy(graph, keep)
            infer(graph)
        ask_runtime(graph)
        if (batch := open_batch(graph)) and lacking(graph):
            options: dict[str, Any] = {"weights": weights, "keep": keep, "fold_batchnorm": fold_batchnorm}
            known = learned(batch, lambda n: canonise(proto, given=_with_batch(given, graph, n), **options))
            write_down(graph, known)
            if settle(graph, known, protected(graph, keep)):
                tidy(graph, keep)
                infer(graph)
                ask_runtime(graph)
                write_down(graph, known)
    return graph


def _with_batch(given: Given, graph: gs.Graph, n: int) -> Given:
    """`given` with the inputs' open axis, of which there is one only, fixed."""
    fixed = [(t.name, tuple(d if isinstance(d, int) else n for d in t.shape)) for t in graph.inputs]
    return replace(given, shapes=tuple(fixed))


def _until_stable(graph: gs.Graph, passes: tuple[Pass, ...], keep: frozenset[str]) -> None:
    """Run `passes` in turn, with fresh shapes after each round, until a whole round changes nothing."""
    changed = True
    while changed:
        changed = False
        for step in passes:
            if step(graph, protected(graph, keep)):
                changed = True
                graph.nodes = [node for node in graph.nodes if node.outputs]  # what a step cut off, no other step meets
        if changed:
            tidy(graph, keep)
            infer(graph)
