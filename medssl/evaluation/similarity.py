"""How alike two backbones see scans, and what their features tell apart.

Centred kernel alignment is the linear one of Kornblith et al., "Similarity of neural network
representations revisited" (ICML 2019), with the unbiased estimate of Song et al. (JMLR 2012): with
more features than scans the plain one is near 1 for features that have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MIN_SCANS = 4
_NUM_FOLDS = 5
_MIN_PATIENTS = 5
"""A group of fewer patients cannot be learned and tested: it is left out."""


def linear_cka(first_ND: Array, second_ND: Array) -> float:
    """Return the unbiased linear CKA of two sets of features of the same scans.

    Args:
        first_ND, second_ND: (N, D) and (N, E), the same scans in the same order.

    Returns:
        1 for features that differ by a rotation and a scale, about 0 for unrelated ones, for which
        it may be slightly negative; NaN for fewer than four scans or constant features.
    """
    if len(first_ND) < _MIN_SCANS:
        return float("nan")
    kernels = [_kernel(features) for features in (first_ND, second_ND)]
    shared = _hsic(kernels[0], kernels[1])
    own = _hsic(kernels[0], kernels[0]) * _hsic(kernels[1], kernels[1])
    return float(shared / np.sqrt(own)) if own > 0 else float("nan")


def _kernel(features_ND: Array) -> Array:
    centred = features_ND.astype(np.float64) - features_ND.mean(0, dtype=np.float64)
    kernel: Array = centred @ centred.T
    np.fill_diagonal(kernel, 0)
    return kernel


def _hsic(first: Array, second: Array) -> float:
    """Return the unbiased Hilbert-Schmidt independence criterion; Song et al. 2012, equation 5."""
    n = len(first)
    product = first @ second
    sums = first.sum() * second.sum() / ((n - 1) * (n - 2))
    return float((np.trace(product) + sums - 2 / (n - 2) * product.sum()) / (n * (n - 3)))


def project(features_ND: Array, method: str, seed: int) -> Array:
    """Return two coordinates a scan, (N, 2), by ``pca`` or ``tsne`` (scikit-learn's)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    scaled = _standardised(features_ND)
    components = min(50, *scaled.shape)
    reduced: Array = PCA(components, random_state=seed).fit_transform(scaled)
    if method == "pca":
        return reduced[:, :2]
    perplexity = min(30.0, max(2.0, (len(scaled) - 1) / 3))
    placed: Array = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        reduced
    )
    return placed


def told_apart(
    features_ND: Array, groups: Sequence[str], patients: Sequence[str]
) -> tuple[float, float] | None:
    """Return how well a linear classifier tells groups (scanners, sites, classes) by features.

    Cross-validated over patients; groups of fewer than five patients are left out.

    Returns:
        The balanced accuracy and what guessing gives; None where fewer than two groups are left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, owners = np.asarray(groups), np.asarray(patients)
    large = [
        name for name in np.unique(names)
        if name and len(np.unique(owners[names == name])) >= _MIN_PATIENTS
    ]  # fmt: skip
    if len(large) < 2:
        return None
    kept = np.isin(names, large)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    folds = StratifiedGroupKFold(_NUM_FOLDS, shuffle=True, random_state=0)
    answers = cross_val_predict(
        model, features_ND[kept], names[kept], groups=owners[kept], cv=folds
    )
    return float(balanced_accuracy_score(names[kept], answers)), 1 / len(large)


def _standardised(features_ND: Array) -> Array:
    spread = features_ND.std(0)
    scaled: Array = (features_ND - features_ND.mean(0)) / np.where(spread > 0, spread, 1)
    return scaled
