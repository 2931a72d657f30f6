"""What reading, augmentation and puzzle cost, as shares of a pretraining step.

    make bench

The step with everything is measured against the same step on a puzzle already in memory, in turns,
in one process; the ratio of medians is printed. Nothing is asserted about time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.transforms.augmentation import AugmentationConfig, augment
from medssl.transforms.sampling import CropSampler, SampleRequest
from stores import make_store, numbered_volume

_ROUNDS = 12
_SIZE = 16


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


ONE_SEQUENCE = [name for name in PRETEXT_TASKS if PRETEXT_TASKS.load(name).min_sequences == 1]


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_share_of_data_and_puzzle_in_a_step(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = numbered_volume((64, 64, 32))
    store = make_store(tmp_path, {f"{letter}1": volume for letter in "abcdefgh"})
    task = PRETEXT_TASKS.build(PRETEXT_TASKS.config_class(name)(), 2)
    request = task.request(SampleRequest(spatial_dims=2, crop_size=(48, 48), plane="axial"))
    config = BACKBONES.config_class("timm")(variant="efficientnet_lite0")
    init = INITS.config_class("random")()
    backbone, _ = build_backbone(config, init, in_channels=task.in_channels(request), seed=0)
    state = start_state(
        build_network(backbone, task, 0), TrainingConfig(steps=1), torch.device("cpu")
    )
    sampler = CropSampler(store, store.scan_keys, request, 0, "bench")
    generator = torch.Generator().manual_seed(0)

    def puzzle(step: int) -> object:
        sample = sampler.batch(step, _SIZE)
        images, _ = augment(sample.images, None, AugmentationConfig(), generator, request.axes)
        return task.make_batch(images, generator)

    def update(batch: object) -> None:
        state.optimizer.zero_grad(set_to_none=True)
        task.loss(state.network(batch), batch).backward()
        state.optimizer.step()

    ready = puzzle(0)
    update(ready)  # warm up
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    whole, bare, made = [], [], []
    for step in range(_ROUNDS):
        whole.append(seconds(lambda at=step: update(puzzle(at))))
        bare.append(seconds(lambda: update(ready)))
        made.append(seconds(lambda at=step: puzzle(at)))
    ratio = statistics.median(bare) / statistics.median(whole)
    share = statistics.median(made) / statistics.median(whole)
    with capsys.disabled():
        print(
            f"\n{name}: step {statistics.median(whole) * 1e3:.0f} ms, of the speed in memory "
            f"{ratio:.2f}, reading + augmentation + puzzle {share:.1%} of the step"
        )
    after = list(state.network.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
