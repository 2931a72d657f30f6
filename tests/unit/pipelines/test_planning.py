"""Plans of a pretraining: what they foresee, and what they advise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medssl.cli import cli
from medssl.config import validate_config
from medssl.pipelines import index as indexing
from medssl.pipelines import planning, prepare, pretrain
from medssl.pipelines.planning import advise, costs, largest_batch, space
from medssl.scans.building import IndexConfig
from medssl.scans.index import Index
from medssl.training.rehearsal import Rehearsal, line_through
from studies import settings, write_archive, write_config

GB = 10**9
FITTING = Rehearsal(
    free_bytes=10 * GB, peaks={2: 1 * GB, 4: 2 * GB}, step_seconds=[0.5, 9.0, 0.5],
    validation_seconds=0.25, validation_bytes=1 * GB, state_bytes=3 * GB, checkpoint_bytes=GB,
)  # fmt: skip


def configured(**training: Any) -> pretrain.PretrainConfig:
    content = {
        **{name: settings(Path())[name] for name in ("preprocessing", "sampling", "backbone")},
        "index": "nowhere",
        "pretext": "rotation",
        "training": {"steps": 100, "global_batch_size": 4, **training},
        "device": "cpu",
    }
    return validate_config(content, pretrain.PretrainConfig)


def told(
    rehearsal: Rehearsal,
    read: float | None = 0.001,
    pool: int = 100,
    device: str = "cpu",
    **training: Any,
) -> dict[str, str]:
    written = space(rehearsal, Path())
    return advise(configured(**training), device, rehearsal, read, pool, written)


# -------------------------------------------------------------------------------------- estimates


def test_time_is_steps_and_validations_and_reading_adds_up_without_workers():
    config = configured(validate_every=30)
    found = costs(config, "cpu", FITTING, 0.05)["time"]
    assert found["step_seconds"] == pytest.approx(0.5 + 4 * 0.05)
    assert found["validations"] == 4  # after 30, 60, 90 and 100
    assert found["validation_seconds"] == pytest.approx(4 * (0.25 + 4 * 0.05))
    assert found["total_seconds"] == pytest.approx(100 * 0.7 + 4 * 1.8)
    assert found["total"] == "77.2 s"
    assert found["images_per_second"] == pytest.approx(4 / 0.7, rel=0.01)


def test_workers_read_while_the_device_computes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "available_cores", lambda: 2)
    for read, step in ((0.05, 0.5), (0.5, 1.0)):  # at most one worker a core counts
        found = costs(configured(num_workers=8), "cpu", FITTING, read)["time"]
        assert found["step_seconds"] == pytest.approx(step)


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "3.0 s"), (600, "10.0 min"), (9000, "2.5 h"), (4e5, "4.6 days")]
)
def test_times_are_told_in_the_unit_that_people_use(seconds: float, words: str):
    assert planning.in_words(seconds) == words


def test_disk_holds_two_states_a_draft_and_the_checkpoint(tmp_path: Path):
    disk = space(FITTING, tmp_path / "not" / "there")["disk"]
    assert disk["needed_gb"] == 10
    assert disk["free_gb"] > 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- batch size


@pytest.mark.parametrize(
    ("micro", "batch", "pool", "free_gb", "best"),
    [
        (4, 4, 100, 10, 16),  # 8 GB of 10
        (4, 4, 10, 10, 8),  # no more than there are scans
        (4, 16, 100, 10, 16),
        (4, 12, 100, 10, 12),  # 8 does not divide 12
        (4, 4, 100, 1.3, 2),  # smaller than configured
        (4, 4, 100, 0.1, None),
    ],
)
def test_the_largest_batch_fills_four_fifths_of_what_is_free(
    micro: int, batch: int, pool: int, free_gb: float, best: int | None
):
    assert largest_batch(FITTING.peaks, int(free_gb * GB), micro, batch, pool) == best


@given(
    st.integers(1, 64), st.integers(1, 16), st.integers(1, 10_000), st.integers(1, 400),
    st.integers(0, 50),
)  # fmt: skip
def test_a_suggested_batch_fits_divides_and_is_no_larger_than_the_pool(
    micro: int, parts: int, pool: int, free: int, slope: int
):
    peaks, batch = {2: 10, 4: 10 + 2 * slope}, micro * parts
    best = largest_batch(peaks, free, micro, batch, pool)
    if best is not None:
        assert best <= pool
        assert line_through(peaks, best) <= 0.8 * free
        assert batch % best == 0 if best <= batch else best % batch == 0


def test_without_two_measurements_no_batch_is_suggested():
    assert largest_batch({4: GB}, 10 * GB, 4, 4, 100) is None


# ----------------------------------------------------------------------------------------- advice


def test_what_fits_is_told_with_the_batch_that_would():
    found = told(FITTING)
    assert found["memory"] == "It fits: 2 GB at most, and 10 GB are free."
    assert found["batch"] == (
        "Up to 16 images at once would fit (global_batch_size=16). That is another training: its "
        "learning rate and steps need choosing anew. On a CPU that is hardly faster."
    )
    assert told(FITTING, global_batch_size=16, micro_batch_size=4)["batch"] == (
        "training.micro_batch_size=16 fits as well: fewer, larger parts of the same step."
    )
    assert told(FITTING, pool=5)["batch"] == (
        "4 images at once are about the most that fills 80% of the memory."
    )


def test_what_does_not_fit_is_told_with_what_to_lower():
    foreseen = Rehearsal(3 * GB, {2: 1 * GB, 4: 2 * GB}, foreseen_bytes=4 * GB)
    assert told(foreseen, global_batch_size=8) == {
        "memory": "Micro batches of 8 do not fit: about 4 GB are needed, and 3 GB are free. "
        "Set training.micro_batch_size=4, or training.recompute=true."
    }
    nothing = Rehearsal(3 * GB, {}, failed=True)
    assert told(nothing, recompute=True)["memory"] == (
        "Micro batches of 4 do not fit: 3 GB are free. Set smaller crops."
    )


def test_a_gpu_is_also_advised_a_lower_precision():
    found = told(Rehearsal(3 * GB, {}, failed=True), device="cuda")
    assert found["memory"].endswith("training.recompute=true, or training.precision=bf16.")


def test_a_validation_that_does_not_fit_is_told_apart():
    tight = Rehearsal(2 * GB, {2: GB, 4: GB}, step_seconds=[1.0], validation_bytes=3 * GB)
    assert told(tight)["memory"] == (
        "Training fits, validation does not (2 GB are free): it looks at a whole batch at once. "
        "Lower training.global_batch_size."
    )
    assert not costs(configured(), "cpu", tight, None)["memory"]["fits"]


def test_the_slower_of_reading_and_computing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "available_cores", lambda: 4)
    assert told(FITTING)["reading"] == (
        "A step computes for 0.5 s, and its crops are read in 0.004 s: computing bounds this run."
    )
    assert told(FITTING, 1.0)["reading"] == (
        "A step computes for 0.5 s, and its crops are read in 4 s: reading bounds this run. "
        "Raise training.num_workers (now 0; 4 cores are usable), or keep the scans on the device "
        "(training.resident)."
    )
    assert told(FITTING, 9.0, num_workers=3)["reading"].endswith(
        "Keep the scans on the device (training.resident), or use a faster disk."
    )
    assert "no scans are prepared yet" in told(FITTING, None)["reading"]


def test_a_disk_that_is_too_small_is_told():
    written = {"disk": {"needed_gb": 2, "free_gb": 1}}
    found = advise(configured(), "cpu", FITTING, None, 100, written)
    assert found["disk"] == (
        "Training states and checkpoint do not fit the disk. Free some, or set --out."
    )


# ----------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    place = tmp_path_factory.mktemp("planning")
    whole = settings(write_archive(place / "archive"))
    return indexing.run(validate_config(whole["index"], IndexConfig), place / "index")


def file_of(index: Index, place: Path, **training: Any) -> Path:
    content = configured(**training).model_dump(mode="json") | {"index": str(index.folder)}
    return write_config(place / "pretrain.yaml", content)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_measures_and_writes_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = file_of(index, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path), files(index.folder)
    done = CliRunner().invoke(cli, ["pretrain", str(file), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (files(tmp_path), files(index.folder)) == before
    assert found["patients"] == 10
    assert found["scans_trained_on"] == found["patients_trained_on"] == 5
    assert found["memory"]["fits"] is True
    assert set(found["memory"]["by_micro_batch_gb"]) == {"2", "4"}
    assert found["memory"]["measured_as"] == "how far the peak of a process's resident memory rose"
    assert found["time"]["steps_measured"] == 3
    assert found["time"]["reading_seconds"] is None
    assert "are the index's, of which preparation may lose some" in found["time"]["counted"]


def test_reading_is_measured_where_scans_are_prepared(index: Index):
    config = configured().model_copy(update={"index": index.folder})
    assert planning.seconds_to_read(config) is None
    folder = prepare.store_folder(config.index, config.preprocessing)
    prepare.prepare(index, config.preprocessing, folder)
    before = files(index.folder)
    read = planning.seconds_to_read(config)
    assert read is not None
    assert 0 < read < 1
    assert files(index.folder) == before


def test_a_process_that_is_ended_for_its_memory_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "rehearse", end_this_process)
    found = planning.rehearsed(planning.Scene(*[None] * 6, planning.torch.device("cpu"), 1))
    assert found.failed
    assert not planning.fits(found)


def end_this_process(_: Any) -> None:
    """Stand in for a step that the kernel ends."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_the_table_of_a_profile_is_printed_at_the_end(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    file = file_of(index, tmp_path, steps=6, profile=True)
    done = CliRunner().invoke(cli, ["pretrain", str(file), "tracking.mlflow=false"])
    assert done.exit_code == 0, done.output
    assert "waiting for data" in done.stdout
    assert (tmp_path / "runs/pretrain/profile/trace.json").is_file()
