"""The whole pretraining: against the same step in memory, against peers' pipelines, as work grows.

    .venv/bin/python -m pytest tests/benchmarks/test_pretraining.py

Everything is measured in turns in one process, and ratios of medians are printed. Nothing is
asserted about time. PyTorch has one thread here, so that one core is left for a worker.
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.models.backbones import BACKBONES
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.pretext.base import PretextTask
from medssl.scans.store import Store
from medssl.training.distributed import Ranks
from medssl.training.feed import feed
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.step import Step
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import CropSampler, Sample, SampleRequest, Share
from stores import make_store

pytestmark = pytest.mark.timeout(0)  # as long as the rounds take

CPU = torch.device("cpu")
SHAPE = (72, 80, 64)
NUM_SCANS = 64
CROP = {2: (64, 64), 3: (32, 32, 32)}
BATCH = {2: 32, 3: 8}
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
STEPS = {2: 12, 3: 6}
TASKS: dict[str, dict[str, Any]] = {
    "rotation": {"name": "rotation", "views": 1},
    "relative_position": {"name": "relative_position"},
    "jigsaw": {"name": "jigsaw", "num_permutations": 50},
    "inpainting": {"name": "inpainting", "block": 8},
}
EVERY = [(name, dims) for name in TASKS for dims in (2, 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def volumes(number: int, shape: tuple[int, int, int] = SHAPE) -> Iterator[np.ndarray]:
    """Yield smooth scans with noise, which compress about as well as real ones."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 6, n) for n in shape], indexing="ij"))
    for seed in range(number):
        generator = np.random.default_rng(seed)
        slope = generator.uniform(0.5, 1.5, size=(3, 1, 1, 1))
        volume = 0.5 + 0.3 * np.sin((grid * slope).sum(0))
        yield (volume + generator.normal(0, 0.02, shape)).clip(0, 1).astype(np.float16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder, {f"s{n:05d}": v for n, v in enumerate(volumes(NUM_SCANS))})


class Training:
    """A pretraining of one task: the loop's own step, and the loop's own feed."""

    def __init__(self, store: Store, name: str, dims: int, **settings: Any) -> None:
        config = PRETEXT_TASKS.config_class(name).model_validate(TASKS[name])
        self.task: PretextTask = PRETEXT_TASKS.build(config, dims)
        base = SampleRequest(dims, CROP[dims], "axial" if dims == 2 else None, min_foreground=0.2)
        self.request = self.task.request(base)
        self.config = TrainingConfig(
            steps=10_000, global_batch_size=BATCH[dims], resident="never", **settings
        )
        backbone, _ = build_backbone(
            BACKBONES.config_class("monai")(
                depth=18, spatial_dims=dims, base_channels={2: 32, 3: 16}[dims]
            ),
            INITS.config_class("random")(),
            in_channels=self.task.in_channels(self.request),
            seed=0,
        )
        self.state = start_state(build_network(backbone, self.task, 0), self.config, CPU)
        self.state.micro_batches = 1
        self.step = Step(
            self.state, self.task, self.config, seed=0, device=CPU,
            augmentation=AugmentationConfig(flip_axes=("X",)), axes=self.request.axes,
            ranks=Ranks(),
        )  # fmt: skip
        self.sampler = CropSampler(store, store.scan_keys, self.request, 0, "bench")

    def feed(self) -> Any:
        share = Share(self.config.global_batch_size)
        return feed(self.sampler, 0, 10_000, share, self.config, CPU)

    def rate(self, samples: Iterator[Sample], steps: int) -> float:
        """Return images a second over some steps."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.step.update(samples)
        self.step.meter.read()
        return steps * self.config.global_batch_size / (time.perf_counter() - begun)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_share_of_the_speed_in_memory(
    store: Store, name: str, dims: int, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """(a) Images a second of the real pipeline, divided by those of the step in memory."""
    training = Training(store, name, dims, num_workers=num_workers, cache_gb=0)
    ready = training.sampler.batch(0, BATCH[dims])
    real, bare = [], []
    with closing(training.feed()) as samples:
        training.rate(samples, 3)  # warm up: workers, allocator
        for _ in range(ROUNDS):
            real.append(training.rate(samples, STEPS[dims]))
            bare.append(training.rate(itertools.repeat(ready), STEPS[dims]))
    ratio = statistics.median(real) / statistics.median(bare)
    with capsys.disabled():
        print(
            f"\n(a) {name} {dims}D, {num_workers} worker(s), store on disk: "
            f"{statistics.median(real):.0f} images/s, {ratio:.3f} of the step in memory"
        )
    assert training.state.step > 0


# ------------------------------------------------------------------------------------------- peers


def rotated_2d(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Turn one slice by a random quarter turn: the puzzle as a per-sample transform."""
    label = int(torch.randint(4, ()))
    return {"image": torch.rot90(image, label, (1, 2)), "label": torch.tensor(label)}


