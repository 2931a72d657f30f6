"""The device: named as people name it, and right in low precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medssl.errors import ConfigError, MachineError
from medssl.training.devices import right_gradients, seeded_layers, select_device
from medssl.training.distributed import Ranks
from training import CPU, configured


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


def test_processes_take_the_gpu_of_their_own_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("cuda", Ranks(3, 4, 1)) == torch.device("cuda", 1)
    assert select_device("auto", Ranks(3, 4, 1)) == torch.device("cuda", 1)
    assert select_device("cpu", Ranks(3, 4, 1)) == CPU


def test_layers_that_draw_for_themselves_draw_from_the_seed_and_leave_no_trace():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    drawn = []
    for seed in (1, 1, 2):
        with seeded_layers(seed, CPU):
            drawn.append(functional.dropout(torch.ones(64), 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.rand(2), wanted)
