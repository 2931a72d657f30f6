"""On a GPU: as on the CPU, in low precision, compiled, with less memory, and never waiting.

.venv/bin/python -m pytest -m gpu
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.pretext.base import PretextBatch
from medssl.scans.store import Store
from medssl.training.distributed import Ranks
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.state import TrainingState
from medssl.training.step import Step
from medssl.transforms.augmentation import AugmentationConfig
from training import CPU, EVERY_TASK, Training, blob_store, configured, pretext_task, tiny_backbone

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
every_task = pytest.mark.parametrize(("name", "dims"), EVERY_TASK)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    """Compare with the CPU without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def moved(batch: PretextBatch, device: torch.device) -> PretextBatch:
    return replace(
        batch,
        inputs=batch.inputs.to(device),
        target=batch.target.to(device),
        extras={key: value.to(device) for key, value in batch.extras.items()},
    )


@every_task
def test_loss_and_gradients_are_those_of_the_cpu(store: Store, name: str, dims: int):
    training = Training(store, pretext_task(name, dims), configured())
    sample = training.sampler().batch(0, 4)
    batch = training.task.batch_of(sample, torch.Generator().manual_seed(1))
    found: list[tuple[float, dict[str, Tensor]]] = []
    for device in (CPU, GPU):
        network = build_network(tiny_backbone(dims), training.task, seed=1).to(device)
        own = moved(batch, device)
        loss = training.task.loss(network(own), own)
        loss.backward()
        gradients = {
            key: parameter.grad.cpu()
            for key, parameter in network.named_parameters()
            if parameter.grad is not None
        }
        found.append((float(loss.detach()), gradients))
    (loss, gradients), (theirs, others) = found
    assert loss == pytest.approx(theirs, rel=1e-4)
    assert gradients.keys() == others.keys()
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, value in gradients.items():
        assert torch.allclose(value, others[key], atol=1e-3 * largest), key


def stepping(store: Store, name: str, dims: int, **settings: Any) -> tuple[Training, Step]:
    config = configured(steps=100, log_every=100, **settings)
    training = Training(store, pretext_task(name, dims), config, device=GPU)
    state = training.state()
    state.micro_batches = 1
    step = Step(
        state, training.task, config, seed=5, device=GPU, axes=training.sampler().request.axes,
        augmentation=AugmentationConfig(flip_axes=("X",)), ranks=Ranks(),
    )  # fmt: skip
    return training, step


@every_task
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_a_step_waits_for_the_gpu(store: Store, name: str, dims: int, precision: str):
    """PyTorch itself says when the host waits: the first steps may, while kernels are chosen."""
    training, step = stepping(store, name, dims, precision=precision)
    samples = [training.sampler().batch(number, 4).to(GPU) for number in range(4)]
    step.update(iter(samples[:1]))
    step.update(iter(samples[1:2]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sample in samples[2:]:
            step.update(iter([sample]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(step.meter.read()["loss"])


@every_task
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_trains(store: Store, name: str, dims: int, precision: str):
    training = Training(
        store, pretext_task(name, dims), configured(steps=6, precision=precision), device=GPU
    )
    state = training.run(training.state())
    assert state.step == 6
    assert all(p.dtype == torch.float32 and p.is_cuda for p in state.network.parameters())
    assert all(math.isfinite(metrics["train/loss"]) for _, metrics in training.logged)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("resident", ["never", "always"])
def test_resumed_on_the_gpu_it_goes_on_as_if_it_had_not_stopped(
    store: Store, tmp_path: Path, dims: int, resident: str
):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        settings = configured(checkpoint_every=2, resident=resident)
        task = pretext_task("rotation", dims)
        whole, cut, rest = (Training(store, task, settings, device=GPU) for _ in range(3))
        wanted = whole.run(whole.state(), save=lambda: None)
        stopped = cut.state()

        def save_and_die() -> None:
            stopped.save(tmp_path)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cut.run(stopped, save=save_and_die)
        resumed = rest.state()
        assert resumed.resume(tmp_path, GPU)
        rest.run(resumed, save=lambda: None)
    finally:
        torch.backends.cudnn.deterministic = before[1]
    theirs = wanted.network.state_dict()
    for key, value in resumed.network.state_dict().items():
        assert torch.allclose(value.float(), theirs[key].float(), atol=1e-6), key


def test_recomputing_blocks_takes_less_memory(store: Store):
    peaks = []
    for recompute in (False, True):
        config = configured(steps=3, recompute=recompute)
        training = Training(store, pretext_task("rotation", 3), config, device=GPU)
        network = build_network(tiny_backbone(3), training.task, seed=1)
        state = start_state(network, config, GPU)
        images = torch.rand(8, 1, 48, 48, 48, device=GPU)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        state.network.train()
        state.network.backbone(images)[-1].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del state, network
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_compiled_network_gives_the_same_losses(store: Store, dims: int):
    logs = []
    for compiled in (False, True):
        training = Training(
            store, pretext_task("rotation", dims), configured(compile=compiled), device=GPU
        )
        training.run(training.state())
        logs.append([metrics["train/loss"] for _, metrics in training.logged])
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)


def test_a_step_moves_the_weights(store: Store):
    training, step = stepping(store, "multi", 2, channels_last=True, ema_decay=0.9)
    state: TrainingState = step._state
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    sample = training.sampler().batch(0, 4).to(GPU)
    for _ in range(2):
        step.update(itertools.repeat(sample))
    after = list(state.network.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert state.average is not None
