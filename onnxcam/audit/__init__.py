"""Audit: two models, one set of pictures: does the second look where the first did, and if not, from where on?"""

from onnxcam.audit.matching import Pair, matched
from onnxcam.audit.run import Audit, audit
from onnxcam.audit.verdict import Findings, findings

__all__ = ["Audit", "Findings", "Pair", "audit", "findings", "matched"]
