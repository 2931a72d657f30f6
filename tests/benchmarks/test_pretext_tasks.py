"""What puzzles cost: time and memory of a step, against MONAI's transforms, and encoding once.

    make bench

Everything that is compared is measured in turns, in one process, on images already in memory;
medians are printed. Nothing is asserted about time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandSpatialCropd, SpatialCropd
from monai.transforms.intensity.dictionary import NormalizeIntensityd, RandCoarseDropoutd
from monai.transforms.spatial.dictionary import Rotate90d
from monai.transforms.utility.dictionary import CopyItemsd
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import interpolate

from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextBatch, PretextTask
from medssl.pretext.rotation import rotate
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.transforms.sampling import Sample, SampleRequest

_ROUNDS = 10
_SIZE = {2: (96, 96), 3: (40, 40, 40)}
_BATCH = {2: 8, 3: 2}
_BACKBONE = {
    2: ("timm", {"variant": "efficientnet_lite0"}),
    3: ("monai", {"variant": "resnet", "depth": 10, "spatial_dims": 3}),
}
_PERMUTATIONS = 8
_ENCODED = 2
"""Images whose tiles are encoded once, or eight times over."""

_MIB = 2**20

both_dims = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def built(name: str, dims: int, **options: Any) -> tuple[PretextTask, SampleRequest]:
    """Return a task, and the request of a study whose scans hold what it needs."""
    if dims not in PRETEXT_TASKS.load(name).supported_dims:
        pytest.skip(f"{name} does not exist in {dims}D")
    task = PRETEXT_TASKS.build(PRETEXT_TASKS.config_class(name)(**options), dims)
    plane = "axial" if dims == 2 else None
    return task, task.request(
        SampleRequest(dims, _SIZE[dims], plane, num_sequences=task.min_sequences)
    )


def smooth_images(request: SampleRequest) -> Tensor:
    """Return images of smooth random structures, all of them foreground."""
    dims = request.spatial_dims
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(_BATCH[dims], request.in_channels, *[8] * dims, generator=generator)
    mode = "bilinear" if dims == 2 else "trilinear"
    return 0.1 + 0.9 * interpolate(coarse, size=request.crop_size, mode=mode)


def training_state(task: PretextTask, request: SampleRequest) -> TrainingState:
    name, options = _BACKBONE[task.spatial_dims]
    backbone, _ = build_backbone(
        BACKBONES.config_class(name)(**options),
        INITS.config_class("random")(),
        in_channels=task.in_channels(request),
        seed=0,
    )
    network = build_network(backbone, task, 0)
    return start_state(network, TrainingConfig(steps=1), torch.device("cpu"))


def update(state: TrainingState, task: PretextTask, batch: PretextBatch) -> Tensor:
    """Take one step on a puzzle, as the loop does; return the loss."""
    output = state.network(batch)
    loss = task.loss(output, batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    task.metrics(output, batch)
    return loss.detach()


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def medians(*runs: Callable[[], object]) -> list[float]:
    """Return the median time of each, measured in turns after one turn to warm up."""
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(_ROUNDS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def mean_of_medians(times: Sequence[float], kinds: int) -> float:
    """Return the median of each kind of step, averaged: kinds take turns, and differ in cost."""
    return statistics.mean(statistics.median(times[kind::kinds]) for kind in range(kinds))


# ------------------------------------------------------------------------- a share of the step


def puzzle_bytes(batch: PretextBatch, images: Tensor) -> int:
    """Return the memory of a puzzle beyond that of its images.

    Each block of memory counts once, however many tensors look at it, and whole.
    """
    blocks = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (batch.inputs, batch.target, *batch.extras.values())
    }
    blocks.pop(images.untyped_storage().data_ptr(), None)
    return sum(blocks.values())


def step_bytes(state: TrainingState, task: PretextTask, batch: PretextBatch) -> int:
    """Return the memory that a step holds for its backward pass.

    Each block that autograd saved counts once, as all are alive together; weights are left out.
    This is what grows with the batch, and the same on every machine and in every run, unlike a
    process's peak, in which the allocator's reserve and the kernels' workspace count.
    """
    weights = {p.untyped_storage().data_ptr() for p in state.network.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        block = tensor.untyped_storage()
        if block.data_ptr() not in weights:
            saved[block.data_ptr()] = block.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task.loss(state.network(batch), batch)
    loss.backward()
    return sum(saved.values())


@both_dims
@pytest.mark.parametrize("name", PRETEXT_TASKS.names())
def test_share_of_the_puzzle_in_a_step(
    name: str, dims: int, capsys: pytest.CaptureFixture[str]
) -> None:
    task, request = built(name, dims)
    images = smooth_images(request)
    given = images.clone()
    state = training_state(task, request)
    generator = torch.Generator().manual_seed(0)

    def puzzle(step: int) -> PretextBatch:
        return task.batch_of(Sample(images, None, step=step), generator)

    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    # Tasks that train several in turn have as many kinds of steps.
    kinds = [puzzle(step) for step in range(len(task.parts()))]
    losses = [update(state, task, batch) for batch in kinds]  # warms up
    made, whole = [], []
    for step in range(max(_ROUNDS, 3 * len(kinds))):
        begun = time.perf_counter()
        batch = puzzle(step)
        made.append(time.perf_counter() - begun)
        losses.append(update(state, task, batch))
        whole.append(time.perf_counter() - begun)
    making_s, step_s = (mean_of_medians(times, len(kinds)) for times in (made, whole))
    puzzle_memory = max(puzzle_bytes(batch, images) for batch in kinds) / len(images)
    step_memory = max(step_bytes(state, task, batch) for batch in kinds) / len(images)
    image_memory = images.nbytes / len(images)
    with capsys.disabled():
        print(
            f"\n{name} {dims}D: step {step_s * 1e3:.0f} ms, make_batch "
            f"{making_s * 1e3:.2f} ms = {making_s / step_s:.1%} of it; an image of "
            f"{image_memory / _MIB:.2f} MiB takes {puzzle_memory / _MIB:.2f} MiB as puzzles and "
            f"{step_memory / _MIB:.1f} MiB for the backward pass"
        )
    assert torch.equal(images, given)
    assert torch.isfinite(torch.stack(losses)).all()
    after = list(state.network.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


# -------------------------------------------------- the same puzzles, one by one, with MONAI


@contextmanager
def tracking(on: bool) -> Iterator[None]:
    """Let MONAI note in each tensor where it lies and what was done to it, or not."""
    before = get_track_meta()
    set_track_meta(on)
    try:
        yield
    finally:
        set_track_meta(before)


def compare(
    name: str,
    dims: int,
    capsys: pytest.CaptureFixture[str],
    batched: Callable[[], object],
    one_by_one: Callable[[], object],
) -> None:
    def tracked(on: bool) -> None:
        with tracking(on):
            one_by_one()

    ours, with_meta, without = medians(batched, lambda: tracked(True), lambda: tracked(False))
    with capsys.disabled():
        print(
            f"\n{name} {dims}D: batched {ours * 1e3:.2f} ms; with MONAI's dictionary transforms, "
            f"one by one, {with_meta * 1e3:.1f} ms ({with_meta / ours:.1f} times as long), "
            f"without meta tensors {without * 1e3:.1f} ms ({without / ours:.1f} times)"
        )


def quarter_turns(matrices: Tensor) -> list[Compose]:
    """Return, for each rotation matrix, the one or two of MONAI's quarter turns that make it."""
    dims = matrices.shape[-1]
    probe = torch.arange(float(3**dims)).reshape(1, 1, *[3] * dims)
    planes = [(0, 1)] if dims == 2 else [(0, 1), (0, 2), (1, 2)]
    steps = [(0, (0, 1)), *product((1, 2, 3), planes)]
    turns = []
    for matrix in matrices:
        wanted = rotate(probe, matrix[None])[0]
        for pair in product(steps, repeat=2):
            transform = Compose([Rotate90d("image", k, axes) for k, axes in pair if k])
            if torch.equal(torch.as_tensor(transform({"image": probe[0]})["image"]), wanted):
                turns.append(transform)
                break
    assert len(turns) == len(matrices)
    return turns


