"""Several pretext tasks on one backbone: each batch is of one task, and brings its own head.

Source: Doersch and Zisserman, "Multi-task self-supervised visual learning", ICCV 2017; swapping the
last layer by the batch's type: Misra, lecture "Self-supervised learning in computer vision", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medssl.config import ComponentConfig, component
from medssl.config import Config as BaseConfig
from medssl.errors import ConfigError
from medssl.models.backbones.base import Backbone
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import Panel, PretextBatch, PretextConfig, PretextTask
from medssl.transforms.sampling import Sample, SampleRequest

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Multiples of it modulo 1 are spread evenly: shares are met in every stretch of steps."""


_LEAST_UNIT = 1e-3
"""Of the loss of the trivial answer, for images in [0, 1]: less is a batch without contrast."""


class Phase(BaseConfig):
    """A stretch of training with shares of its own.

    Attributes:
        from_step: its first step.
        shares: how often each task comes, by name; tasks not named do not come.
    """

    from_step: int = Field(ge=0)
    shares: dict[str, float]


class Config(PretextConfig):
    """Configuration of training on several tasks.

    Attributes:
        tasks: the tasks; each may come once.
        mode: ``alternate``: one after the other; ``proportional``: as often as ``shares`` say;
            ``scheduled``: by shares that change over the steps.
        shares: how often each task comes, by name; 1 where it is not named.
        schedule: the phases of ``scheduled``, the first from step 0.
        balance: ``chance`` divides each task's loss by that of a network that knows nothing, so
            that a choice among many classes does not outweigh one among few; ``none`` does not.
        weights: factors of the losses, by name; 1 where it is not named.
    """

    name: Literal["multi"] = "multi"
    tasks: tuple[Annotated[ComponentConfig, component(PRETEXT_TASKS, without=("multi",))], ...] = (
        Field(
            default=(
                ComponentConfig(name="rotation"),
                ComponentConfig(name="jigsaw"),
                ComponentConfig(name="relative_position"),
                ComponentConfig(name="inpainting"),
            ),
            min_length=2,
            validate_default=True,
        )
    )
    mode: Literal["alternate", "proportional", "scheduled"] = "alternate"
    shares: dict[str, float] = Field(default_factory=dict)
    schedule: tuple[Phase, ...] = ()
    balance: Literal["chance", "none"] = "chance"
    weights: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Config:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"each task may come once, found {', '.join(names)}")
        phases = {f"schedule from step {p.from_step}": p.shares for p in self.schedule}
        for where, numbers in {"shares": self.shares, "weights": self.weights, **phases}.items():
            unknown = sorted(set(numbers) - set(names))
            if unknown:
                raise ValueError(
                    f"{where} names {', '.join(unknown)}; the tasks are {', '.join(names)}"
                )
            if any(not 0 <= value < math.inf for value in numbers.values()):
                raise ValueError(f"{where} must be 0 or more, found {numbers}")
        if self.shares and self.mode != "proportional":
            raise ValueError(f"shares are for mode proportional, found mode {self.mode}")
        if self.mode == "proportional" and not any(self.shares.get(name, 1) for name in names):
            raise ValueError("shares leave no task: give at least one a share above 0")
        if (self.mode == "scheduled") != bool(self.schedule):
            raise ValueError("mode scheduled and a schedule go together: give both or neither")
        starts = [phase.from_step for phase in self.schedule]
        if self.schedule and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"schedule starts at step 0 and goes upwards, found {starts}")
        if any(not any(phase.shares.values()) for phase in self.schedule):
            raise ValueError("each phase of schedule needs a task with a share above 0")
        return self


