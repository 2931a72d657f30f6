"""Kill -9 at random moments of indexing and preparing: what is finished later is the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from medssl.scans.index import Index
from medssl.scans.store import Store
from samples import linear_volume, rotation_affine, write_dicom_series, write_nifti

KILLS = 20
SHAPE = (24, 20, 12)

ROAD = """
import os, sys, time
from pathlib import Path
import monai.transforms  # so that every child begins at once
from medssl.executors.local import Config as LocalConfig
from medssl.pipelines.index import index_scans
from medssl.pipelines.prepare import prepare
from medssl.transforms.preprocessing import PreprocessingConfig

def road(scans, out):
    begun = time.monotonic()
    index = index_scans(scans, out / "index", num_workers=2)
    prepare(index, PreprocessingConfig(spacing_mm=(2, 2, 2)), out / "store")
    return time.monotonic() - begun

for line in sys.stdin:  # each line: a folder of scans, a place; a child does the work
    scans, out = map(Path, line.rstrip("\\n").split("\\t"))
    child = os.fork()
    if child == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        try:
            print("done", road(scans, out), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archive")
    for number in range(6):
        affine = rotation_affine((number, 0, 0), origin_mm=(number, 0, 0))
        folder = root / "scans" / f"{number}"
        write_dicom_series(
            linear_volume(SHAPE, affine), affine, folder, number=number, patient_id=f"P{number}"
        )
        write_nifti(root / "scans" / f"n{number}.nii.gz", seed=number)
    (root / "scans" / "notes.txt").write_text("no scan")
    with zipfile.ZipFile(root / "scans" / "more.zip", "w") as zipped:
        for number in range(6, 9):
            path = write_nifti(root / f"n{number}.nii.gz", seed=number)
            zipped.write(path, path.name)
    return root / "scans"


class Driver:
    """A process that imports everything once, and does the road in children that can be killed."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._process = subprocess.Popen(
            [sys.executable, "-c", ROAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, out: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._archive}\t{out}\n")
        self._process.stdin.flush()
        return int(self._line())

    def finish(self) -> float | None:
        """Return how long the road took, or None when it was killed."""
        line = self._line()
        if line == "ended":
            return None
        assert self._line() == "ended"
        return float(line.removeprefix("done "))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def tables(out: Path) -> dict[str, str]:
    """Return the digests of all that must not depend on how often a run was killed."""
    store = Store.open(out / "store")
    assert store.verify() == []
    paths = [out / "index" / "index.parquet", out / "index" / "summary.json"]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {**files, "index": Index.open(out / "index").digest, "store": store.digest}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_finish_to_the_same_tables_and_store(archive: Path, tmp_path: Path):
    driver = Driver(archive)
    try:
        driver.start(tmp_path / "whole")
        driver.finish()
        driver.start(tmp_path / "whole2")  # the first run starts the machinery: not typical
        took = driver.finish()
        assert took is not None
        wanted = None
        draw = random.Random(0)
        salt = tmp_path / "whole" / "index" / "private" / "salt"
        killed = 0
        for number in range(3 * KILLS):
            if killed == KILLS:
                break
            out = tmp_path / f"killed{number}"
            place = out / "index" / "private"
            place.mkdir(parents=True, mode=0o700)
            shutil.copy2(salt, place / "salt")
            process = driver.start(out)
            time.sleep(draw.random() * took)
            with contextlib.suppress(ProcessLookupError):  # it was faster than the last one
                os.killpg(process, signal.SIGKILL)
            if (finished_after := driver.finish()) is not None:
                took = min(took, finished_after)
                continue
            killed += 1
            driver.start(out)
            assert driver.finish() is not None
            found = tables(out)
            wanted = wanted or tables(tmp_path / "whole")
            assert found == wanted, f"kill {number}"
        assert killed == KILLS
    finally:
        driver.close()
