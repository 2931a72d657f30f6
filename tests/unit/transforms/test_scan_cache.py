import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import MachineError
from medssl.scans.store import Entry
from medssl.transforms.scan_cache import ScanCache
from stores import make_store, numbered_volume

SHAPE = (4, 4, 4)
ONE = 128
"""Bytes of a float16 image of that shape; a mask takes half of it."""


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return make_store(tmp_path_factory.mktemp("s"), {"a1": numbered_volume(SHAPE)}).listed("a1")


def entries(entry: Entry, *keys: str) -> list[Entry]:
    return [replace(entry, scan_key=key) for key in keys]


def never() -> np.ndarray:
    raise AssertionError("decoded again")


def test_what_was_decoded_is_not_decoded_again(entry: Entry) -> None:
    cache = ScanCache([entry], None, 1 << 20)
    image = numbered_volume((1, *SHAPE))
    np.testing.assert_array_equal(cache.get("a1", None, lambda: image), image)
    np.testing.assert_array_equal(cache.get("a1", None, never), image)


def test_what_a_forked_worker_decodes_is_there_for_all(entry: Entry) -> None:
    cache = ScanCache(entries(entry, "a", "b"), "m", 1 << 20)
    image, mask = numbered_volume((1, *SHAPE)), np.full(SHAPE, 3, np.uint8)

    def work() -> None:
        cache.get("b", None, lambda: image)
        cache.get("b", "m", lambda: mask)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    assert cache.num_filled == 2
    np.testing.assert_array_equal(cache.get("b", None, never), image)
    np.testing.assert_array_equal(cache.get("b", "m", never), mask)


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (ONE - 1, 0), (ONE, 1), (3 * ONE - 1, 2)])
def test_scans_get_places_in_order_until_the_budget_is_spent(
    entry: Entry, budget: int, kept: int
) -> None:
    cache = ScanCache(entries(entry, "a", "b", "c"), None, budget)
    places = [cache.get(key, None, lambda: numbered_volume((1, *SHAPE))) for key in "abc"]
    assert [place is not None for place in places] == [i < kept for i in range(3)]
    assert cache.num_bytes <= budget


def test_an_image_without_room_for_its_mask_has_no_place(entry: Entry) -> None:
    assert len(ScanCache([entry], "m", ONE)) == 0
    assert len(ScanCache([entry], "m", ONE + ONE // 2)) == 2


def test_kept_scans_are_not_written_to(entry: Entry) -> None:
    cache = ScanCache([entry], None, 1 << 20)
    image = cache.get("a1", None, lambda: numbered_volume((1, *SHAPE)))
    assert image is not None
    with pytest.raises(ValueError, match="read-only"):
        image[...] = 0


def test_memory_is_taken_when_it_is_written(entry: Entry, tmp_path: Path) -> None:
    large = replace(entry, shape=(1024, 1024, 1024))
    before = shared_kb()
    cache = ScanCache([large], None, 1 << 32)
    assert cache.num_bytes == 1 << 31
    assert shared_kb() - before < 10_000


def shared_kb() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssShmem" in x]
    return int(line.split()[1])


def test_memory_that_the_machine_does_not_grant_is_said(entry: Entry) -> None:
    huge = replace(entry, shape=(1 << 20, 1 << 20, 1 << 10))
    with pytest.raises(MachineError, match=r"cannot be had\. Lower training\.cache_gb"):
        ScanCache([huge], None, 1 << 60)
