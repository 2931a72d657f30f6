"""The loop: goes on as if it had not stopped, stops when it diverges, and never waits in a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from medssl.downstream.segmentation import Segmentation
from medssl.errors import ConfigError, DivergedError, MachineError
from medssl.pretext.base import PretextTask
from medssl.scans.store import Store
from medssl.training.loop import Meter, build_network, right_gradients, select_device
from medssl.training.state import TrainingState
from medssl.transforms.augmentation import AugmentationConfig, augment
from medssl.transforms.sampling import SampleRequest
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
    file = tmp_path / "state.pt"
    settings = configured(num_workers=num_workers, checkpoint_every=2)
    whole, first, second = (Training(store, pretext_task(name, dims), settings) for _ in range(3))
    wanted = whole.run(whole.state(), save=lambda: None)

    stopped = first.state()

    def save_and_die() -> None:
        stopped.save(file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stopped, save=save_and_die)
    resumed = second.state()
    resumed.load(file, CPU)
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


def test_gradients_of_low_precision_on_a_cpu_are_those_of_float32():
    """With torch 2.14.1's oneDNN they are wrong, or NaN, for tiles that end as a single voxel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(27, 32, 2, 2, generator=generator).bfloat16()
    weights = (torch.randn(64, 32, 3, 3, generator=generator) / 20).bfloat16()
    towards = torch.randn(27, 64, 1, 1, generator=generator).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        own = weights.detach().to(dtype).clone().requires_grad_()
        with right_gradients(configured(precision="bf16"), CPU):
            answer = functional.conv2d(images.to(dtype), own, stride=2, padding=1)
            answer.backward(towards.to(dtype))
        gradients.append(own.grad.float())
    assert torch.allclose(*gradients, atol=0.02 * float(gradients[1].abs().max()))
    assert torch.backends.mkldnn.enabled


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
    file = tmp_path / "state.pt"
    task: Any = Diverging(pretext_task("rotation", 2), at=4)
    training = Training(store, task, configured(steps=8, log_every=10, checkpoint_every=2))
    state, saved = training.state(), []

    def save() -> None:
        state.save(file)
        saved.append(file.read_bytes())

    with pytest.raises(DivergedError) as stopped:
        training.run(state, save=save)
    assert str(stopped.value) == (
        "the loss is not finite in the steps up to 4. The last saved state is good. "
        "Lower training.learning_rate, raise warmup_steps, or use precision bf16 or fp32."
    )
    assert stopped.value.exit_code == 5
    assert len(saved) == 1
    assert file.read_bytes() == saved[0]
    good = training.state()
    good.load(file, CPU)
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


# --------------------------------------------------------------------- nothing waits inside a step


class Waits(TorchDispatchMode):
    """Counts what brings a value to the host, and so waits for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        boolean = name in {"index", "index_put", "index_put_"} and any(
            tensor is not None and tensor.dtype in (torch.bool, torch.uint8) for tensor in args[1]
        )
        if name in self.WAITING or boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def segmentation(dims: int) -> Segmentation:
    """Return a segmentation task without its labels: a step looks at masks alone."""
    from monai.losses import DiceCELoss

    task = Segmentation.__new__(Segmentation)
    task.name, task.spatial_dims, task.classes = "segmentation", dims, ("one", "two")
    task._loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    return task


def objective(name: str, dims: int) -> Any:
    return segmentation(dims) if name == "segmentation" else pretext_task(name, dims)


def one_step(task: Any, network: Any, images: Tensor, masks: Tensor, generator: Any) -> Tensor:
    """Do what the loop does between two readings, without the optimiser."""
    from medssl.transforms.sampling import Sample

    dims = images.ndim - 2
    changes = AugmentationConfig(flip_axes=("X", "Y"))
    images, masks = augment(images, masks, changes, generator, ("X", "Y", "Z")[:dims])
    batch = task.batch_of(Sample(images, masks, ["a"] * len(images)), generator)
    output = network(batch)
    loss = task.loss(output, batch)
    loss.backward()
    Meter().add({"loss": loss, **task.metrics(output, batch)})
    return loss.detach()


def batch(task: Any, dims: int) -> tuple[Tensor, Tensor]:
    shape = (4, *[16] * dims)
    generator = torch.Generator().manual_seed(0)
    base = SampleRequest(dims, shape[1:], "axial" if dims == 2 else None)
    channels = task.request(base).in_channels if hasattr(task, "parts") else 1
    images = torch.rand((4, channels, *shape[1:]), generator=generator)
    return images, torch.randint(3, shape, generator=generator)


@pytest.mark.parametrize(("name", "dims"), [*EVERY_TASK, ("segmentation", 2), ("segmentation", 3)])
def test_nothing_in_a_step_waits_for_the_device(name: str, dims: int):
    task = objective(name, dims)
    network = build_network(tiny_backbone(dims), task, seed=0)
    with Waits() as waits:
        loss = one_step(task, network, *batch(task, dims), torch.Generator().manual_seed(1))
    assert waits.found == []
    assert torch.isfinite(loss)


def test_the_check_above_sees_what_waits():
    values = torch.ones(3)
    with Waits() as waits:
        values.sum().item()
        bool(values.any())
        values[values > 0]
    assert waits.found == ["_local_scalar_dense", "_local_scalar_dense", "index"]


@every_task
def test_a_step_needs_no_value_of_any_tensor(name: str, dims: int):
    """Fake tensors have no values: also `tolist` and `numpy`, unseen above, fail on them."""
    task = pretext_task(name, dims)
    network = build_network(tiny_backbone(dims), task, seed=0)
    images, masks = batch(task, dims)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss = one_step(
            task, network, mode.from_tensor(images), mode.from_tensor(masks),
            torch.Generator().manual_seed(1),
        )  # fmt: skip
    assert loss.shape == ()


def test_a_meter_reads_the_means_once_and_starts_again():
    meter = Meter()
    assert meter.read() == {}
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "accuracy": torch.tensor(value / 2)})
    assert meter.read() == {"loss": 3.0, "accuracy": 1.5}
    assert meter.read() == {}


# ---------------------------------------------------------------------------------------- device


def test_auto_and_cpu_name_devices():
    assert select_device("cpu") == CPU
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_name_that_is_no_device_is_refused():
    with pytest.raises(ConfigError) as refused:
        select_device("gpu")
    assert str(refused.value) == "device: 'gpu' is no device. Use auto, cpu or cuda."


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError) as refused:
        select_device("cuda")
    assert str(refused.value) == (
        "device: cuda is asked for, and torch sees no GPU on this machine. "
        "Set device=auto, or run medssl doctor to see why."
    )


def test_a_metric_that_one_batch_leaves_undefined_is_the_mean_of_the_others():
    meter = Meter()
    for dice in (0.5, math.nan, 0.7):
        meter.add({"loss": torch.tensor(1.0), "dice": torch.tensor(dice)})
    assert meter.read() == pytest.approx({"loss": 1.0, "dice": 0.6})


def test_a_loss_that_is_not_a_number_is_never_passed_over():
    meter = Meter()
    for loss in (1.0, math.nan):
        meter.add({"loss": torch.tensor(loss)})
    assert math.isnan(meter.read()["loss"])
