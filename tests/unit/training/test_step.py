"""One step: nothing in it waits for the device, and it needs no value of any tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from medssl.downstream.segmentation import Segmentation
from medssl.training.distributed import Ranks
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.step import Step
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import Sample, SampleRequest
from training import CPU, EVERY_TASK, configured, pretext_task, tiny_backbone

every_task = pytest.mark.parametrize(("name", "dims"), EVERY_TASK)


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


def first_step(task: Any, dims: int) -> Step:
    """Return the loop's own step, before the first one."""
    config = configured()
    state = start_state(build_network(tiny_backbone(dims), task, seed=0), config, CPU)
    state.micro_batches = 1
    return Step(
        state, task, config, seed=1, device=CPU, axes=("X", "Y", "Z")[:dims], ranks=Ranks(),
        augmentation=AugmentationConfig(flip_axes=("X", "Y")),
    )  # fmt: skip


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
    images, masks = batch(task, dims)
    step = first_step(task, dims)
    with Waits() as waits:
        step.update(iter([Sample(images, masks, ["a"] * len(images))]))
    assert waits.found == []
    assert math.isfinite(step.meter.read()["loss"])


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
    images, masks = batch(task, dims)
    step = first_step(task, dims)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        sample = Sample(mode.from_tensor(images), mode.from_tensor(masks), ["a"] * len(images))
        step.backward(sample)
        (loss,) = step.meter._losses
    assert type(loss).__name__ == "FakeTensor"
    assert loss.shape == ()