class MultiTask(PretextTask):
    """Train one backbone on several tasks, one batch a task."""

    primary_metric = "relative_loss"
    higher_is_better = False

    def __init__(self, config: Config, spatial_dims: int) -> None:
        super().__init__(config, spatial_dims)
        self.tasks: dict[str, PretextTask] = {
            member.name: PRETEXT_TASKS.build(member, spatial_dims) for member in config.tasks
        }
        self.draws = any(task.draws for task in self.tasks.values())
        self.chance_level = 1.0
        self.healthy_range = (0.0, 0.9)
        self._requests: dict[str, SampleRequest] = {}

    def request(self, base: SampleRequest) -> SampleRequest:
        """Ask for what serves every task.

        Raises:
            ConfigError: the tasks need different crops, or backbones of different channels.
        """
        self._requests = {name: task.request(base) for name, task in self.tasks.items()}
        self.in_channels(base)
        return reduce(SampleRequest.merge, self._requests.values())

    def in_channels(self, request: SampleRequest) -> int:
        """Return the channels of the images that the backbone sees, the same for every task."""
        own = {
            name: task.in_channels(self._requests.get(name, request))
            for name, task in self.tasks.items()
        }
        if len(set(own.values())) != 1:
            found = ", ".join(f"{name} {channels}" for name, channels in own.items())
            raise ConfigError(
                "pretext.tasks: one backbone needs images of the same number of channels, found "
                f"{found}. Leave tasks out, or pretrain them alone."
            )
        return next(iter(own.values()))

    def contract(self) -> dict[str, Any]:
        """Return the fields of all tasks together."""
        return {key: v for task in self.tasks.values() for key, v in task.contract().items()}

    def task_at(self, step: int) -> PretextTask:
        """Return the task whose turn it is: a function of the step alone, so resuming is exact."""
        names = list(self.tasks)
        if self.config.mode == "alternate":
            return self.tasks[names[step % len(names)]]
        if self.config.mode == "proportional":
            shares = [self.config.shares.get(name, 1.0) for name in names]
        else:
            phase = [phase for phase in self.config.schedule if phase.from_step <= step][-1]
            shares = [phase.shares.get(name, 0.0) for name in names]
        place = (step * _GOLDEN_RATIO) % 1 * sum(shares)
        for name, share in zip(names, shares, strict=True):
            place -= share
            if place < 0:
                return self.tasks[name]
        return self.tasks[[n for n, share in zip(names, shares, strict=True) if share][-1]]

    def make_batch(self, images: Tensor, generator: torch.Generator) -> PretextBatch:
        """Make puzzles of one task, drawn at random; training takes turns instead."""
        drawn = torch.randint(
            len(self.tasks), (), device=images.device, generator=generator
        )  # waits for the device, which training does not: see `batch_of`
        return self._puzzle(list(self.tasks.values())[int(drawn)], images, generator)

    def batch_of(self, sample: Sample, generator: torch.Generator) -> PretextBatch:
        return self._puzzle(self.task_at(sample.step), sample.images, generator)

    def puzzles(self, sample: Sample, generator: torch.Generator) -> list[PretextBatch]:
        return [self._puzzle(task, sample.images, generator) for task in self.tasks.values()]

    def _puzzle(
        self, task: PretextTask, images: Tensor, generator: torch.Generator
    ) -> PretextBatch:
        own = self._requests.get(task.name)
        return task.make_batch(images if own is None else _own_channels(images, own), generator)

    def build_head(self, backbone: Backbone) -> nn.Module:
        return nn.ModuleDict({name: task.build_head(backbone) for name, task in self.tasks.items()})

    def forward(self, backbone: Backbone, head: nn.Module, batch: PretextBatch) -> Any:
        own: Any = head.get_submodule(batch.task)
        return self.tasks[batch.task].forward(backbone, own, batch)

    def loss(self, output: Any, batch: PretextBatch) -> Tensor:
        task = self.tasks[batch.task]
        loss: Tensor = task.loss(output, batch) * self.config.weights.get(batch.task, 1.0)
        if self.config.balance == "chance":
            loss = loss / _unit(task, batch)
        return loss

    def metrics(self, output: Any, batch: PretextBatch) -> dict[str, Tensor]:
        task = self.tasks[batch.task]
        metrics = task.metrics(output, batch)
        loss = task.loss(output, batch).detach()
        relative = loss / _unit(task, batch)
        if "weight" in batch.extras:  # a batch without a puzzle that counts says nothing
            relative = torch.where(batch.extras["weight"].sum() > 0, relative, torch.nan)
        named = {f"{batch.task}_{name}": value for name, value in metrics.items()}
        return {
            "relative_loss": relative,
            f"{batch.task}_relative_loss": relative,
            f"{batch.task}_loss": loss,
            **named,
        }

    def panels(self, batch: PretextBatch, output: Any | None) -> list[list[Panel]]:
        return self.tasks[batch.task].panels(batch, output)

    def baselines(self, batch: PretextBatch) -> dict[str, float]:
        found = self.tasks[batch.task].baselines(batch)
        return {f"{batch.task}_{name}": value for name, value in found.items()}

    def confusion(self, output: Any, batch: PretextBatch) -> Tensor | None:
        return self.tasks[batch.task].confusion(output, batch)

    def parts(self) -> Mapping[str, PretextTask]:
        return {f"{name}_": task for name, task in self.tasks.items()}

    def diagnostics(self, network: nn.Module, batches: list[PretextBatch]) -> dict[str, Tensor]:
        """Return how the tasks pull at the backbone, on the same images.

        Returns:
            For each task, the norm of its weighted loss's gradient over the backbone's weights; for
            each two tasks, the cosine between their gradients: above 0 they help each other, below
            0 they work against each other.
        """
        weights = [w for w in network.get_submodule("backbone").parameters() if w.requires_grad]
        gradients = {}
        for batch in batches:
            loss = self.loss(network(batch), batch)
            parts = torch.autograd.grad(loss, weights)
            gradients[batch.task] = torch.cat([part.detach().flatten().float() for part in parts])
        found = {f"{name}_gradient_norm": vector.norm() for name, vector in gradients.items()}
        for one, other in combinations(gradients, 2):
            found[f"gradient_cosine_{one}_{other}"] = functional.cosine_similarity(
                gradients[one], gradients[other], dim=0
            )
        return found


def _own_channels(images: Tensor, own: SampleRequest) -> Tensor:
    """Return the channels that a task asked for, of images read for all: the inner neighbours."""
    wanted = 2 * own.num_neighbours + 1
    read = images.shape[1] // own.num_sequences
    if read == wanted:
        return images
    apart = images.unflatten(1, (own.num_sequences, read))
    inner: Tensor = apart.narrow(2, (read - wanted) // 2, wanted)
    return inner.flatten(1, 2)


def _unit(task: PretextTask, batch: PretextBatch) -> Tensor | float:
    """Return the loss of the trivial answer, in which a task's loss is measured."""
    unit = task.loss_of_guessing(batch)
    # A blank batch is restored by anything: its loss shall not become infinite.
    return unit.clamp(min=_LEAST_UNIT) if isinstance(unit, Tensor) else unit
