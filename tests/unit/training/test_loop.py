"""The loop: goes on as if it had not stopped, stops when it diverges, and never waits in a step."""

from __future__ import annotations

import math
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import ConfigError, DataError, DivergedError, Terminated
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext.base import PretextTask
from medssl.scans.store import Store
from medssl.training.distributed import Ranks
from medssl.training.interruption import TimeUp
from medssl.training.loop import BadBatch, start_state
from medssl.training.network import build_network
from medssl.training.state import TrainingState, saved_states
from medssl.training.step import Step
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import Sample, SampleRequest
from training import CPU, EVERY_TASK, Training, blob_store, configured, pretext_task, tiny_backbone

every_task = pytest.mark.parametrize(("name", "dims"), EVERY_TASK)
both_dims = pytest.mark.parametrize("dims", [2, 3])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


def weights(state: TrainingState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.network.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def moments(state: TrainingState) -> list[Tensor]:
    kept = state.optimizer.state_dict()["state"]
    return [value for entry in kept.values() for value in entry.values()]


# ------------------------------------------------------------------------------------ resumption


@every_task
@pytest.mark.parametrize("num_workers", [0, 2])
def test_four_steps_equal_two_then_saved_loaded_and_two_more(
    store: Store, tmp_path: Path, name: str, dims: int, num_workers: int
):
    settings = configured(num_workers=num_workers, checkpoint_every=2)
    whole, first, second = (Training(store, pretext_task(name, dims), settings) for _ in range(3))
    wanted = whole.run(whole.state(), save=lambda: None)

    stopped = first.state()

    def save_and_die() -> None:
        stopped.save(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stopped, save=save_and_die)
    resumed = second.state()
    resumed.resume(tmp_path, CPU)
    assert resumed.step == 2
    second.run(resumed, save=lambda: None)

    assert resumed.step == wanted.step == 4
    assert same(weights(resumed), weights(wanted))
    pairs = zip(moments(resumed), moments(wanted), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert first.logged + second.logged == whole.logged


@both_dims
def test_the_number_of_workers_changes_nothing(store: Store, dims: int):
    task = pretext_task("rotation", dims)
    runs = [Training(store, task, configured(num_workers=number)) for number in (0, 2)]
    ends = [weights(run.run(run.state())) for run in runs]
    assert same(*ends)
    assert runs[0].logged == runs[1].logged


def test_a_finished_state_is_left_as_it_is(store: Store):
    training = Training(store, pretext_task("rotation", 2), configured(steps=2))
    state = training.run(training.state())
    before = weights(state)
    training.logged.clear()
    training.run(state)
    assert same(weights(state), before)
    assert training.logged == []


def test_training_draws_nothing_from_the_random_state_of_the_process(store: Store):
    training = Training(store, pretext_task("inpainting", 2), configured(steps=2))
    torch.manual_seed(1)
    first = weights(training.run(training.state()))
    torch.manual_seed(2)
    assert same(first, weights(training.run(training.state())))


def test_another_seed_gives_other_weights(store: Store):
    task = pretext_task("rotation", 2)
    runs = [Training(store, task, configured(steps=2), seed=seed) for seed in (5, 6)]
    assert not same(*(weights(run.run(run.state())) for run in runs))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_keeps_weights_in_float32(store: Store, precision: str):
    training = Training(store, pretext_task("rotation", 2), configured(precision=precision))
    state = training.run(training.state())
    assert all(p.dtype == torch.float32 for p in state.network.parameters())
    assert all(math.isfinite(m["train/loss"]) for _, m in training.logged)


# ----------------------------------------------------------------------- what is called, and when


def test_log_validation_and_save_come_at_their_steps_and_after_the_last(store: Store):
    settings = configured(steps=7, log_every=2, validate_every=3, checkpoint_every=5)
    training = Training(store, pretext_task("rotation", 2), settings)
    state, saved, validated = training.state(), [], []

    def validate(step: int) -> dict[str, float]:
        validated.append((step, state.step))
        return {"loss": 1.5}

    training.run(state, validate=validate, save=lambda: saved.append(state.step))
    assert saved == [5, 7]
    assert validated == [(3, 3), (6, 6), (7, 7)]
    trained = [step for step, metrics in training.logged if "train/loss" in metrics]
    assert trained == [2, 3, 4, 5, 6, 7]  # also before anything else is done
    told = [step for step, metrics in training.logged if "val/loss" in metrics]
    assert told == [3, 6, 7]
    assert all(m == {"val/loss": 1.5} for _, m in training.logged if "val/loss" in m)


def test_without_intervals_everything_comes_once_at_the_end(store: Store):
    training = Training(store, pretext_task("rotation", 2), configured(steps=3, log_every=100))
    state, calls = training.state(), []
    training.run(
        state,
        validate=lambda step: calls.append(("validate", step)) or {},
        save=lambda: calls.append(("save", state.step)),
    )
    assert calls == [("validate", 3), ("save", 3)]
    assert [step for step, metrics in training.logged if "train/loss" in metrics] == [3]


def test_what_is_logged_is_the_mean_since_the_last_time(store: Store):
    task = pretext_task("inpainting", 2)
    every, second = (Training(store, task, configured(log_every=n)) for n in (1, 2))
    every.run(every.state())
    second.run(second.state())
    losses = [metrics["train/loss"] for _, metrics in every.logged]
    wanted = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert [m["train/loss"] for _, m in second.logged] == pytest.approx(wanted, rel=1e-6)
    assert set(every.logged[0][1]) == {
        "lr", "train/loss", "train/masked_l1", "train/masked_psnr", "train/mean_fill_l1",
        "train/mean_fill_psnr", "train/rejected_crops",
    }  # fmt: skip


def test_the_head_starts_from_its_seed_whatever_was_drawn_before():
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        network = build_network(tiny_backbone(2), pretext_task("rotation", 2), seed=3)
        heads.append({name: value.clone() for name, value in network.head.state_dict().items()})
    assert same(*heads)


# ------------------------------------------------------------------------------------ divergence


class Diverging:
    """A task whose loss, or whose gradient alone, stops being finite at a step."""

    def __init__(self, task: PretextTask, at: int, *, gradient: bool = False) -> None:
        self._task, self._at, self._gradient, self._calls = task, at, gradient, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        self._calls += 1
        loss = self._task.loss(output, batch)
        if self._calls != self._at:
            return loss
        if self._gradient:  # the root of zero: finite, with an infinite slope
            return loss + (output * 0).abs().sqrt().sum()
        return loss * math.nan


def test_a_loss_that_is_not_finite_stops_the_training_and_leaves_the_last_state(
    store: Store, tmp_path: Path
):
    task: Any = Diverging(pretext_task("rotation", 2), at=4)
    training = Training(store, task, configured(steps=8, log_every=10, checkpoint_every=2))
    state, bad = training.state(), []
    with pytest.raises(DivergedError) as stopped:
        training.run(state, save=lambda: state.save(tmp_path), bad_batches=bad.extend)
    assert str(stopped.value) == (
        "the loss is not finite in the steps up to 4, first at step 4. The last saved state is "
        "good. Lower training.learning_rate, raise warmup_steps, or use precision bf16 or fp32."
    )
    assert stopped.value.exit_code == 5
    wanted = training.sampler().batch(3, 4).scan_keys
    assert bad == [BadBatch(step=3, part=0, scan_keys=wanted)]
    good = training.state()
    assert good.resume(tmp_path, CPU)
    assert good.step == 2
    assert all(value.isfinite().all() for value in good.network.state_dict().values())


def test_an_update_that_breaks_the_weights_is_not_saved_though_its_loss_was_finite(store: Store):
    task: Any = Diverging(pretext_task("rotation", 2), at=2, gradient=True)
    training = Training(store, task, configured(checkpoint_every=2))
    saved = []
    with pytest.raises(DivergedError) as stopped:
        training.run(training.state(), save=lambda: saved.append(True))
    assert str(stopped.value) == (
        "weights of the network are not finite after step 2. The last saved state is good. "
        "Lower training.learning_rate, raise warmup_steps, or use precision bf16 or fp32."
    )
    assert math.isfinite(training.logged[-1][1]["train/loss"])
    assert saved == []


# ----------------------------------------------------------------------------------- micro batches


@every_task
def test_a_step_of_two_micro_batches_sees_the_crops_of_a_whole_one(
    store: Store, name: str, dims: int
):
    class Seen(Training):
        def sampler(self) -> Any:
            sampler = super().sampler()
            batch = sampler.batch
            sampler.batch = lambda number, size: seen.append(batch(number, size)) or seen[-1]
            return sampler

    crops = []
    for settings in ({}, {"micro_batch_size": 2}):
        seen: list[Any] = []
        training = Seen(store, pretext_task(name, dims), configured(steps=2, **settings))
        state = training.run(training.state())
        crops.append(torch.cat([sample.images for sample in seen]))
        assert [len(sample.images) for sample in seen] == [settings.get("micro_batch_size", 4)] * (
            8 // settings.get("micro_batch_size", 4)
        )
        assert state.micro_batches == 4 // settings.get("micro_batch_size", 4)
        assert all(math.isfinite(m["train/loss"]) for _, m in training.logged)
    assert torch.equal(*crops)


STILL = AugmentationConfig(brightness=0, contrast=0, gamma=0, noise_std=0)


class Brightness:
    """Predicts the mean intensity: nothing in it is random, and each image counts the same."""

    name = "brightness"
    spatial_dims = 2

    def request(self, base: SampleRequest) -> SampleRequest:
        return base

    def batch_of(self, sample: Sample, generator: torch.Generator) -> Tensor:
        return sample.images.double()

    def build_head(self, backbone: Backbone) -> nn.Module:
        return nn.Linear(backbone.embedding_channels, 1)

    def forward(self, backbone: Backbone, head: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = head(backbone.embed(batch))
        return found[:, 0]

    def loss(self, output: Tensor, batch: Tensor) -> Tensor:
        return functional.mse_loss(output, batch.mean((1, 2, 3)))

    def metrics(self, output: Tensor, batch: Tensor) -> dict[str, Tensor]:
        return {}


def test_gradients_of_micro_batches_add_up_to_that_of_the_whole_batch(store: Store):
    """Without augmentation and batch norm; in double precision, as little else differs."""
    ends = []
    for size in (4, 2, 1):
        task: Any = Brightness()
        backbone = BACKBONES.config_class("monai")(
            depth=10, spatial_dims=2, base_channels=8, stem_stride=1, norm="group"
        )
        config = configured(
            steps=2, micro_batch_size=size, optimizer="sgd", learning_rate=1e-3, gradient_clip=0
        )
        training = Training(store, task, config, augmentation=STILL)
        network = build_network(
            build_backbone(backbone, INITS.config_class("random")(), in_channels=1, seed=0)[0],
            task,
            seed=1,
        ).double()
        ends.append(weights(training.run(start_state(network, config, CPU))))
    for other in ends[1:]:
        for name, value in ends[0].items():
            assert torch.allclose(value, other[name], atol=1e-9), name


def test_running_statistics_of_a_step_are_the_mean_over_its_micro_batches(store: Store):
    task = pretext_task("rotation", 2)
    training = Training(store, task, configured(steps=1, micro_batch_size=2))
    state = training.state()
    before = weights(state)
    training.run(state)
    parts = []
    for part in range(2):
        alone = Training(store, task, configured(steps=1, micro_batch_size=2))
        own = alone.state()
        own.micro_batches = 2
        step = Step(
            own, task, alone.config, seed=alone.seed, device=CPU, axes=("X", "Y"), ranks=Ranks(),
            augmentation=AugmentationConfig(flip_axes=("X",)),
        )  # fmt: skip
        own.network.train()
        sample = replace(alone.sampler().batch(part, 2), step=0, part=part)
        own.network(step.batch(sample))
        parts.append(weights(own))
    name = next(name for name in before if name.endswith("running_mean"))
    mean = (parts[0][name] + parts[1][name]) / 2
    assert torch.allclose(weights(state)[name], mean, atol=1e-6)
    assert not torch.allclose(weights(state)[name], before[name], atol=1e-4)


def test_a_training_goes_on_with_the_micro_batches_it_was_started_with(store: Store):
    training = Training(store, pretext_task("rotation", 2), configured(steps=2))
    state = training.state()
    state.micro_batches = 2
    training.run(state)
    same_parts = Training(
        store, pretext_task("rotation", 2), configured(steps=2, micro_batch_size=2)
    )
    assert same(weights(state), weights(same_parts.run(same_parts.state())))


def test_micro_batches_that_cannot_be_dealt_out_are_refused():
    config = configured(global_batch_size=12, micro_batch_size=4)
    assert config.micro_batches(1) == config.micro_batches(3) == 3
    with pytest.raises(ConfigError, match="3 micro batches of 4 images, which cannot be dealt out"):
        config.micro_batches(2)
    with pytest.raises(ConfigError, match="12 images cannot be dealt out evenly to 5 processes"):
        configured(global_batch_size=12).micro_batches(5)
    with pytest.raises(ConfigError, match="that divides 3, as this training was started"):
        configured(global_batch_size=12).micro_batches(2, before=3)
    with pytest.raises(ValueError, match="is not a multiple of micro_batch_size 5"):
        configured(global_batch_size=12, micro_batch_size=5)


def test_crops_are_let_go_of_long_before_the_next_line_of_the_journal(store: Store):
    class Counted(Training):
        def sampler(self) -> Any:
            sampler = super().sampler()
            batch = sampler.batch

            def noted(number: int, size: int) -> Sample:
                sample = batch(number, size)
                alive.append(weakref.ref(sample.images))
                return sample

            sampler.batch = noted
            return sampler

    alive: list[Any] = []
    most = []
    task = pretext_task("rotation", 2)
    training = Counted(store, task, configured(steps=8, log_every=8, checkpoint_every=7))
    training.run(
        training.state(), save=lambda: most.append(sum(each() is not None for each in alive))
    )
    assert len(alive) == 8
    assert most[0] <= 2


# ---------------------------------------------------------------------------------- weights in use


def test_the_average_follows_the_weights_and_is_the_result(store: Store):
    training = Training(store, pretext_task("rotation", 2), configured(ema_decay=0.5))
    plain = Training(store, pretext_task("rotation", 2), configured())
    state = training.run(training.state())
    assert same(weights(state), weights(plain.run(plain.state())))
    average = state.result.state_dict()
    name = next(name for name, value in average.items() if name.endswith("conv1.weight"))
    assert not torch.equal(average[name], weights(state)[name])


def test_the_average_resumes_bitwise(store: Store, tmp_path: Path):
    config = configured(ema_decay=0.5, checkpoint_every=2)
    whole, cut = (Training(store, pretext_task("rotation", 2), config) for _ in range(2))
    wanted = whole.run(whole.state())
    half = Training(store, pretext_task("rotation", 2), configured(ema_decay=0.5, steps=2))
    half_config = config.model_copy(update={"steps": 4})
    state = cut.state()

    def save_and_die() -> None:
        state.save(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(state, save=save_and_die)
    resumed = half.state()
    assert resumed.resume(tmp_path, CPU)
    Training(store, pretext_task("rotation", 2), half_config).run(resumed)
    theirs = wanted.result.state_dict()
    assert all(
        torch.equal(value, theirs[key]) for key, value in resumed.result.state_dict().items()
    )


def test_dropout_is_a_function_of_the_step(store: Store, tmp_path: Path):
    """Stochastic depth draws from the process's generator, which nothing else may move."""

    def swin() -> TrainingState:
        config = BACKBONES.config_class("torchvision")(variant="convnext_tiny")
        backbone, _ = build_backbone(config, INITS.config_class("random")(), in_channels=1, seed=0)
        return start_state(build_network(backbone, task, seed=1), settings, CPU)

    task, settings = pretext_task("rotation", 2), configured(steps=3, global_batch_size=2)
    ends = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        training = Training(store, task, settings)
        state = training.run(swin())
        ends.append(weights(state))
        assert torch.initial_seed() == noise
    assert same(*ends)


# ---------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_ends_the_step_and_saves_it(
    store: Store, tmp_path: Path, number: signal.Signals, raised: type[BaseException]
):
    whole = Training(store, pretext_task("rotation", 2), configured())
    wanted = whole.run(whole.state())
    training = Training(store, pretext_task("rotation", 2), configured(checkpoint_every=100))
    state = training.state()
    handler = signal.getsignal(number)

    def log(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            signal.raise_signal(number)

    with pytest.raises(raised):
        training.run(state, log=log, save=lambda: state.save(tmp_path))
    assert signal.getsignal(number) is handler
    assert [file.name[15:23] for file in saved_states(tmp_path)] == ["00000003"]
    resumed = training.state()
    assert resumed.resume(tmp_path, CPU)
    assert same(weights(training.run(resumed)), weights(wanted))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_loaders_workers_does_not_lose_the_step(
    store: Store, tmp_path: Path, number: signal.Signals
):
    settings = configured(steps=30, checkpoint_every=100, num_workers=2)
    training = Training(store, pretext_task("rotation", 2), settings)
    state = training.state()
    earlier = psutil.Process().children()  # servers that workers of other tests are forked from

    def log(step: int, metrics: dict[str, float]) -> None:
        if step == 2:  # as terminals and torchrun do: the whole group
            for worker in set(psutil.Process().children()) - set(earlier):
                worker.send_signal(number)
        if step == 20:
            signal.raise_signal(number)

    with pytest.raises((KeyboardInterrupt, Terminated)):
        training.run(state, log=log, save=lambda: state.save(tmp_path))
    assert [file.name[15:23] for file in saved_states(tmp_path)] == ["00000021"]
    assert psutil.Process().children() == earlier


def test_a_second_signal_is_not_held_back(store: Store):
    training = Training(store, pretext_task("rotation", 2), configured())
    saved = []

    def log(step: int, metrics: dict[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.run(training.state(), log=log, save=lambda: saved.append(True))
    assert saved == []


def test_time_that_is_up_saves_and_ends(store: Store, tmp_path: Path):
    training = Training(store, pretext_task("rotation", 2), configured(max_minutes=1e-6))
    state = training.state()
    with pytest.raises(TimeUp, match="the 1e-06 minutes are over"):
        training.run(state, save=lambda: state.save(tmp_path))
    assert state.step == 1
    assert len(saved_states(tmp_path)) == 1
    assert TimeUp.exit_code == 143


def test_a_scan_that_vanishes_saves_and_is_named(tmp_path: Path):
    store = blob_store(tmp_path / "store")
    training = Training(store, pretext_task("rotation", 2), configured(steps=50, cache_gb=0))
    state = training.state()

    def log(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            shutil.rmtree(tmp_path / "store" / "scans")

    with pytest.raises(DataError, match=r"scan [abcd]1 is damaged in the store") as refused:
        training.run(state, log=log, save=lambda: state.save(tmp_path / "states"))
    assert refused.value.exit_code == 3
    assert [file.name[15:23] for file in saved_states(tmp_path / "states")] == [f"{state.step:08d}"]


# ------------------------------------------------------------------------------ how it is computed


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "settings", [{"recompute": True}, {"channels_last": True}], ids=["recompute", "channels_last"]
)
def test_saving_memory_or_time_changes_no_result(store: Store, dims: int, settings: dict[str, Any]):
    ends = []
    for extra in ({}, settings):
        training = Training(
            store, pretext_task("rotation", dims), configured(optimizer="sgd", **extra)
        )
        ends.append(weights(training.run(training.state())))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=1e-5), name


def test_an_average_of_recomputed_blocks_is_asked_with_its_own_weights(store: Store):
    """A copied block must not answer with the weights of the block that it was copied from."""
    answers = []
    for recompute in (False, True):
        config = configured(ema_decay=0.5, optimizer="sgd", recompute=recompute)
        training = Training(store, pretext_task("rotation", 2), config)
        state = training.run(training.state())
        images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            answers.append(state.result.eval().backbone.embed(images))
    assert torch.allclose(*answers, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_losses(store: Store):
    logs = []
    for compiled in (False, True):
        training = Training(
            store, pretext_task("rotation", 2), configured(steps=2, compile=compiled)
        )
        state = training.run(training.state())
        logs.append([metrics["train/loss"] for _, metrics in training.logged])
        assert not any("_orig_mod" in name for name in weights(state))
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
