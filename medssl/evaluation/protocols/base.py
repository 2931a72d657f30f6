"""What a protocol is: it turns one cell of the transfer matrix into predictions.

Every init of a study gets the same splits, the same labelled patients, the same head weights, the
same batches and the same budget. Nothing but the backbone's starting weights differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from medssl.config import ComponentConfig
from medssl.downstream.base import DownstreamTask
from medssl.evaluation.features import (
    CaseFeatures,
    alone,
    extract_features,
    load_features,
    save_features,
)
from medssl.evaluation.metrics import METRICS, Array
from medssl.models.backbones.base import Backbone
from medssl.models.decoders import UNetDecoder, decoder_in
from medssl.models.inits.base import LoadReport
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.transforms.cases import CaseReader
from medssl.transforms.sampling import SampleRequest

T = TypeVar("T")

_POOLED = "#pooled"
"""In a file's name, features that all tasks of one answer a scan share; no task is called so."""


class ProtocolConfig(ComponentConfig):
    """Base of the configurations of protocols."""

    def budget(self) -> str:
        """Return in a few words what one cell costs, the same for every init; for plans."""
        return "features once a backbone"


class FrozenConfig(ProtocolConfig):
    """Base of the configurations of protocols that look at frozen features.

    Features are computed once for all protocols that agree on these two.

    Attributes:
        max_slices: slices of a 3D scan that a 2D backbone looks at, evenly spaced.
        max_features: numbers that a stage is pooled to where the task is not dense.
    """

    max_slices: int = Field(default=12, gt=0)
    max_features: int = Field(default=9000, gt=0)


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the transfer matrix.

    Attributes:
        task: label of the downstream task.
        init: label of the init.
        protocol: name of the protocol.
        num_labelled_patients: patients whose labels may be used for training.
        label_fraction: the same as a share of all training patients.
        seed: of the subset of labelled patients, the head and the batches.
    """

    task: str
    init: str
    protocol: str
    num_labelled_patients: int
    label_fraction: float
    seed: int

    @property
    def key(self) -> str:
        """The cell's name in files and in the journal."""
        return f"{self.task}-{self.init}-{self.protocol}-n{self.num_labelled_patients}-s{self.seed}"


@dataclass(frozen=True)
class Prediction:
    """What one cell says of one test scan.

    Attributes:
        layer: the stage that was probed; empty where the whole network answers.
        selected: whether validation patients chose this layer.
        scan_key: the test scan.
        target: what is known of it, as in `DownstreamTask.targets`.
        scores: class probabilities, or Dice of each foreground class.
        num_labelled_patients, seed: where they are not the cell's: in protocols that choose the
            labelled patients themselves.
    """

    layer: str
    selected: bool
    scan_key: str
    target: tuple[float, ...]
    scores: tuple[float, ...]
    num_labelled_patients: int | None = None
    seed: int | None = None


