"""The LRP rules as explicit (outputs x inputs) matrices, in float64: slower than onnxcam, and less complicated.

A linear node is turned into its matrix by running it, in someone else's implementation, on every unit vector. A rule
is then the matrix `share` of the fractions that output j hands to input i, out of the contributions C_ji = W_ji x_i.
The relevance of input i is the sum over j of share_ji R_j. No convolution, no adjoint, no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

Evaluate = Callable[[np.ndarray], np.ndarray]


def by_runtime(model: onnx.ModelProto) -> Evaluate:
    """ONNX Runtime, float32. On a unit vector a convolution returns its weights to the bit."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.astype(np.float32)})[0].astype(np.float64)


@dataclass(frozen=True)
class Matrix:
    """z = W x + b for one image, flattened: W (J, I), b (J,).

    `wired` says which inputs each output reads at all, `biased` whether there is a bias.
    """

    w: np.ndarray
    b: np.ndarray
    wired: np.ndarray
    biased: bool


def matrix_of(
    evaluate: Evaluate, shape: tuple[int, ...], bias: np.ndarray | None = None, average: bool = False
) -> Matrix:
    """Probe a linear map of one input of `shape`; `bias` broadcasts against its output.

    Weights must not be zero where they are wired. The coefficients of an `average` are snapped to one over a whole
    number, which is what they are but for the runtime's rounding.
    """
    columns = [evaluate(unit.reshape(shape)) for unit in np.eye(int(np.prod(shape)))]
    w = np.stack([column.ravel() for column in columns], axis=1)
    if average:
        w[w != 0] = 1 / np.round(1 / w[w != 0])
    b = np.broadcast_to(np.asarray(0.0 if bias is None else bias, np.float64), columns[0].shape).ravel()
    return Matrix(w, b, w != 0, bias is not None)


# -- rules: (matrix, x) -> share, (J, I) -------------------------------------------------------------------------


def positive(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def negative(a: np.ndarray) -> np.ndarray:
    return np.minimum(a, 0)


def over(a: np.ndarray, total: np.ndarray, eps: float) -> np.ndarray:
    """Each row of `a` over its entry of `total`; without `eps` a row with a total of zero shares nothing."""
    if eps:
        return a / (total + np.where(total < 0, -eps, eps))[:, None]
    return np.divide(a, total[:, None], out=np.zeros_like(a), where=total[:, None] != 0)


def bias_term(m: Matrix, policy: str, part: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return {"ignore": 0 * m.b, "full": m.b, "absorb": part(m.b)}[policy]


def epsilon(m: Matrix, x: np.ndarray, eps: float, bias: str) -> np.ndarray:
    c = m.w * x
    return over(c, c.sum(1) + bias_term(m, bias, lambda b: b), eps)


def alpha_beta(m: Matrix, x: np.ndarray, alpha: float, beta: float, eps: float, bias: str) -> np.ndarray:
    p, n = positive(m.w * x), negative(m.w * x)
    return alpha * over(p, p.sum(1) + bias_term(m, bias, positive), eps) - beta * over(
        n, n.sum(1) + bias_term(m, bias, negative), eps
    )


def z_plus(m: Matrix, x: np.ndarray, eps: float, bias: str) -> np.ndarray:
    return alpha_beta(m, x, 1, 0, eps, bias)


def gamma(m: Matrix, x: np.ndarray, g: float, eps: float, bias: str) -> np.ndarray:
    """Contributions of the output's own sign count 1 + g times; an output of exactly zero shares nothing."""
    c = m.w * x
    b = 0 * m.b if bias == "ignore" else m.b
    z = c.sum(1) + b
    share = np.zeros_like(c)
    for j, part in enumerate(np.where(z > 0, "+", "-")):
        keep = positive if part == "+" else negative
        row = c[j] + g * keep(c[j])
        extra = g * keep(b[j]) if bias == "absorb" else 0
        share[j] = (z[j] != 0) * over(row[None], np.array([row.sum() + b[j] + extra]), eps)[0]
    return share


def w_square(m: Matrix, x: np.ndarray, eps: float, bias: str) -> np.ndarray:
    return over(m.w**2, (m.w**2).sum(1) + (0 if bias == "ignore" else m.b**2), eps)


def flat(m: Matrix, x: np.ndarray, eps: float, bias: str) -> np.ndarray:
    one = m.wired.astype(np.float64)
    return over(one, one.sum(1) + (m.biased and bias != "ignore"), eps)


def z_box(m: Matrix, x: np.ndarray, low: np.ndarray, high: np.ndarray, eps: float) -> np.ndarray:
    c = m.w * x - positive(m.w) * low - negative(m.w) * high
    return over(c, c.sum(1), eps)


def relevance(share: np.ndarray, r: np.ndarray) -> np.ndarray:
    """sum over j of share_ji R_j, for r (J,)."""
    return sum((share[j] * r[j] for j in range(len(r))), np.zeros(share.shape[1]))
