"""An index and a store made on a Ray cluster are those made by local processes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from medssl.executors.local import Config as LocalConfig
from medssl.executors.ray import Config as RayConfig
from medssl.pipelines.prepare import prepare
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.transforms.preprocessing import PreprocessingConfig
from samples import linear_volume, rotation_affine, write_dicom_series, write_nifti

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COARSE = PreprocessingConfig(spacing_mm=(2, 2, 2))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(4):
        affine = rotation_affine((number, 0, 0))
        volume = linear_volume((12, 10, 30), affine)
        write_dicom_series(
            volume, affine, folder / str(number), number=number, patient_id=f"P{number}"
        )
        write_nifti(folder / f"n{number}.nii.gz", seed=number)
    (folder / "cut.nii").write_bytes((folder / "n0.nii.gz").read_bytes()[:90])
    return folder


@pytest.fixture(scope="module")
def local(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    config = IndexConfig(folder=scans, executor=LocalConfig(num_workers=2))
    return build_index(config, tmp_path_factory.mktemp("local") / "index")


def on_ray(scans: Path, local: Index, out: Path, progress: Any = None) -> Index:
    """Index with the salt of another index, so that keys are the same."""
    (out / "private").mkdir(parents=True, mode=0o700)
    shutil.copy2(local.folder / "private" / "salt", out / "private" / "salt")
    config = IndexConfig(folder=scans, executor=RayConfig(num_workers=2))
    return build_index(config, out, progress)


def test_index_is_the_same_to_the_byte(scans: Path, local: Index, tmp_path: Path):
    index = on_ray(scans, local, tmp_path / "index")
    for name in ("index.parquet", "summary.json"):
        assert (index.folder / name).read_bytes() == (local.folder / name).read_bytes()


def test_store_is_the_same(local: Index, tmp_path: Path):
    ours = prepare(local, COARSE, tmp_path / "ray", executor=RayConfig(num_workers=2))
    theirs = prepare(local, COARSE, tmp_path / "local", executor=LocalConfig(num_workers=2))
    assert ours.digest == theirs.digest
    assert ours.verify() == theirs.verify() == []
    for key in ours.scan_keys:
        assert ours.entry(key) == theirs.entry(key)


def test_worker_killed_in_the_middle_loses_nothing(scans: Path, local: Index, tmp_path: Path):
    killed: list[int] = []

    def kill_one(stage: str, done: int, total: int) -> None:
        if stage == "reading headers" and done == 20 and not killed:
            ours = psutil.Process().children(recursive=True)
            workers = [each for each in ours if each.name().startswith("ray::Station")]
            killed.extend(process.pid for process in workers[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    index = on_ray(scans, local, tmp_path / "index", kill_one)
    assert len(killed) == 1
    assert (index.folder / "index.parquet").read_bytes() == (
        local.folder / "index.parquet"
    ).read_bytes()