def holed_3d(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fill half of the 8-voxel blocks of one crop with its mean."""
    blocks = torch.rand([n // 8 for n in image.shape[1:]]) < 0.5
    hidden = blocks
    for axis in range(3):
        hidden = hidden.repeat_interleave(8, dim=axis)
    target = image.clone()
    return {
        "image": torch.where(hidden[None], image.mean(), image),
        "label": target,
        "weight": hidden[None].float(),
    }


def monai_transforms(dims: int) -> tuple[list[Any], list[Any]]:
    """Return MONAI's deterministic and random parts: load; crop, augment as medssl does, puzzle."""
    from monai import transforms as mt

    keys = ["image"]
    crop = [*CROP[2], 1] if dims == 2 else list(CROP[3])
    fixed = [
        mt.LoadImaged(keys, reader="NibabelReader", image_only=True),
        mt.EnsureChannelFirstd(keys, channel_dim="no_channel"),
        mt.EnsureTyped(keys, dtype=torch.float32, track_meta=False),
    ]
    random = [
        mt.RandSpatialCropd(keys, crop, random_size=False),
        *([mt.SqueezeDimd(keys, dim=-1)] if dims == 2 else []),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=0),
        mt.RandAdjustContrastd(keys, prob=1.0, gamma=(0.9, 1.1)),
        mt.RandScaleIntensityd(keys, factors=0.1, prob=1.0),
        mt.RandShiftIntensityd(keys, offsets=0.1, prob=1.0),
        mt.RandGaussianNoised(keys, prob=1.0, std=0.02),
        mt.Lambda(
            func=lambda item: (rotated_2d if dims == 2 else holed_3d)(
                torch.as_tensor(item["image"])
            )
        ),
    ]
    return fixed, random


