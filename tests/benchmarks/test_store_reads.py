"""Reading a random slice and a 96³ crop: the store against other ways to keep the same voxels.

    make bench PYTEST_ARGS="-k store -s"

The volume is a real one (a T1 of 256 x 256 x 192), prepared once to float16; every way reads the
same places, in turns, from a warm page cache, which is the hardest case for compression. Bytes on
disk are printed beside the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medssl.pipelines.index import index_scans
from medssl.pipelines.prepare import prepare
from medssl.transforms.preprocessing import PreprocessingConfig
from samples import real_data

_ROUNDS = 60
_CROP = 96
Array = npt.NDArray[Any]


@pytest.mark.timeout(900)
def test_reads_of_a_slice_and_a_crop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    import zarr
    from monai.data.dataset import PersistentDataset

    index = index_scans(real_data("dicom", "sag_mprage"), tmp_path / "index")
    config = PreprocessingConfig(crop_foreground=False)
    store = prepare(index, config, tmp_path / "store")
    (key,) = store.scan_keys
    image = store.read(key)
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    zipped = zarr.create_array(
        tmp_path / "image.zarr", shape=image.shape, chunks=(1, 32, 32, 32), dtype=image.dtype
    )
    zipped[...] = image
    persistent = PersistentDataset(
        [{"image": torch.from_numpy(image)}], lambda item: item, cache_dir=tmp_path / "persistent"
    )
    persistent[0]
    ways: dict[str, tuple[Callable[[tuple[slice, ...]], Array], Path]] = {
        "medssl store": (lambda region: store.read(key, region), tmp_path / "store" / "scans"),
        "npy memmap": (
            lambda region: np.array(mapped[(slice(None), *region)]), tmp_path / "image.npy",
        ),
        "Zarr 32³ chunks": (
            lambda region: np.asarray(zipped[(slice(None), *region)]), tmp_path / "image.zarr",
        ),
        "PersistentDataset": (
            lambda region: persistent[0]["image"][(slice(None), *region)].numpy(),
            tmp_path / "persistent",
        ),
    }  # fmt: skip
    times = measured(ways, image.shape[1:])
    with capsys.disabled():
        print(
            f"\nimage of {image.shape} float16, {image.nbytes / 1e6:.1f} MB; medians of {_ROUNDS}"
        )
        for name, (_, place) in ways.items():
            columns = "  ".join(
                f"{kind} {statistics.median(times[name, kind]) * 1e3:7.2f} ms"
                for kind in ("sagittal", "coronal", "axial", "crop")
            )
            print(f"{name:18} {size_of(place) / 1e6:6.1f} MB  {columns}")


def measured(
    ways: dict[str, tuple[Callable[[tuple[slice, ...]], Array], Path]], shape: tuple[int, ...]
) -> dict[tuple[str, str], list[float]]:
    generator = np.random.default_rng(0)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for kind, region in regions(shape, generator).items():
            answers = []
            for name, (read, _) in ways.items():
                begun = time.perf_counter()
                answers.append(read(region))
                times.setdefault((name, kind), []).append(time.perf_counter() - begun)
            for answer in answers[1:]:
                np.testing.assert_array_equal(answer, answers[0])
    return times


def regions(shape: tuple[int, ...], generator: np.random.Generator) -> dict[str, tuple[slice, ...]]:
    starts = [int(generator.integers(size - _CROP + 1)) for size in shape]
    found = {"crop": tuple(slice(start, start + _CROP) for start in starts)}
    for axis, kind in enumerate(("sagittal", "coronal", "axial")):
        place = int(generator.integers(shape[axis]))
        region = [slice(0, size) for size in shape]
        region[axis] = slice(place, place + 1)
        found[kind] = tuple(region)
    return found


def size_of(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
