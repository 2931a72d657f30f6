"""Linear probe: a logistic regression on the frozen features of every stage.

Features of the earlier stages often transfer better than the last one's (Goyal et al., "Scaling
and benchmarking self-supervised visual representation learning", ICCV 2019), so every stage is
probed; the regularisation of each and the stage to report are chosen on validation patients.
Where the task is dense, one regression answers for every position of the stage's map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.protocols.base import Cell, Prediction, Protocol, ProtocolConfig, Setting
from medssl.randomness import torch_generator

_DEVIATION_FLOOR = 1e-6


class Config(ProtocolConfig):
    """Configuration of the linear probe.

    Attributes:
        strengths: L2 penalties tried, as scikit-learn's ``1 / C`` over the number of rows.
        max_slices: slices of a 3D scan that a 2D backbone looks at, evenly spaced.
        max_features: numbers that a stage is pooled to where the task is not dense.
        max_rows: rows (positions, where dense) that one regression is fitted to.
        max_steps: steps of L-BFGS.
    """

    name: Literal["linear_probe"] = "linear_probe"
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    max_slices: int = Field(default=12, gt=0)
    max_features: int = Field(default=9000, gt=0)
    max_rows: int = Field(default=10_000, gt=0)
    max_steps: int = Field(default=100, gt=0)


def fit_logistic(
    rows: Tensor, targets: Tensor, num_classes: int, strength: float, max_steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression.

    Minimises mean cross-entropy + ``strength / 2`` x the squared weights (not the bias), that is
    scikit-learn's problem with ``C = 1 / (strength * len(rows))``. With two classes scikit-learn
    keeps the difference of the two vectors of weights, and the same solution has twice that ``C``.

    Args:
        rows: (N, D) float, standardised.
        targets: (N,) class indices.
        num_classes: K.
        strength: the L2 penalty.
        max_steps: of L-BFGS.

    Returns:
        Weights (D, K) and bias (K,).
    """
    weight = torch.zeros(rows.shape[1], num_classes, dtype=rows.dtype, device=rows.device)
    bias = torch.zeros(num_classes, dtype=rows.dtype, device=rows.device)
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_steps,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        fit = functional.cross_entropy(rows @ weight + bias, targets)
        loss = fit + 0.5 * strength * (weight**2).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


class _Probe:
    """A fitted regression with the standardisation of its features."""

    def __init__(self, rows: Tensor, targets: Tensor, num_classes: int) -> None:
        self.mean = rows.mean(0)
        self.deviation = rows.std(0, correction=0).clamp(min=_DEVIATION_FLOOR)
        self._rows = (rows - self.mean) / self.deviation
        self._targets = targets
        self._num_classes = num_classes

    def fit(self, strength: float, max_steps: int) -> tuple[Tensor, Tensor]:
        """Return weights (K, D) and bias (K,) that apply to features as they come."""
        weight, bias = fit_logistic(
            self._rows, self._targets, self._num_classes, strength, max_steps
        )
        scaled = weight / self.deviation[:, None]
        return scaled.T.contiguous(), bias - self.mean @ scaled


class LinearProbe(Protocol):
    """Probe every stage with a linear classifier."""

    config: Config

    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        features = setting.features(cell, self.config.max_slices, self.config.max_features)
        train = [features[key] for key in setting.labelled_scans(cell)]
        val = [features[key] for key in setting.scans_of(setting.splits.val)]
        test = [features[key] for key in setting.scans_of(setting.splits.test)]
        layers = list(train[0].layers)
        fitted: dict[str, tuple[float, tuple[Tensor, Tensor]]] = {}
        for position, layer in enumerate(layers):
            rows, targets = self._rows(train, layer, setting, cell)
            probe = _Probe(rows, targets, setting.task.num_outputs)
            candidates = []
            for strength in self.config.strengths:
                solution = probe.fit(strength, self.config.max_steps)
                score = self._score(val, layer, solution, setting)
                candidates.append((score, solution))
            fitted[layer] = max(candidates, key=lambda candidate: candidate[0])
            log(position, {"val/score": fitted[layer][0]})
        best = max(layers, key=lambda layer: fitted[layer][0])
        predictions = []
        for layer in layers:
            for case in test:
                predictions.append(
                    Prediction(
                        layer=layer,
                        selected=layer == best,
                        scan_key=case.scan_key,
                        target=setting.task.targets[case.scan_key],
                        scores=tuple(self._case_scores(case, layer, fitted[layer][1], setting)),
                    )
                )
        return predictions

    def _rows(
        self, cases: Sequence[CaseFeatures], layer: str, setting: Setting, cell: Cell
    ) -> tuple[Tensor, Tensor]:
        """Return the rows to fit, (N, D) float64, and their classes."""
        if not setting.task.dense:
            rows = torch.stack([case.layers[layer] for case in cases])
            classes = [int(setting.task.targets[case.scan_key][0]) for case in cases]
            return rows.to(setting.device).double(), torch.tensor(classes, device=setting.device)
        maps, labels = [], []
        # Each case gives an equal number of positions, drawn without a look at its label.
        share = max(1, self.config.max_rows // len(cases))
        for case in cases:
            generator = torch_generator(setting.seed, "probe", cell.seed, case.scan_key, layer)
            features = case.layers[layer].movedim(1, -1).flatten(0, -2)
            target = _at_resolution(case, layer).flatten()
            chosen = torch.randperm(len(target), generator=generator)[:share]
            maps.append(features[chosen])
            labels.append(target[chosen])
        rows = torch.cat(maps).to(setting.device).double()
        return rows, torch.cat(labels).to(setting.device)

    def _score(
        self,
        cases: Sequence[CaseFeatures],
        layer: str,
        solution: tuple[Tensor, Tensor],
        setting: Setting,
    ) -> float:
        scores = [self._case_scores(case, layer, solution, setting) for case in cases]
        return setting.score([case.scan_key for case in cases], scores)

    def _case_scores(
        self,
        case: CaseFeatures,
        layer: str,
        solution: tuple[Tensor, Tensor],
        setting: Setting,
    ) -> list[float]:
        weight, bias = (part.float() for part in solution)
        features = case.layers[layer].to(setting.device).float()
        if not setting.task.dense:
            return setting.task.case_scores((features @ weight.T + bias)[None], None)
        if case.masks is None:
            raise ValueError("dense features without masks")
        maps = torch.einsum("bc...,kc->bk...", features, weight)
        maps = maps + bias.reshape(1, -1, *[1] * (maps.ndim - 2))
        mode = "bilinear" if maps.ndim == 4 else "trilinear"
        size = tuple(case.masks.shape[1:])
        logits = functional.interpolate(maps, size=size, mode=mode, align_corners=False)
        return setting.task.case_scores(logits, case.masks.to(setting.device))


def _at_resolution(case: CaseFeatures, layer: str) -> Tensor:
    """Return a case's mask at the resolution of a stage: the class at each cell's centre."""
    if case.masks is None:
        raise ValueError("dense features without masks")
    size = tuple(case.layers[layer].shape[2:])
    masks = case.masks[:, None].float()
    return functional.interpolate(masks, size=size, mode="nearest-exact")[:, 0].long()