@both_dims
def test_rotations_against_monai(dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    task: Any
    task, request = built("rotation", dims)
    images, generator = smooth_images(request), torch.Generator().manual_seed(0)
    turns = quarter_turns(task.matrices)
    batch = task.make_batch(images, generator)
    labels = batch.target.tolist()

    def one_by_one() -> Tensor:
        puzzles = [
            turns[label]({"image": images[i // task.views]}) for i, label in enumerate(labels)
        ]
        return torch.stack([torch.as_tensor(puzzle["image"]) for puzzle in puzzles])

    assert torch.equal(one_by_one(), batch.inputs)
    compare("rotation", dims, capsys, lambda: task.make_batch(images, generator), one_by_one)


@both_dims
def test_inpainting_against_monai(dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    """MONAI's holes may lie anywhere and overlap; their number and size are ours.

    It fills them in place, so that the copy becomes the puzzle.
    """
    task: Any
    task, request = built("inpainting", dims)
    images, generator = smooth_images(request), torch.Generator().manual_seed(0)
    block, ratio = task.config.block, task.config.ratio
    num_holes = round(ratio * (_SIZE[dims][0] // block) ** dims)
    transform = Compose(
        [
            CopyItemsd("image", names=["puzzle"]),
            RandCoarseDropoutd("puzzle", num_holes, [block] * dims, fill_value=0.5, prob=1.0),
        ]
    )

    def one_by_one() -> dict[str, Tensor]:
        puzzles = [transform({"image": image}) for image in images]
        inputs, target = (
            torch.stack([torch.as_tensor(puzzle[key]) for puzzle in puzzles])
            for key in ("puzzle", "image")
        )
        return {"inputs": inputs, "target": target, "hidden": (inputs != target).any(1)}

    theirs, ours = one_by_one(), task.make_batch(images, generator)
    assert torch.equal(theirs["target"], ours.target)
    share = ours.extras["hidden"].float().mean()
    assert 0.3 * share < theirs["hidden"].float().mean() <= 1.05 * share
    compare("inpainting", dims, capsys, lambda: task.make_batch(images, generator), one_by_one)


def tile_cutters(size: Sequence[int], grid: int, tile: Sequence[int]) -> tuple[list[str], Compose]:
    """Return MONAI's way to cut a standardised, displaced tile from each cell of a grid."""
    cell = [side // grid for side in size]
    cuts = []
    for number, place in enumerate(product(range(grid), repeat=len(size))):
        start = [at * side for at, side in zip(place, cell, strict=True)]
        end = [at + side for at, side in zip(start, cell, strict=True)]
        key = f"tile{number}"
        cuts += [
            SpatialCropd(key, roi_start=start, roi_end=end),
            RandSpatialCropd(key, tile, random_size=False),
        ]
    keys = [f"tile{number}" for number in range(grid ** len(size))]
    return keys, Compose([*cuts, NormalizeIntensityd(keys)])


@both_dims
def test_jigsaw_against_monai(dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    """MONAI cuts the tiles of an image once as well, and stacks them in each order."""
    task, request = built("jigsaw", dims)
    images, generator = smooth_images(request), torch.Generator().manual_seed(0)
    batch = task.make_batch(images, generator)
    tile = tuple(batch.inputs.shape[2:])
    num_tiles = len(batch.inputs) // len(images)
    grid = round(num_tiles ** (1 / dims))
    keys, transform = tile_cutters(request.crop_size, grid, tile)
    num_orders = len(batch.target) // len(images)
    orders = [torch.randperm(num_tiles, generator=generator).tolist() for _ in range(num_orders)]

    def one_by_one() -> Tensor:
        puzzles = []
        for image in images:
            cut = transform(dict.fromkeys(keys, image))
            tiles = [torch.as_tensor(cut[key]) for key in keys]
            puzzles += [torch.stack([tiles[at] for at in order]) for order in orders]
        return torch.stack(puzzles)

    assert one_by_one().shape == (len(batch.target), num_tiles, *batch.inputs.shape[1:])
    compare("jigsaw", dims, capsys, lambda: task.make_batch(images, generator), one_by_one)


# ------------------------------------------------------------------------ tiles encoded once


@both_dims
def test_jigsaw_puzzles_a_second_with_and_without_encoding_once(
    dims: int, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    steps: list[Callable[[], Tensor]] = []
    for once in (True, False):
        options = {"encode_once": once, "permutations_per_image": _PERMUTATIONS}
        task, request = built("jigsaw", dims, **options)
        state = training_state(task, request)
        images = smooth_images(request)[:_ENCODED]

        def step(
            task: PretextTask = task, state: TrainingState = state, images: Tensor = images
        ) -> Tensor:
            batch = task.make_batch(images, generator)
            assert len(batch.target) == _PERMUTATIONS * len(images)
            return update(state, task, batch)

        steps.append(step)
    assert all(torch.isfinite(step()) for step in steps)
    count = _PERMUTATIONS * _ENCODED
    once_s, each_s = medians(*steps)
    with capsys.disabled():
        print(
            f"\njigsaw {dims}D: {count / once_s:.0f} puzzles a second with tiles encoded once, "
            f"{count / each_s:.0f} without: {each_s / once_s:.1f} times"
        )