def monai_loader(kind: str, files: list[dict[str, str]], dims: int, place: Path) -> Any:
    from monai.data import CacheDataset, DataLoader, PersistentDataset
    from monai.transforms import Compose

    fixed, random = monai_transforms(dims)
    transform = Compose([*fixed, *random])
    if kind == "MONAI CacheDataset":
        dataset: Any = CacheDataset(files, transform, cache_rate=1.0, num_workers=1, progress=False)
    else:
        dataset = PersistentDataset(files, transform, cache_dir=place / f"persistent-{dims}")
    return DataLoader(
        dataset, batch_size=BATCH[dims], shuffle=True, num_workers=1, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip


def torchio_loader(files: list[dict[str, str]], dims: int) -> Any:
    import torchio as tio

    subjects = [tio.Subject(image=tio.ScalarImage(file["image"])) for file in files]
    changes = tio.Compose(
        [
            tio.RandomFlip(axes=0, flip_probability=0.5),
            tio.RandomGamma(log_gamma=0.1),
            tio.RandomNoise(std=(0, 0.02)),
        ]
    )
    crop = (*CROP[2], 1) if dims == 2 else CROP[3]
    queue = tio.Queue(
        tio.SubjectsDataset(subjects, transform=changes),
        max_length=4 * BATCH[dims], samples_per_volume=8,
        sampler=tio.UniformSampler(crop), num_workers=1,
    )  # fmt: skip
    return tio.SubjectsLoader(queue, batch_size=BATCH[dims], num_workers=0, drop_last=True)


def batches(loader: Any, dims: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches for ever, with the puzzle where the loader has not made it."""
    while True:
        for batch in loader:
            if "label" in batch:
                yield batch
                continue
            images = batch["image"]["data"].float()
            if dims == 2:
                images = images.squeeze(-1)
            made = [(rotated_2d if dims == 2 else holed_3d)(image) for image in images]
            yield {key: torch.stack([item[key] for item in made]) for key in made[0]}


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize(("name", "dims"), [("rotation", 2), ("inpainting", 3)])
def test_against_pipelines_of_peers(
    store: Store, tmp_path: Path, name: str, dims: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """(b) The same backbone, crop, batch, dtype and threads, fed by medssl and by peers' parts."""
    import nibabel as nib

    files = []
    for number, volume in enumerate(volumes(NUM_SCANS)):
        path = tmp_path / f"{number}.nii"
        nib.save(nib.Nifti1Image(volume.astype(np.float32), np.eye(4)), path)
        files.append({"image": str(path)})
    training = Training(store, name, dims, num_workers=1)
    network, task = training.state.network, training.task

    def peer_step(batch: dict[str, torch.Tensor]) -> None:
        from medssl.pretext.base import PretextBatch

        images = torch.as_tensor(batch["image"]).float()
        extras = {}
        if "weight" in batch:
            weight = torch.as_tensor(batch["weight"]).float()
            extras = {"weight": weight, "hidden": weight > 0, "mean": images}
        target = torch.as_tensor(batch["label"])
        puzzle = PretextBatch(images, target, task.name, extras)
        training.state.optimizer.zero_grad(set_to_none=True)
        task.loss(network(puzzle), puzzle).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        training.state.optimizer.step()

    def peer_rate(source: Iterator[dict[str, torch.Tensor]]) -> float:
        begun = time.perf_counter()
        for _ in range(STEPS[dims]):
            peer_step(next(source))
        return STEPS[dims] * BATCH[dims] / (time.perf_counter() - begun)

    peers: dict[str, Iterator[dict[str, torch.Tensor]]] = {
        kind: batches(monai_loader(kind, files, dims, tmp_path), dims)
        for kind in ("MONAI CacheDataset", "MONAI PersistentDataset")
    }
    peers["TorchIO Queue"] = batches(torchio_loader(files, dims), dims)
    rates: dict[str, list[float]] = {kind: [] for kind in ["medssl", *peers]}
    for kind, source in peers.items():
        # One at a time: their workers would take the core that the other's worker needs.
        with closing(training.feed()) as samples:
            training.rate(samples, 3)
            for _ in range(2):
                peer_rate(source)  # fills caches
            for _ in range(ROUNDS):
                rates[kind].append(peer_rate(source))
                rates["medssl"].append(training.rate(samples, STEPS[dims]))
    ours = statistics.median(rates["medssl"])
    with capsys.disabled():
        print(f"\n(b) {name} {dims}D: medssl {ours:.0f} images/s")
        for kind in peers:
            theirs = statistics.median(rates[kind])
            print(f"    {kind}: {theirs:.0f} images/s, medssl is {ours / theirs:.2f} times as fast")
    assert ours > 0


# ------------------------------------------------------------------------------------ as work grows


@pytest.mark.parametrize("num_scans", [100, 1_000, 10_000])
def test_cost_against_the_number_of_scans(
    num_scans: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(c) Start-up and time of the sampler's crops, and memory, with more scans in the store."""
    (volume,) = volumes(1, (32, 32, 16))
    store = make_store(tmp_path, {f"s{n:05d}": volume for n in range(num_scans)})
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from medssl.scans.store import Store\n"
        "from medssl.transforms.sampling import CropSampler, SampleRequest\n"
        "begun = time.perf_counter()\n"
        "store = Store.open(Path(sys.argv[1]))\n"
        "request = SampleRequest(2, (24, 24), 'axial', min_foreground=0.2)\n"
        "sampler = CropSampler(store, store.scan_keys, request, 0, 'bench', cache_bytes=0)\n"
        "started = time.perf_counter() - begun\n"
        "sampler.batch(0, 64)\n"
        "begun = time.perf_counter()\n"
        "for step in range(1, 21): sampler.batch(step, 64)\n"
        "each = (time.perf_counter() - begun) / (20 * 64)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "peak = int(status.split('VmHWM:')[1].split()[0]) / 1024\n"
        "print(started, each * 1e6, peak)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(store.folder)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    started, microseconds, megabytes = map(float, found.stdout.split())
    with capsys.disabled():
        print(
            f"\n(c) {num_scans} scans: sampler ready after {started:.2f} s, "
            f"{microseconds:.0f} us a crop, peak memory {megabytes:.0f} MB"
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_seconds_from_command_to_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(d) ``medssl pretrain`` on a prepared store, until the journal has its first line."""
    from medssl.tracking.journal import JOURNAL_NAME
    from studies import medssl, settings, write_archive, write_config

    archive = write_archive(tmp_path / "archive")
    content = settings(archive)
    pretrain = {
        "index": str(tmp_path / "index"),
        **{key: content[key] for key in ("preprocessing", "sampling", "backbone")},
        "pretext": {"name": "rotation", "views": 1},
        "training": {"steps": 2, "global_batch_size": 4, "log_every": 1},
        "tracking": {"mlflow": False},
    }
    indexed = medssl("index", content["index"]["folder"], "--out", pretrain["index"], cwd=tmp_path)
    assert indexed.returncode == 0, indexed.stderr
    config = write_config(tmp_path / "pretrain.yaml", pretrain)
    first = medssl("pretrain", config, "--out", "warm", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    times = []
    for number in range(3):
        out = tmp_path / f"run-{number}"
        times.append(first_line(lambda out=out: medssl_process(config, out, tmp_path),
                                out / JOURNAL_NAME))  # fmt: skip
    with capsys.disabled():
        print(f"\n(d) from command to first step: {statistics.median(times):.1f} s")
    assert min(times) > 0


def medssl_process(config: Path, out: Path, place: Path) -> subprocess.Popen[str]:
    from studies import environment

    return subprocess.Popen(
        [sys.executable, "-m", "medssl", "pretrain", str(config), "--out", str(out)],
        cwd=place, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def first_line(start: Callable[[], subprocess.Popen[str]], journal: Path) -> float:
    """Return the seconds until a journal holds a loss."""
    begun = time.perf_counter()
    process = start()
    try:
        while time.perf_counter() - begun < 120:
            if journal.is_file() and "train/loss" in journal.read_text(encoding="utf-8"):
                return time.perf_counter() - begun
            assert process.poll() in (None, 0)
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    raise AssertionError("no first step within two minutes")
