"""The one training loop. Pretext and downstream tasks are both an `Objective` to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medssl.errors import DivergedError, MedsslError
from medssl.training.devices import right_gradients
from medssl.training.distributed import Ranks, Vote, synchronised
from medssl.training.feed import feed
from medssl.training.interruption import Interruption, Stop
from medssl.training.network import Network, Objective
from medssl.training.optimization import build_optimizer
from medssl.training.profiling import Profiler, Unprofiled, profiling
from medssl.training.recomputation import recompute_blocks
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.training.step import Step, Used
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler, Sample, Share

_SMALL_MICRO_BATCH = 16
"""Images below which a batch norm's statistics are poor, and processes share them on GPUs."""

_REMEDY = (
    "The last saved state is good. "
    "Lower training.learning_rate, raise warmup_steps, or use precision bf16 or fp32."
)


@dataclass(frozen=True)
class BadBatch:
    """A batch whose loss was not finite.

    Attributes:
        step: number of the step, from 0.
        part: of which micro batch.
        scan_keys: the scan of each crop.
    """

    step: int
    part: int
    scan_keys: list[str]


@dataclass(frozen=True)
class Calls:
    """What the loop calls, and when; every process of a training gives the same ones, or idle ones.

    Attributes:
        log: receives the steps done, and means since the last call.
        validate: called at ``validate_every`` and after the last step; its metrics are logged.
        save: called at ``checkpoint_every``, after the last step, and before the training is left
            early; always with finite weights.
        bad_batches: receives the batches whose loss was not finite, before `DivergedError`.
        enough: asked after each validation; true ends the training there. For one process alone.
        profile: folder of what `TrainingConfig.profile` asks for; None in all but one process.
    """

    log: Callable[[int, dict[str, float]], None]
    validate: Callable[[int], dict[str, float]] | None = None
    save: Callable[[], object] | None = None
    bad_batches: Callable[[list[BadBatch]], object] | None = None
    enough: Callable[[], bool] | None = None
    profile: Path | None = None


def start_state(
    network: Network, config: TrainingConfig, device: torch.device, ranks: Ranks | None = None
) -> TrainingState:
    """Return the state before the first step, on the device.

    Raises:
        ConfigError: the network cannot be trained as configured.
    """
    ranks = ranks or Ranks()
    if config.recompute:
        recompute_blocks(network.backbone)
    if config.channels_last:
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}
        network.to(memory_format=layout[network.backbone.spatial_dims])
    network.to(device)
    seen_at_once = config.global_batch_size // config.micro_batches(ranks.size)
    small = seen_at_once < _SMALL_MICRO_BATCH
    if config.sync_batch_norm or (
        config.sync_batch_norm is None and device.type == "cuda" and small
    ):
        synchronised(network, ranks, device)
    average = None
    if config.ema_decay:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if config.compile:
        network.compile()
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return TrainingState(network, build_optimizer(network, config), scaler, average)


def train(
    state: TrainingState,
    objective: Objective,
    sampler: CropSampler,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    augmentation: AugmentationConfig,
    calls: Calls,
    ranks: Ranks | None = None,
) -> None:
    """Train from ``state.step`` to ``config.steps``.

    Ctrl-C, SIGTERM and `TrainingConfig.max_minutes` end the step that is under way, save, and then
    raise; with several processes, all of them after the same step.

    Args:
        state: what moves; a loaded one goes on bitwise as if it had not stopped (same device).
        objective: makes the batch, scores the output.
        sampler: reads crops; a function of the step alone.
        config: steps, batch, precision, rates.
        seed: of augmentation and puzzles.
        device: where `state` lives.
        augmentation: what to vary before the label is drawn.
        calls: where to log, validate and save.
        ranks: the processes that share each step; None: this one alone.

    Raises:
        MachineError: processes start from different states.
        DivergedError: the loss or a weight is not finite; the last saved state is still good.
        KeyboardInterrupt, Terminated: the training was interrupted, and is saved.
        MedsslError: a scan cannot be read any more; the training is saved.
    """
    ranks = ranks or Ranks()
    ranks.check_same_start(state.step)
    state.micro_batches = config.micro_batches(ranks.size, state.micro_batches)
    share = Share(config.global_batch_size, state.micro_batches, ranks.rank, ranks.size)
    step = Step(
        state, objective, config,
        seed=seed, device=device, augmentation=augmentation, axes=sampler.request.axes, ranks=ranks,
    )  # fmt: skip
    with (
        right_gradients(config, device),
        Interruption(config.max_minutes) as interruption,
        closing(feed(sampler, state.step, config.steps, share, config, device)) as samples,
        profiling(calls.profile, config, device, config.steps - state.step) as profiler,
    ):
        _run(state, step, samples, config, device, calls, ranks, interruption, profiler)


