import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import ConfigError, MachineError
from medssl.transforms.sample import Batches, Sample, Share


def numbered(batch: int, size: int) -> Sample:
    """Return the numbers that the crops of a batch have in their stream."""
    return Sample(torch.arange(batch * size, (batch + 1) * size), None, step=batch)


@given(
    num_ranks=st.integers(1, 4),
    parts_per_rank=st.integers(1, 4),
    size=st.integers(1, 5),
    start=st.integers(0, 9),
    steps=st.integers(0, 4),
)
def test_the_parts_of_all_ranks_are_one_process_s_batches(
    num_ranks, parts_per_rank, size, start, steps
) -> None:
    num_parts = num_ranks * parts_per_rank
    total = num_parts * size
    crops: dict[int, list[int]] = {step: [] for step in range(start, start + steps)}
    for rank in range(num_ranks):
        share = Share(total, num_parts, rank, num_ranks)
        dataset = Batches(numbered, start, start + steps, share)
        assert len(dataset) == steps * parts_per_rank
        for number, sample in enumerate(dataset):
            assert sample.step == start + number // parts_per_rank
            assert sample.part == rank + num_ranks * (number % parts_per_rank)
            crops[sample.step] += sample.images.tolist()
    for step, found in crops.items():
        assert sorted(found) == numbered(step, total).images.tolist()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 images do not divide into 5 equal micro batches"):
        Share(32, 5)


def test_micro_batches_that_do_not_divide_among_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 micro batches do not divide among 3 processes"):
        Share(32, 4, 0, 3)


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no rank 2 among 2 processes"):
        Share(32, 2, 2, 2)


def test_too_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(MachineError, match=r"finds no place in shared memory .*--shm-size"):
        Sample(torch.zeros(1, 1, 4, 4), None).share_memory()