@dataclass
class Setting:
    """What all cells of one init and task have in common.

    Attributes:
        task: the downstream task with its labels.
        store: the prepared scans.
        request: the configured crop; each protocol lets the task amend it.
        splits: patients of training, validation and test.
        init: label of the init.
        make_backbone: returns a fresh backbone with the init's weights, and what was loaded into
            it; the seed matters to the random init alone.
        seed: the study's.
        device: where to compute.
        seeded_init: whether the init's weights depend on the cell's seed (random), so that
            features are computed for each seed.
        feature_scans: the scans whose features are computed: those that any task needs which can
            share them.
        feature_folder: where features are kept; None: in memory alone.
        apply_decoder: starts a voxel task's decoder from the init's, where it brings one; returns
            what was loaded, in words.
        report: what was loaded into the backbone last made, or into the one that made the
            features last asked for.
    """

    task: DownstreamTask
    store: Store
    request: SampleRequest
    splits: Splits
    init: str
    make_backbone: Callable[[int], tuple[Backbone, LoadReport]]
    seed: int
    device: torch.device
    seeded_init: bool
    feature_scans: Sequence[str]
    feature_folder: Path | None = None
    apply_decoder: Callable[[UNetDecoder], str] = lambda _: ""
    report: dict[str, Any] = field(default_factory=dict)
    report_text: str = ""
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def new_backbone(self, seed: int) -> Backbone:
        """Return a fresh backbone with the init's weights, and note what was loaded."""
        backbone, report = self.make_backbone(seed)
        self.report, self.report_text = report.to_dict(), str(report)
        return backbone

    def start_decoder(self, head: nn.Module) -> None:
        """Start the decoder of a fresh head from the init's, if both have one; note it."""
        decoder = decoder_in(head)
        loaded = self.apply_decoder(decoder) if decoder is not None else ""
        if loaded:
            self.report["decoder"] = loaded
            self.report_text += f"; {loaded}"

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what cells have in common: made by the first that asks for it."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def backbone_seed(self, cell: Cell) -> int:
        """Return what the backbone of a cell depends on: cells with the same one share it."""
        return cell.seed if self.seeded_init else 0

    def scans_of(self, patients: Iterable[str]) -> list[str]:
        """Return the labelled, prepared scans of some patients, sorted."""
        wanted = set(patients)
        return [
            key
            for key in self.store.scan_keys
            if key in self.task.targets and self.store.entry(key).patient_key in wanted
        ]

    def labelled_scans(self, cell: Cell) -> list[str]:
        """Return the training scans whose labels a cell may use: the same for every init."""
        patients = self.splits.labelled(
            num_patients=cell.num_labelled_patients, seed=cell.seed, strata=self.strata()
        )
        return self.scans_of(patients)

    def strata(self) -> dict[str, Any]:
        """Return the class of each labelled patient (of the first scan by key); None for masks."""
        strata: dict[str, Any] = {}
        for key in self.scans_of([*self.splits.train, *self.splits.val, *self.splits.test]):
            strata.setdefault(self.store.entry(key).patient_key, self.task.stratum(key))
        return strata

    def cases(self, scan_keys: Sequence[str], max_slices: int | None = None) -> CaseReader:
        """Return a reader of whole cases, with masks where the task has any."""
        request = self.task.request(self.request)
        return CaseReader(self.store, scan_keys, request, max_slices=max_slices)

    def features(self, cell: Cell, max_slices: int, max_features: int) -> dict[str, CaseFeatures]:
        """Return the features of all labelled scans: computed once a backbone, then kept."""
        seed = self.backbone_seed(cell)
        pooled = () if self.task.dense else (max_features,)
        return self.once(
            ("features", seed, max_slices, *pooled),
            lambda: self._kept_features(seed, max_slices, max_features),
        )

    def _kept_features(
        self, seed: int, max_slices: int, max_features: int
    ) -> dict[str, CaseFeatures]:
        """Return features from disk, or compute and keep them: one process does, others wait."""
        if self.feature_folder is None:
            return self._computed_features(seed, max_slices, max_features)
        kind = self.task.name if self.task.dense else _POOLED
        path = self.feature_folder / (
            f"{kind}-{self.init}-s{seed}-{max_slices}-{max_features}.safetensors"
        )
        with alone(path):
            found = load_features(path)
            if found is None:
                features = self._computed_features(seed, max_slices, max_features)
                save_features(path, features, self.report, self.report_text)
                return features
        features, self.report, self.report_text = found
        return features

    def _computed_features(
        self, seed: int, max_slices: int, max_features: int
    ) -> dict[str, CaseFeatures]:
        return extract_features(
            self.new_backbone(seed).to(self.device),
            self.cases(self.feature_scans, max_slices),
            device=self.device,
            dense=self.task.dense,
            max_features=max_features,
        )

    def targets(self, scan_keys: Sequence[str]) -> Array:
        """Return what is known of some scans, float64: (N,) where it is one number, else (N, T)."""
        targets = np.array([self.task.targets[key] for key in scan_keys], dtype=np.float64)
        return targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets

    def score(self, scan_keys: Sequence[str], scores: Sequence[Sequence[float]]) -> float:
        """Return the task's primary metric over some scans, larger is better."""
        metric = METRICS[self.task.metric]
        value = metric.compute(self.targets(scan_keys), np.array(scores, dtype=np.float64))
        return value if metric.higher_is_better else -value


class Protocol(ABC):
    """Base of every protocol.

    Args:
        config: the member's own ``Config``.

    Attributes:
        uses_label_fractions: whether a cell's number of labelled patients matters. Where it does
            not, the protocol runs once an init and task, with all of them and the first seed.
    """

    uses_label_fractions: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config: Any = config

    @classmethod
    def refusal(cls, task: type[DownstreamTask]) -> str | None:  # noqa: ARG003  (members read it)
        """Return why the protocol makes no sense for a kind of task; None where it does."""
        return None

    @abstractmethod
    def run(
        self,
        cell: Cell,
        setting: Setting,
        log: Callable[[int, dict[str, float]], None],
    ) -> list[Prediction]:
        """Return the predictions of one cell for every test scan.

        Test labels are used for scores alone: what is chosen (strength, layer, step) is chosen on
        validation patients.
        """
