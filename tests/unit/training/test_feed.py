import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import torch

from medssl.errors import ConfigError, DataError, MachineError, RejectedScan
from medssl.scans.store import Store
from medssl.training.feed import FeedConfig, _ahead, feed, lives_on_device
from medssl.transforms.resident import resident_bytes
from medssl.transforms.sample import Sample, Share
from medssl.transforms.sampling import CropSampler, SampleRequest
from training import CPU, blob_store

REQUEST = SampleRequest(2, (12, 10), "axial", min_foreground=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return blob_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def sampler(store: Store) -> CropSampler:
    return CropSampler(store, store.scan_keys, REQUEST, 0, "train")


def fed(
    store: Store, start: int, stop: int, share: Share | None = None, **settings
) -> list[Sample]:
    config = FeedConfig(**settings)
    return list(feed(sampler(store), start, stop, share or Share(4), config, CPU))


def same(one: list[Sample], two: list[Sample]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.images, b.images)
        and (a.scan_keys, a.rejected, a.step, a.part) == (b.scan_keys, b.rejected, b.step, b.part)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("crops_per_scan", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 1},
        {"num_workers": 2, "prefetch_factor": 1},
        {"num_workers": 2, "cache_gb": 0},
        {"cache_gb": 0},
        {"resident": "always"},
    ],
)
def test_however_they_are_read_batches_are_the_same(
    store: Store, crops_per_scan: int, settings: dict
) -> None:
    plain = fed(store, 0, 6, crops_per_scan=crops_per_scan)
    assert same(plain, fed(store, 0, 6, crops_per_scan=crops_per_scan, **settings))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("start", [1, 3])
def test_a_feed_goes_on_from_the_middle_of_an_epoch(
    store: Store, start: int, num_workers: int
) -> None:
    whole = fed(store, 0, 5, crops_per_scan=3)
    rest = fed(store, start, 5, crops_per_scan=3, num_workers=num_workers)
    assert same(whole[start:], rest)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process(
    store: Store, num_ranks: int, num_workers: int
) -> None:
    (wanted,) = fed(store, 2, 3, Share(8))
    parts: dict[int, Sample] = {}
    for rank in range(num_ranks):
        for sample in fed(store, 2, 3, Share(8, 4, rank, num_ranks), num_workers=num_workers):
            assert sample.step == 2
            assert sample.part not in parts
            parts[sample.part] = sample
    assert sorted(parts) == [0, 1, 2, 3]
    assert torch.equal(wanted.images, torch.cat([parts[part].images for part in range(4)]))
    assert wanted.rejected == sum(part.rejected for part in parts.values())


def test_a_feed_without_steps_is_empty(store: Store) -> None:
    assert fed(store, 3, 3, num_workers=2) == []


def test_workers_share_what_they_decode(store: Store) -> None:
    plain = sampler(store)
    list(feed(plain, 0, 4, Share(4), FeedConfig(num_workers=2), CPU))
    assert plain.reading(cache_bytes=10**9, crops_per_scan=1).cache.num_filled == 4


def test_the_feed_leaves_the_global_generator_alone(store: Store) -> None:
    before = torch.get_rng_state()
    fed(store, 0, 2, num_workers=2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_closed_feed_ends_its_workers(store: Store) -> None:
    config = FeedConfig(num_workers=2)
    with closing(feed(sampler(store), 0, 1000, Share(4), config, CPU)) as samples:
        next(samples)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [DataError("scan a1 is damaged."), RejectedScan("odd", "so so")])
def test_an_error_for_the_user_arrives_as_it_was_raised(
    store: Store, monkeypatch: pytest.MonkeyPatch, num_workers: int, error: DataError
) -> None:
    def refuse(self, scan_key, region=None):
        raise error

    monkeypatch.setattr(Store, "read", refuse)
    with pytest.raises(type(error)) as caught:
        fed(store, 0, 4, num_workers=num_workers)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_a_scan_that_vanishes_is_named(tmp_path: Path) -> None:
    store = blob_store(tmp_path)
    for path in tmp_path.rglob("image.b2nd"):
        path.unlink()
    with pytest.raises(DataError, match=r"^scan \w1 is damaged in the store: image.b2nd has 0"):
        fed(store, 0, 2, num_workers=2)


def test_a_mistake_of_ours_keeps_its_traceback(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, scan_key, region=None):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Store, "read", fail)
    with pytest.raises(ZeroDivisionError, match="in fail"):
        fed(store, 0, 2, num_workers=1)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])  # with batches under way, and without
def test_a_killed_worker_is_said_with_what_to_do(store: Store, seconds: float) -> None:
    config = FeedConfig(num_workers=2)
    samples = feed(sampler(store), 0, 1000, Share(4), config, CPU)
    next(samples)
    time.sleep(seconds)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(MachineError, match=r"1?2 workers .* was killed\..*/dev/shm.*--shm-size"):
        list(samples)


