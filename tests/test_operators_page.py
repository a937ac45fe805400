"""docs/operators.md is what its generator writes, and no op of ONNX or ONNX Runtime is missing from it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from conftest import ROOT
from docs import make_operators
from onnxcam.canonise.expansion.table import EXPANSIONS
from onnxcam.canonise.quantised import LOWERED
from onnxcam.errors import ModelError
from onnxcam.graph import Graph
from onnxcam.operators import lookup, registered
from onnxcam.operators.refused import REFUSED


def test_the_page_is_up_to_date():
    """An op that no table knows raises; a new onnx or ONNX Runtime may well have one."""
    written = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    versions = (
        f"onnx {onnx.__version__} (opset {onnx.defs.onnx_opset_version()}) and\nONNX Runtime {onnxruntime.__version__}."
    )
    if versions not in written:
        pytest.skip(f"the page is for other versions than {versions!r}")
    assert make_operators.page() == written, "run python docs/make_operators.py"


def test_an_op_that_no_table_knows_is_an_error():
    with pytest.raises(LookupError, match=r"nothing is known of ai\.onnx\.Twirl"):
        make_operators.row("", "Twirl")


def test_no_op_is_refused_that_is_explained_or_expanded():
    explained = {(domain, op) for domain, op, _, _ in registered()}
    assert not set(REFUSED) & (explained | set(EXPANSIONS) | LOWERED | set(make_operators.REWRITTEN) - {("", "If")})


@pytest.mark.parametrize("key", [("", "Det"), ("", "Loop"), ("com.microsoft", "BeamSearch")], ids=str)
def test_the_error_says_what_the_page_says(key):
    domain, op = key
    x, y = gs.Variable("x", np.float32, [1, 2, 2]), gs.Variable("y", np.float32)
    graph = Graph(gs.Graph([gs.Node(op, "node", {}, [x], [y], domain or None)], [x], [y], opset=17))
    row = make_operators.row(domain, op)
    assert row.what == "refused"
    with pytest.raises(ModelError) as error:
        lookup(graph.nodes[0])
    assert str(error.value).endswith(f"at opset {17 if not domain else 1}: {row.how}")