def _run(
    state: TrainingState,
    step: Step,
    samples: Iterator[Sample],
    config: TrainingConfig,
    device: torch.device,
    calls: Calls,
    ranks: Ranks,
    interruption: Interruption,
    profiler: Profiler | Unprofiled,
) -> None:
    read: list[Used] = []
    vote = Vote(ranks)
    while state.step < config.steps:
        try:
            with profiler.step():
                used, rate = step.update(samples)
        except MedsslError:  # a scan cannot be read; the state is whole: no step is under way
            _save(state, calls)
            raise
        read += used

        last = state.step == config.steps
        validating = calls.validate is not None and (
            last or _due(state.step, config.validate_every)
        )
        saving = calls.save is not None and (last or _due(state.step, config.checkpoint_every))
        meeting = last or validating or saving or _due(state.step, config.log_every)
        stopping = Stop.NO if last else Stop(vote.highest(interruption.wanted))
        if meeting or stopping:
            _refuse_bad_batches(step, read, state.step, calls, ranks, device)
            means = {f"train/{name}": value for name, value in step.meter.read().items()}
            calls.log(state.step, {"lr": rate, **means, **_rejected(read, ranks, device)})
            read = []
        if last or saving:
            _check_weights(state)
        if validating and calls.validate is not None and not stopping:
            found = calls.validate(state.step)
            calls.log(state.step, {f"val/{name}": value for name, value in found.items()})
        if saving or stopping:
            _save(state, calls)
        if stopping:
            raise interruption.error(stopping)
        if validating and calls.enough is not None and calls.enough():
            _save(state, calls)
            return


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(state: TrainingState, calls: Calls) -> None:
    if calls.save is not None:
        _check_weights(state)
        calls.save()


def _rejected(read: list[Used], ranks: Ranks, device: torch.device) -> dict[str, float]:
    """Return the share of crops that were thrown away for too little foreground."""
    rejected = sum(used.rejected for used in read)
    tried = rejected + sum(len(used.scan_keys) for used in read)
    both = ranks.sum(torch.tensor([rejected, tried], dtype=torch.float32, device=device))
    return {"train/rejected_crops": float(both[0] / both[1])}


def _refuse_bad_batches(
    step: Step,
    read: list[Used],
    steps_done: int,
    calls: Calls,
    ranks: Ranks,
    device: torch.device,
) -> None:
    finite = step.meter.finite()
    if not ranks.any(not all(finite), device):
        return
    bad = [
        BadBatch(used.step, used.part, used.scan_keys)
        for used, good in zip(read, finite, strict=True)
        if not good
    ]
    if bad and calls.bad_batches is not None:
        calls.bad_batches(bad)
    first = f", first at step {bad[0].step + 1}" if bad else ""
    raise DivergedError(f"the loss is not finite in the steps up to {steps_done}{first}. {_REMEDY}")


def _check_weights(state: TrainingState) -> None:
    """Refuse weights that the last update broke, which the loss before it cannot tell."""
    tensors = [value for value in state.network.state_dict().values() if value.is_floating_point()]
    if not bool(torch.stack([value.isfinite().all() for value in tensors]).all()):
        raise DivergedError(
            f"weights of the network are not finite after step {state.step}. {_REMEDY}"
        )