def test_too_little_shared_memory_arrives_as_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(MachineError, match="finds no place in shared memory"):
        fed(store, 0, 2, num_workers=1)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_end_the_training_process_alone(
    tmp_path: Path, stop: signal.Signals
) -> None:
    blob_store(tmp_path)
    script = textwrap.dedent(f"""
        import signal, sys, time
        from contextlib import closing
        from pathlib import Path
        from medssl.errors import Terminated
        from medssl.scans.store import Store
        from medssl.training.feed import FeedConfig, feed
        from medssl.transforms.sample import Share
        from medssl.transforms.sampling import CropSampler, SampleRequest
        import torch

        def stop(number, frame):
            raise Terminated

        signal.signal(signal.SIGTERM, stop)
        store = Store.open(Path({str(tmp_path)!r}))
        sampler = CropSampler(store, store.scan_keys, SampleRequest(2, (8, 8), "axial"), 0, "t")
        config = FeedConfig(num_workers=2)
        try:
            with closing(feed(sampler, 0, 10**9, Share(4), config, torch.device("cpu"))) as samples:
                for sample in samples:
                    print("step", sample.step, flush=True)
                    time.sleep(0.1)
        except (KeyboardInterrupt, Terminated) as stopped:
            print("stopped by", type(stopped).__name__, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.killpg(process.pid, stop)
    out, err = process.communicate(timeout=60)
    name = "KeyboardInterrupt" if stop == signal.SIGINT else "Terminated"
    assert out.splitlines()[-1] == f"stopped by {name}"
    assert err == ""
    assert process.returncode == 0
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("resident", "device", "wanted"),
    [("auto", "cpu", False), ("never", "cuda", False), ("always", "cpu", True)],
)
def test_scans_live_on_a_gpu_or_where_that_is_asked_for(
    store: Store, resident: str, device: str, wanted: bool
) -> None:
    config = FeedConfig.model_validate({"resident": resident})
    assert lives_on_device(sampler(store), config, torch.device(device)) is wanted


@pytest.mark.parametrize(
    ("budget", "free", "wanted"), [(1.01, 2.01, True), (0.99, 9.0, False), (1.01, 1.99, False)]
)
def test_auto_asks_for_budget_and_for_free_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch, budget: float, free: float, wanted: bool
) -> None:
    needed = resident_bytes(sampler(store), "float16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * needed, 0))
    config = FeedConfig(resident_gb=budget * needed / 1e9)
    assert lives_on_device(sampler(store), config, torch.device("cuda")) is wanted


def test_scans_that_must_live_on_the_device_and_do_not_fit_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"the 4 scans take .* GB as uint8.*Raise resident_gb"):
        fed(store, 0, 1, resident="always", resident_gb=1e-6, resident_dtype="uint8")


class FakeStream:
    """Stands for a stream of a GPU: writes down what is asked of it."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "FakeStream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")


class FakeTensor:
    is_cuda = False
    ready = False

    def __init__(self, number: int, told: list[str]) -> None:
        self.number, self.told = number, told

    def is_pinned(self) -> bool:
        return self.ready

    def pin_memory(self) -> "FakeTensor":
        self.ready = True
        return self

    def to(self, device: torch.device, non_blocking: bool) -> "FakeTensor":
        assert (self.ready, non_blocking, device.type) == (True, True, "cuda")
        self.told.append(f"copy {self.number}")
        return self

    def record_stream(self, stream: FakeStream) -> None:
        self.told.append(f"{self.number} is used by {stream.name}")


def test_the_next_batch_is_copied_after_the_step_is_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    side, step = FakeStream("side", told), FakeStream("step", told)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    samples = iter([Sample(FakeTensor(n, told), None) for n in (0, 1)])  # type: ignore[arg-type]
    for sample in _ahead(samples, torch.device("cuda")):
        told.append(f"queue step {sample.images.number}")  # type: ignore[attr-defined]
    assert told == [
        "side waits for step",
        "copy 0",
        "step waits for side",
        "0 is used by step",
        "queue step 0",
        "copy 1",
        "step waits for side",
        "1 is used by step",
        "queue step 1",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("resident", ["never", "always"])
def test_batches_on_a_gpu_are_those_of_a_cpu(store: Store, num_workers: int, resident: str) -> None:
    config = FeedConfig.model_validate({"num_workers": num_workers, "resident": resident})
    wanted = fed(store, 0, 8)
    device = torch.device("cuda")
    for number, sample in enumerate(feed(sampler(store), 0, 8, Share(4), config, device)):
        assert sample.images.is_cuda
        assert torch.equal(sample.images.cpu(), wanted[number].images)


@pytest.mark.gpu
def test_a_resident_batch_waits_for_nothing(store: Store) -> None:
    config = FeedConfig(resident="always")
    samples = feed(sampler(store), 0, 8, Share(4), config, torch.device("cuda"))
    next(samples)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(samples)) == 7
    finally:
        torch.cuda.set_sync_debug_mode("default")
