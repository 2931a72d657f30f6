"""The hostile corpus through other people's readers: who returns wrong volumes without a word.

    python tests/benchmarks/test_compare_readers.py --out FOLDER
    make bench

A case ends in one of four ways: every scan right (in any order of its axes, as long as its affine
says so); rightly refused, where no right volume exists; a good scan missed (an error, or nothing);
or wrong, silently (a warning on the terminal is no error that a program sees). A volume that is
merely unwanted (a secondary capture, a mask, text in the pixels) is not held against a reader that
knows no such policy.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile_corpus import DICOM_CASES, NIFTI_CASES
from hostile_outcomes import Case, Found, Rejected, Right, differences, index_case, linear
from medssl.scans.scan import read_scan
from other_readers import DICOM_READERS, NIFTI_READERS, Volume, Worker, is_installed

ENDS = ("right", "rightly refused", "missed", "silently wrong")
POLICY = {
    "quarantined", "secondary_capture", "derived", "localizer", "label_map", "constant",
    "dicomdir", "sidecar", "analyze", "nan_voxels", "archive",
}  # fmt: skip
"""Reasons for which medssl leaves out volumes that may well be read as they stand."""

NEVER_RIGHT = {"mixed_patients", "complex_unsupported"}
"""Reasons for which a volume is wrong even when its voxels lie right."""


def arrangements(volume: Volume, right: Right) -> Iterator[Found]:
    """Yield a reader's array as (C, spatial axes), in the ways it may have been meant."""
    voxels, affine = volume
    num_axes = len(right.shape)
    while voxels.ndim > num_axes and 1 in voxels.shape[num_axes:]:
        voxels = voxels.squeeze(num_axes + voxels.shape[num_axes:].index(1))
    if voxels.ndim > num_axes and voxels.shape[0] == 1:
        voxels = voxels[0]
    options = []
    if right.num_channels == 1 and voxels.ndim == num_axes:
        options.append(voxels[np.newaxis])
    if right.num_channels > 1 and voxels.ndim == num_axes + 1:
        options += [np.moveaxis(voxels, -1, 0), voxels, np.moveaxis(voxels, 2, 0)]
    for option in options:
        if option.shape[0] != right.num_channels:
            continue
        yield Found(option, affine)
        if right.dims == "3D":
            continue
        # An image without a place in the patient may be turned in its plane.
        for swap, flip_x, flip_y in itertools.product((False, True), repeat=3):
            turned, own = option, affine
            if swap:
                turned = np.swapaxes(turned, 1, 2)
                own = affine[:, [1, 0, 2, 3]]
            turned = turned[:, :: -1 if flip_x else 1, :: -1 if flip_y else 1]
            yield Found(turned, own)


def is_right(volume: Volume, right: Right) -> bool:
    for found in arrangements(volume, right):
        shape = found.voxels_CXYZ.shape[1:]
        wanted = sorted(size for size in right.shape if size)
        if 0 in right.shape or sorted(shape) == wanted:
            try:
                if not right.check(found):
                    return True
            except (ValueError, np.linalg.LinAlgError):
                continue
    return False


def lies_right(volume: Volume) -> bool:
    """Say whether a volume that medssl rejects has the right value at every place all the same."""
    voxels, affine = volume
    if voxels.ndim != 3 or not np.isfinite(affine).all() or np.iscomplexobj(voxels):
        return False
    return not linear()(Found(voxels[np.newaxis], affine))


def verdict(expected: Sequence[Right | Rejected], answer: list[Volume] | str) -> str:
    """Say in which of the four ways a case ended."""
    left = [item for item in expected if isinstance(item, Right)]
    reasons = {name for item in expected if isinstance(item, Rejected) for name in item.reasons}
    volumes = [] if isinstance(answer, str) else answer
    if len(left) > 1:  # several volumes of a series may come as one array of four axes
        volumes = [part for volume in volumes for part in _parts(volume)]
    wanted = len(left)
    wrong = 0
    for volume in volumes:
        match = next((right for right in left if is_right(volume, right)), None)
        if match is not None:
            left.remove(match)
        elif reasons & NEVER_RIGHT or not (reasons & POLICY or lies_right(volume)):
            wrong += 1
    if wrong:
        return "silently wrong"
    if left:
        return "missed"
    return "right" if wanted or volumes else "rightly refused"


def _parts(volume: Volume) -> list[Volume]:
    voxels, affine = volume
    if voxels.ndim != 4:
        return [volume]
    return [(voxels[..., number], affine) for number in range(voxels.shape[-1])]


def of_medssl(case: Case, folder: Path, out: Path, expected: Sequence[Right | Rejected]) -> str:
    """Say in which way a case ended for medssl, whose reason codes are checked as well."""
    index = index_case(folder, out, case.settings)
    scans = [read_scan(index, str(key)) for key in index.accepted["scan_key"]]
    volumes = [(np.moveaxis(scan.voxels_CXYZ, 0, -1), scan.affine) for scan in scans]
    if not differences(index, tuple(expected)):
        return "right" if volumes else "rightly refused"
    end = verdict(expected, volumes)
    return "missed" if end in ("right", "rightly refused") else end


def compare(
    cases: Sequence[Case], readers: dict[str, tuple[str, object]]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return how each case ended for each reader, and which readers are not installed."""
    absent = [name for name, (package, _) in readers.items() if not is_installed(package)]
    workers = {
        name: Worker(read)  # type: ignore[arg-type]
        for name, (_, read) in readers.items()
        if name not in absent
    }
    ends: dict[str, dict[str, str]] = {}
    try:
        for case in cases:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "archive"
                folder.mkdir()
                try:
                    expected = case.build(folder)
                except pytest.skip.Exception:
                    continue
                ends[case.name] = {"medssl": of_medssl(case, folder, Path(place, "i"), expected)}
                for name, worker in workers.items():
                    ends[case.name][name] = verdict(expected, worker.read(folder))
    finally:
        for worker in workers.values():
            worker.close()
    return ends, absent


def table(title: str, ends: dict[str, dict[str, str]], absent: Sequence[str]) -> str:
    """Return the counts of each reader as a Markdown table."""
    names = list(next(iter(ends.values())))
    lines = [
        f"| {title} ({len(ends)} cases) | {' | '.join(ENDS)} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in names:
        counts = Counter(row[name] for row in ends.values())
        lines.append(f"| {name} | " + " | ".join(str(counts[end]) for end in ENDS) + " |")
    lines += [f"| {name} | not installed | | | |" for name in absent]
    return "\n".join(lines)


def run(out: Path) -> str:
    """Compare all readers on all cases, write one CSV file each, and return the tables."""
    out.mkdir(parents=True, exist_ok=True)
    tables = []
    for title, cases, readers in (
        ("DICOM", DICOM_CASES, DICOM_READERS),
        ("NIfTI", NIFTI_CASES, NIFTI_READERS),
    ):
        ends, absent = compare(cases, dict(readers))
        tables.append(table(title, ends, absent))
        with (out / f"{title.lower()}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            names = list(next(iter(ends.values())))
            writer.writerow(["case", *names])
            writer.writerows([case, *(row[name] for name in names)] for case, row in ends.items())
    text = "\n\n".join(tables) + "\n"
    (out / "summary.md").write_text(text)
    return text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hostile_corpus_through_other_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(tmp_path / "readers")
    with capsys.disabled():
        print(f"\n{text}")
    assert "| medssl |" in text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    print(run(parser.parse_args().out))
