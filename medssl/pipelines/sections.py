"""Sections that several pipelines' configurations share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from medssl.config import ComponentConfig, Config, component
from medssl.downstream import DOWNSTREAM_TASKS
from medssl.evaluation.metrics import METRICS
from medssl.evaluation.protocols import PROTOCOLS
from medssl.evaluation.statistics.families import USUAL_MARGINS
from medssl.executors import EXECUTORS
from medssl.executors.local import Config as LocalConfig
from medssl.executors.local import default_workers
from medssl.transforms.requests import Plane, SampleRequest

if TYPE_CHECKING:
    from medssl.evaluation.protocols.base import Cell


class SamplingConfig(Config):
    """What is cut out of the prepared scans for training.

    Attributes:
        crop_size: voxels along each axis, of the prepared spacing: two numbers for 2D, three for
            3D.
        plane: of 2D crops from 3D scans: sagittal, coronal or axial.
        min_foreground: least share of a crop that is not air.
        num_sequences: co-registered sequences that every scan holds as channels.
    """

    crop_size: tuple[int, ...] = Field(min_length=2, max_length=3)
    plane: Plane | None = None
    min_foreground: float = Field(default=0.2, ge=0, le=1)
    num_sequences: int = Field(default=1, ge=1)

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.crop_size)

    def request(self) -> SampleRequest:
        """Return the request that tasks start from."""
        return SampleRequest(
            spatial_dims=self.spatial_dims,
            crop_size=self.crop_size,
            plane=self.plane,
            min_foreground=self.min_foreground,
            num_sequences=self.num_sequences,
        )


class SplitConfig(Config):
    """How patients are divided.

    Attributes:
        val_fraction: share of patients that choices (layer, strength, step) are made on.
        test_fraction: share of patients that are looked at once.
        file: a splits file to use instead, from another run's ``splits.json``.
        evaluate_on: ``validation`` while a recipe is being chosen: results are those of the
            validation patients, part of the training patients validates in their place, and the
            test patients take no part, not even in pretraining. ``test`` for the result.
    """

    val_fraction: float = Field(default=0.2, gt=0, lt=1)
    test_fraction: float = Field(default=0.3, gt=0, lt=1)
    file: Path | None = None
    evaluate_on: Literal["validation", "test"] = "test"

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} must add "
                "up to less than 1: the rest is for training"
            )
        return self


class MatrixConfig(Config):
    """Which cells of the transfer matrix to run.

    Attributes:
        labelled_patients: numbers of training patients whose labels may be used; ``all`` is
            every one.
        label_fractions: the same as shares of the training patients; give one of the two.
        seeds: of the subsets, the head and the batches; at least 5 for a verdict to lean on.
        executor: where cells run: ``local`` processes, or ``ray``. By default local ones: one a
            core on a CPU; with a GPU this process alone, which holds it.
        threads: of PyTorch for each cell on a CPU. The predictions of another number may differ in
            their last digits; the number of processes changes nothing.
    """

    labelled_patients: tuple[int | str, ...] | None = None
    label_fractions: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    executor: Annotated[ComponentConfig, component(EXECUTORS)] | None = None
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> MatrixConfig:
        if (self.labelled_patients is None) == (self.label_fractions is None):
            raise ValueError("give either labelled_patients or label_fractions")
        if not (self.labelled_patients or self.label_fractions):
            raise ValueError("give at least one number of labelled patients")
        for number in self.labelled_patients or ():
            if isinstance(number, str) and number != "all":
                raise ValueError(f"labelled_patients holds numbers or the word all, not {number}")
            if isinstance(number, int) and number < 1:
                raise ValueError("labelled_patients must be 1 or more")
        if any(not 0 < fraction <= 1 for fraction in self.label_fractions or ()):
            raise ValueError("label_fractions lie above 0 and at most at 1")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("seeds must be different numbers, at least one")
        return self

    def executor_for(self, device: str, num_cells: int) -> ComponentConfig:
        """Return where so many cells run on a kind of device (``cpu``, ``cuda``)."""
        if self.executor is not None:
            return self.executor
        workers = 0 if device != "cpu" else max(1, default_workers() // self.threads)
        return LocalConfig(num_workers=0 if min(workers, num_cells) < 2 else workers)

    def numbers(self, num_train_patients: int) -> tuple[int, ...]:
        """Return the numbers of labelled patients, ascending and each once."""
        if self.label_fractions is not None:
            wanted = [max(1, round(share * num_train_patients)) for share in self.label_fractions]
        else:
            wanted = [
                num_train_patients if number == "all" else int(number)
                for number in self.labelled_patients or ()
            ]
        return tuple(sorted({min(number, num_train_patients) for number in wanted}))


class StatisticsConfig(Config):
    """How inits are compared.

    Attributes:
        reference: the init that the others are compared with.
        num_resamples: bootstrap resamples of patients.
        alpha: 1 minus the confidence level; also the family-wise error rate. The family is all
            comparisons of one task: every init, protocol and number of labelled patients.
        margin: how much worse than the reference still counts as not worse, in units of the
            metric: by the metric's name, one number for every metric, or null for no such test.
            Metrics that are not named are not tested. Fix it before running.
    """

    reference: str = "imagenet"
    num_resamples: int = Field(default=10_000, ge=100)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    margin: dict[str, float] | float | None = Field(default_factory=lambda: dict(USUAL_MARGINS))

    @model_validator(mode="after")
    def _margins_of_metrics(self) -> StatisticsConfig:
        margins = self.margin if isinstance(self.margin, dict) else {"": self.margin or 0.0}
        known = sorted({*METRICS, *USUAL_MARGINS, ""})
        for name, margin in margins.items():
            if name not in known:
                raise ValueError(
                    f"margin: there is no metric {name!r}. There are: {', '.join(known[1:])}"
                )
            if not 0 <= margin < float("inf"):
                raise ValueError(f"margin must be 0 or more, not {margin:g}")
        return self

    def check_reference(self, inits: Iterable[str]) -> None:
        """Refuse a reference that is not among the inits: nothing would be compared.

        Raises:
            ValueError: it is not; for use in a validator.
        """
        labels = list(inits)
        if self.reference not in labels:
            raise ValueError(
                f"statistics.reference: {self.reference!r} is not one of inits. "
                f"There are: {', '.join(labels)}"
            )


TaskConfig = Annotated[ComponentConfig, component(DOWNSTREAM_TASKS)]
ProtocolConfig = Annotated[ComponentConfig, component(PROTOCOLS)]


class EvaluationSection(Config):
    """What is evaluated, whatever the inits.

    Attributes:
        tasks: downstream tasks, with their labels.
        protocols: how each is evaluated.
        matrix: label fractions and seeds.
        splits: how patients are divided.
        statistics: how inits are compared.
        allow_test_patients_in_pretraining: permit checkpoints that were pretrained on scans of
            test patients; the report then says so.
        allow_duplicated_images: permit images of test patients that are also those of other
            patients, in training, validation or a pretraining pool; the report then says so.
    """

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    protocols: tuple[ProtocolConfig, ...] = Field(min_length=1)
    matrix: MatrixConfig
    splits: SplitConfig = SplitConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    allow_test_patients_in_pretraining: bool = False
    allow_duplicated_images: bool = False

    @model_validator(mode="after")
    def _labels_are_different(self) -> EvaluationSection:
        labels = [_label(task) for task in self.tasks]
        if len(set(labels)) != len(labels):
            raise ValueError(f"two tasks are called the same ({labels}); give them a label each")
        names = [protocol.name for protocol in self.protocols]
        if len(set(names)) != len(names):
            raise ValueError(f"a protocol is given twice ({names})")
        return self

    @model_validator(mode="after")
    def _protocols_suit_the_tasks(self) -> EvaluationSection:
        unfit = self.unfit()
        for kind, every, place in (
            ("task", [_label(task) for task in self.tasks], 0),
            ("protocol", [protocol.name for protocol in self.protocols], 1),
        ):
            others = len(self.protocols) if place == 0 else len(self.tasks)
            for name in every:
                reasons = {pair: why for pair, why in unfit.items() if pair[place] == name}
                if len(reasons) == others:
                    told = "; ".join(
                        f"{protocol} for {task}: {why}" for (task, protocol), why in reasons.items()
                    )
                    raise ValueError(
                        f"{kind} {name} can be paired with nothing here ({told}). Leave it out, "
                        "or add what suits it"
                    )
        return self

    def unfit(self) -> dict[tuple[str, str], str]:
        """Return the pairs of task and protocol that make no sense together, and why.

        The matrix leaves them out.
        """
        return {
            (_label(task), protocol.name): why
            for task in self.tasks
            for protocol in self.protocols
            if (why := PROTOCOLS.load(protocol.name).refusal(DOWNSTREAM_TASKS.load(task.name)))
        }

    def cells(
        self, tasks: Iterable[str], inits: Iterable[str], num_train_patients: int
    ) -> list[Cell]:
        """Return the cells of the matrix, in the order in which they run."""
        from medssl.evaluation.matrix import build_cells

        names = [protocol.name for protocol in self.protocols]
        unfit = self.unfit()
        every = build_cells(
            tasks=list(tasks),
            inits=list(inits),
            protocols=names,
            labelled_patients=self.matrix.numbers(num_train_patients),
            num_train_patients=num_train_patients,
            seeds=self.matrix.seeds,
            once=[name for name in names if not PROTOCOLS.load(name).uses_label_fractions],
        )
        return [cell for cell in every if (cell.task, cell.protocol) not in unfit]

    def budgets(self) -> dict[str, str]:
        """Return what one cell of each protocol costs, in words."""
        from medssl.evaluation.protocols.base import ProtocolConfig as Budgeted

        return {
            protocol.name: protocol.budget()
            for protocol in self.protocols
            if isinstance(protocol, Budgeted)
        }


def _label(task: ComponentConfig) -> str:
    """Return what a task is called in tables."""
    return str(getattr(task, "label", None) or task.name)
