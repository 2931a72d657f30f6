"""What a config says of a training: how long, on what, how, and when to write and look."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medssl.errors import ConfigError
from medssl.training.feed import FeedConfig
from medssl.training.optimization import OptimizationConfig


class TrainingConfig(OptimizationConfig, FeedConfig):
    """How long and on what to train.

    Attributes:
        steps: number of optimiser steps.
        global_batch_size: images a step, over all processes together.
        micro_batch_size: images that one process sends through the network at once; a step gathers
            the gradients of several where they do not fill the global batch. None: all that fall
            to a process. Batch norms see one micro batch at a time.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with a scaled loss).
        channels_last: keep feature maps with channels innermost, which convolutions in low
            precision on GPUs prefer.
        compile: let ``torch.compile`` fuse the network; the first steps take minutes.
        recompute: keep no activations inside the backbone's blocks and compute them again in the
            backward pass (gradient checkpointing): less memory, about a third more time.
        sync_batch_norm: batch norms see the images of all processes at once (GPUs alone); then what
            is learnt depends on their number. None: where a micro batch has fewer than 16 images.
        log_every: steps between two lines of the journal; also how often values are checked.
        validate_every: steps between two validations; 0 for the last step alone.
        checkpoint_every: steps between two training states; 0 for the last step alone.
        max_minutes: wall time after which the training saves its state and ends as on SIGTERM; the
            same command goes on. None for no limit.
        profile: record a few steps of a pretraining, and write where their time went to
            ``profile/`` in the run folder; what is trained stays the same.
    """

    steps: int = Field(gt=0)
    global_batch_size: int = Field(default=32, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    sync_batch_norm: bool | None = None
    log_every: int = Field(default=10, gt=0)
    validate_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)
    max_minutes: float | None = Field(default=None, gt=0)
    profile: bool = False

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainingConfig:
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self

    def micro_batches(self, num_ranks: int, before: int = 0) -> int:
        """Return into how many parts each global batch is divided, over all processes.

        Args:
            num_ranks: processes.
            before: how many it were when this training was started; 0 if it is starting. They stay
                as many: what a step computes does not depend on the number of processes.

        Raises:
            ConfigError: they cannot be dealt out evenly.
        """
        size, micro = self.global_batch_size, self.micro_batch_size
        number = before or (size // micro if micro else num_ranks)
        if size % number:
            raise ConfigError(
                f"training.global_batch_size: {size} images cannot be dealt out evenly to "
                f"{num_ranks} processes. Take a multiple of {num_ranks}."
            )
        if number % num_ranks:
            raise ConfigError(
                f"training: each step has {number} micro batches of {size // number} images, which "
                f"cannot be dealt out evenly to {num_ranks} processes. Start a number of processes "
                f"that divides {number}"
                + (", as this training was started." if before else ", or change micro_batch_size.")
            )
        return number
