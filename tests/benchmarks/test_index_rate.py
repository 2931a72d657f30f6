"""How fast an archive is indexed, against what reading it costs other tools; and what it takes.

    make bench PYTEST_ARGS="-k index -s"

Rates are measured in turns on the same files, in one run, and printed as ratios. Memory is the peak
of a process of its own. Nothing is asserted about time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from large_archives import copy_real_slices, write_headers_only
from medssl.pipelines.index import index_scans
from medssl.scans.formats._dicom_facts import KEYWORDS

_ROUNDS = 3
_COPIES = 16


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def plain_loop(paths: list[Path]) -> None:
    """Read the same tags in one process with pydicom alone; pixels are not looked at."""
    for path in paths:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(KEYWORDS))
        for keyword in KEYWORDS:
            dataset.get(keyword)


def discover_with_simpleitk(folder: Path) -> None:
    import SimpleITK

    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(place))


def convert_headers_with_dcm2niix(folder: Path, out: Path) -> None:
    import dcm2niix

    out.mkdir(exist_ok=True)
    command = [dcm2niix.bin, "-b", "o", "-d", "9", "-o", str(out), str(folder)]
    subprocess.run(command, capture_output=True, check=False)


@pytest.mark.timeout(3600)
def test_rate_of_indexing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = copy_real_slices(tmp_path / "scans", _COPIES)
    found: dict[str, list[float]] = {}

    def measure(name: str, run: Callable[[], object]) -> None:
        found.setdefault(name, []).append(seconds(run))

    for turn in range(_ROUNDS):
        out = tmp_path / f"index{turn}"
        measure("medssl index, first", lambda out=out: index_scans(tmp_path / "scans", out))  # type: ignore[misc]
        measure("medssl index, again", lambda out=out: index_scans(tmp_path / "scans", out))  # type: ignore[misc]
        measure("pydicom loop", lambda: plain_loop(paths))
        measure("SimpleITK series", lambda: discover_with_simpleitk(tmp_path / "scans"))
        measure(
            "dcm2niix -b o",
            lambda: convert_headers_with_dcm2niix(tmp_path / "scans", tmp_path / "nii"),
        )
        shutil.rmtree(tmp_path / "nii")
    loop = statistics.median(found["pydicom loop"])
    with capsys.disabled():
        print(f"\n{len(paths)} files, medians of {_ROUNDS}")
        for name, times in found.items():
            middle = statistics.median(times)
            rate, ratio = len(paths) / middle, loop / middle
            print(f"{name:22} {middle:8.2f} s  {rate:9.0f} files/s  {ratio:7.2f} x loop")


_PEAK = """
import json, resource, sys, time
from pathlib import Path
from medssl.errors import DataError
from medssl.pipelines.index import index_scans
begun = time.perf_counter()
try:
    index_scans(sys.argv[1], sys.argv[2])
except DataError:
    pass  # no file has pixels, so none is a scan
took = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([took, peak]))
"""


@pytest.mark.timeout(3600)
def test_memory_of_indexing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for count in (10_000, 200_000):
        write_headers_only(tmp_path / str(count), count, tmp_path / "template")
        for again in (False, True):
            done = subprocess.run(
                [sys.executable, "-c", _PEAK, tmp_path / str(count), tmp_path / f"index{count}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[count, again] = json.loads(done.stdout)
        shutil.rmtree(tmp_path / str(count))
    with capsys.disabled():
        for (count, again), (took, peak) in found.items():
            which = "again" if again else "first"
            print(f"\n{count} files, {which}: {took:.1f} s, peak {peak:.0f} MB")
        slope = (found[200_000, False][1] - found[10_000, False][1]) / 0.19
        print(f"slope of the peak: {slope:.1f} MB for each million files")
