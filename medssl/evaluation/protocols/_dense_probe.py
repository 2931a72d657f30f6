"""The linear probe where every voxel has a class: one regression for all positions of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from medssl.evaluation.feature_table import standardisation
from medssl.evaluation.features import CaseFeatures
from medssl.evaluation.linear_models import fit_logistic, space_of, weights_of
from medssl.evaluation.protocols._pooled import Answered, defined
from medssl.evaluation.protocols.base import Cell, FrozenConfig, Setting
from medssl.randomness import torch_generator
from medssl.transforms.cases import without_padding

ClassWeights = Literal["none", "sqrt", "balanced"]
"""All positions count alike; or by one over the (root of the) number of their class."""


STRENGTHS = tuple(10.0**power for power in range(-7, 3))
"""Ten L2 penalties, as shares of the number of features."""


class ProbeConfig(FrozenConfig):
    """What configures the linear probe, dense or not.

    Attributes:
        strengths: L2 penalties tried, as shares of the number of features, which the squared length
            of a standardised row is: so one grid suits layers of 64 and of 9,000 numbers. In
            scikit-learn's terms ``1 / (C * rows * features)``, for ridge ``alpha / (rows *
            features)``.
        max_rows: positions that one dense regression is fitted to.
        class_weights: how much the classes of a dense task count.
        max_steps: steps of L-BFGS.
    """

    strengths: tuple[float, ...] = Field(default=STRENGTHS, min_length=1)
    max_rows: int = Field(default=10_000, gt=0)
    class_weights: ClassWeights = "balanced"
    max_steps: int = Field(default=1000, gt=0)

    @field_validator("strengths")
    @classmethod
    def _strongest_first(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if min(strengths) <= 0:
            raise ValueError("strengths must be above 0")
        return tuple(sorted(set(strengths), reverse=True))  # among equals the strongest is taken


def answer_voxels(
    config: ProbeConfig, cell: Cell, setting: Setting, scans: Sequence[str]
) -> dict[str, Answered]:
    """Return what every layer answers for the test scans."""
    features = setting.features(cell, config.max_slices, config.max_features)
    train, val, test = (
        [features[key] for key in keys]
        for keys in (
            scans, setting.scans_of(setting.splits.val), setting.scans_of(setting.splits.test),
        )
    )  # fmt: skip
    answered = {}
    for layer in train[0].layers:
        solutions = _fit(config, cell, setting, train, layer)
        ranks = []
        for solution in solutions:
            scores = [_case_scores(case, layer, solution, setting) for case in val]
            score = setting.score([case.scan_key for case in val], scores)
            ranks.append((defined(score), 0.0))
        best = ranks.index(max(ranks))
        found = [_case_scores(case, layer, solutions[best], setting) for case in test]
        chosen = strength_chosen(config.strengths, best)
        answered[layer] = Answered(ranks[best], chosen, torch.tensor(found, dtype=torch.float64))
    return answered


def strength_chosen(strengths: Sequence[float], best: int) -> dict[str, float]:
    """Return the strength that was chosen, and whether a wider grid might do better."""
    at_end = len(strengths) > 1 and best in {0, len(strengths) - 1}
    return {"strength": strengths[best], "strength_at_end": float(at_end)}


def _fit(
    config: ProbeConfig, cell: Cell, setting: Setting, cases: Sequence[CaseFeatures], layer: str
) -> list[tuple[Tensor, Tensor]]:
    """Return weights (K, C) and bias (K,) for maps as they come, for every strength."""
    mean, deviation = _standardisation(config, cell, setting, layer)
    rows, classes = _positions(config, cell, setting, cases, layer)
    rows = (rows.to(setting.device).double() - mean) / deviation
    classes = classes.to(setting.device)
    num_classes = setting.task.num_outputs
    columns = functional.one_hot(classes, num_classes)
    space = space_of(rows)
    models = fit_logistic(
        space,
        columns[:, 1:] if num_classes == 2 else columns,
        [strength * rows.shape[1] for strength in config.strengths],
        weights=_weights(classes, num_classes, config.class_weights).expand(
            len(config.strengths), -1
        ),
        max_steps=config.max_steps,
    )
    weights = weights_of(models, space, rows) / deviation[:, None]
    bias = models.bias - mean @ weights
    if num_classes == 2:  # the answer for the background is 0
        weights, bias = functional.pad(weights, (1, 0)), functional.pad(bias, (1, 0))
    return [(one.T.float(), offset.float()) for one, offset in zip(weights, bias, strict=True)]


def _weights(classes: Tensor, num_classes: int, kind: ClassWeights) -> Tensor:
    """Return what each position counts, (N,)."""
    if kind == "none":
        return torch.ones(len(classes), dtype=torch.float64, device=classes.device)
    counts = torch.bincount(classes, minlength=num_classes).double()
    return (counts ** (-0.5 if kind == "sqrt" else -1.0))[classes]


def _standardisation(
    config: ProbeConfig, cell: Cell, setting: Setting, layer: str
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation over all training patients, whose labels are not looked at."""

    def compute() -> tuple[Tensor, Tensor]:
        features = setting.features(cell, config.max_slices, config.max_features)
        cases = [features[key] for key in setting.scans_of(setting.splits.train)]
        rows, _ = _positions(config, cell, setting, cases, layer)
        mean, deviation = standardisation(rows)
        return mean.to(setting.device), deviation.to(setting.device)

    key = ("dense", config.max_slices, config.max_rows, setting.backbone_seed(cell), layer)
    return setting.once((*key, cell.seed), compute)


def _positions(
    config: ProbeConfig, cell: Cell, setting: Setting, cases: Sequence[CaseFeatures], layer: str
) -> tuple[Tensor, Tensor]:
    """Return features (N, C) and classes (N,): each case gives as many positions.

    They are drawn without a look at their label, and a case gives the same ones in every cell of
    a seed.
    """
    maps, labels = [], []
    share = max(1, config.max_rows // len(cases))
    for case in cases:
        generator = torch_generator(setting.seed, "probe", cell.seed, case.scan_key, layer)
        target = _at_resolution(case, layer).flatten()
        chosen = torch.randperm(len(target), generator=generator)[:share]
        maps.append(case.layers[layer].movedim(1, -1).flatten(0, -2)[chosen])
        labels.append(target[chosen])
    return torch.cat(maps), torch.cat(labels)


def _case_scores(
    case: CaseFeatures, layer: str, solution: tuple[Tensor, Tensor], setting: Setting
) -> list[float]:
    if case.masks is None:
        raise ValueError("dense features without masks")
    weight, bias = solution
    features = case.layers[layer].to(setting.device).float()
    maps = torch.einsum("bc...,kc->bk...", features, weight)
    maps = maps + bias.reshape(1, -1, *[1] * (maps.ndim - 2))
    mode = "bilinear" if maps.ndim == 4 else "trilinear"
    size = tuple(case.masks.shape[1:])
    logits = functional.interpolate(maps, size=size, mode=mode, align_corners=False)
    logits, masks = (without_padding(part, case.padding) for part in (logits, case.masks))
    return setting.task.case_scores(logits, masks.to(setting.device))


def _at_resolution(case: CaseFeatures, layer: str) -> Tensor:
    """Return a case's mask at the resolution of a stage: the class at each cell's centre."""
    if case.masks is None:
        raise ValueError("dense features without masks")
    size = tuple(case.layers[layer].shape[2:])
    masks = case.masks[:, None].float()
    return functional.interpolate(masks, size=size, mode="nearest-exact")[:, 0].long()
