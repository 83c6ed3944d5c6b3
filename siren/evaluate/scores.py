"""What a classifier's probabilities say: Inception Score and KL divergence of pairs (paper, appendix C.1).

Probabilities are the softmax of logits. For sums over a classifier with independent labels (AudioSet's 527) that is
what the published figures do too. All in float64, with natural logarithms.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Logarithms of probabilities [N, classes]."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl_divergence(reference: npt.NDArray[np.floating], generated: npt.NDArray[np.floating]) -> Floats:
    """KL(reference || generated) = sum_c p_ref(c) log(p_ref(c) / p_gen(c)) of pairs of logits [N, classes]: [N]."""
    p, q = log_softmax(reference), log_softmax(generated)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)


class InceptionSums:
    """The Inception Score of clips that come in parts, for B sets of weights at once.

        IS = exp( mean_i KL(p_i || p) ) = exp( mean_i sum_c p_i log p_i - sum_c p log p ),   p = mean_i p_i

    Over all clips at once, not the mean over splits as in Salimans et al. 2016: splits make it depend on the order.
    """

    def __init__(self, sets: int, classes: int) -> None:
        self._marginal = np.zeros((sets, classes))
        self._negentropy = np.zeros(sets)
        self._weight = np.zeros(sets)

    def add(self, logits: npt.NDArray[np.floating], weights: npt.NDArray[np.integer]) -> None:
        """logits [n, classes]; weights [B, n]."""
        logs = log_softmax(logits)
        p, w = np.exp(logs), weights.astype(np.float64)
        self._marginal += w @ p
        self._negentropy += w @ (p * logs).sum(axis=1)
        self._weight += w.sum(axis=1)

    def values(self) -> Floats:
        """[B], each 1 to the number of classes. Weights must not all be 0."""
        p = self._marginal / self._weight[:, None]
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        return np.exp(np.maximum(self._negentropy / self._weight - (p * logs).sum(axis=1), 0.0))
