"""What goes wrong at a user's desk: each with its exit code, its message, and a way on."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from medssl import cli
from samples import PATIENT_ID, PLANTED, UID_ROOT, linear_volume, rotation_affine, write_nifti
from studies import ROOT, SHAPE, environment, medssl, settings, write_archive, write_config

pytestmark = pytest.mark.timeout(600)


def slow(value: str) -> Any:
    """Return a parameter that `make test-all` alone takes."""
    return pytest.param(value, marks=pytest.mark.slow)


NUM_PATIENTS = 7


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Run a command through the entry point of the command line, in this process.

    It saves the ten seconds that a process takes to import torch and MONAI.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # the user's command line raises none either
            with pytest.raises(SystemExit) as end:
                cli.main()
        printed = capfd.readouterr()
        assert "Traceback" not in printed.out + printed.err
        for needle in PLANTED:
            assert needle not in printed.out + printed.err
        return Outcome(int(str(end.value.code)), printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("bad") / "archive", NUM_PATIENTS)


def brief(archive: Path, **changes: Any) -> dict[str, Any]:
    """Return the shortest study there is: two inits, one task, one cell each."""
    content = settings(archive)
    content |= {
        "inits": {"random": {"init": "random"}, "same": {"init": "random"}},
        "tasks": content["tasks"][:1],
        "protocols": [{**content["protocols"][1], "training": {"steps": 1}}],
        "matrix": {"labelled_patients": [2], "seeds": [0]},
        "tracking": {"mlflow": False},
    }
    return content | changes


@pytest.fixture
def config(archive: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the brief study, with changes, and return its file."""

    def write(**changes: Any) -> Path:
        return write_config(tmp_path / "brief.yaml", brief(archive, **changes))

    return write


def check(outcome: Outcome, code: int, *texts: str) -> None:
    assert outcome.code == code, outcome.err
    for text in texts:
        assert text in outcome.err


# ---------------------------------------------------------------------------------------- folders


def test_an_empty_folder(command: Command, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    check(command("index", "empty"), 3, "DataError: the folder to index is empty", "DICOM or NIfTI")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_of_text_files_and_the_way_on(command: Command, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("not a scan\n")
    refused = command("index", "texts")
    check(refused, 3, "none of the 3 files is a usable scan", "3 files: not_a_scan. Neither DICOM")
    write_nifti(folder / "one.nii.gz")
    accepted = command("index", "texts")
    check(accepted, 0)
    assert "1 scans (1 nifti) of 1 patients, from 1 of 4 files" in accepted.out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["index", "no/such"], 3, "there is no folder at the path given"),
        (["index", "no.yaml"], 2, "there is no config file 'no.yaml'"),
        (["study", "no.yaml"], 2, "there is no config file 'no.yaml'"),
        (["study", "."], 2, "is a folder; give a config file"),
        (["report", "no"], 3, "run folder 'no': neither results.csv nor journal.jsonl is in it"),
        (["sync", "no"], 3, "there is no journal.jsonl in it"),
        (["compare", "no"], 3, "'no' has no readable predictions.parquet"),
        (["datasets", "fetch", "hipocampus"], 2, "Did you mean 'hippocampus'?"),
        (["datasets", "verify", "no"], 3, "no"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["list", "nonsense"], 2, "is not one of"),
    ],
)
def test_wrong_paths_and_names(command: Command, arguments: list[str], code: int, text: str):
    check(command(*arguments), code, text)


def test_a_wrong_path_inside_a_config(command: Command, config: Callable[..., Path]):
    file = config(index={"folder": "no/such"})
    check(command("study", file), 3, "there is no folder at the path given as `folder`")


def test_a_run_folder_that_is_a_file(command: Command, config: Callable[..., Path], tmp_path: Path):
    (tmp_path / "taken").write_text("mine")
    refused = command("study", config(), "--out", "taken")
    check(refused, 4, "'taken' is a file, and a run needs a folder. Choose another --out.")
    below = command("study", config(), "--out", "taken/run")
    check(below, 4, "a file stands where a folder is needed", "Choose another --out")
    assert (tmp_path / "taken").read_text() == "mine"


# ------------------------------------------------------------------------------------------ scans


@pytest.mark.slow
def test_a_truncated_slice_is_named_and_the_study_goes_on(
    command: Command, archive: Path, config: Callable[..., Path], tmp_path: Path
):
    images = tmp_path / "images"
    shutil.copytree(archive / "images", images)
    files = (images / "00").iterdir()
    victim = sorted(files, key=lambda file: pydicom.dcmread(file).ImagePositionPatient[2])[4]
    victim.write_bytes(victim.read_bytes()[:-500])
    indexed = command("index", images, "--out", "index")
    check(indexed, 0)
    assert "6 scans (6 dicom) of 6 patients, from 60 of 70 files" in indexed.out
    assert "rejected 1 files: truncated_pixels. The file ends before its pixels do" in indexed.out
    assert "rejected 9 files: missing_slice." in indexed.out
    table = pd.read_parquet(tmp_path / "index" / "index.parquet")
    assert set(table["reason"]) == {"", "truncated_pixels", "missing_slice"}
    file = config(index={"folder": str(images)}, workspace=str(tmp_path / "workspace"))
    check(command("study", file), 0)
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


def test_a_nifti_of_nan(command: Command, tmp_path: Path):
    write_nifti(tmp_path / "scans" / "nan.nii.gz", np.full((8, 7, 6), np.nan, np.float32))
    check(command("index", "scans"), 3, "1 files: nan_voxels. Some voxels are not finite")
    write_nifti(tmp_path / "scans" / "good.nii.gz")
    accepted = command("index", "scans")
    check(accepted, 0)
    assert "rejected 1 files: nan_voxels." in accepted.out


def test_one_patient_only(
    command: Command, archive: Path, config: Callable[..., Path], tmp_path: Path
):
    shutil.copytree(archive / "images" / "03", tmp_path / "one" / "03")
    file = config(index={"folder": str(tmp_path / "one")}, workspace=str(tmp_path / "workspace"))
    check(command("study", file), 3, "no split possible: 1 patient found, at least 3 needed")


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.slow
def test_a_mask_of_another_shape_and_the_way_on(
    command: Command, archive: Path, config: Callable[..., Path], tmp_path: Path
):
    masks = tmp_path / "masks"
    shutil.copytree(archive / "masks", masks)
    whole = (masks / "02.nii.gz").read_bytes()
    image: Any = nib.load(masks / "02.nii.gz")
    cut = np.asarray(image.dataobj)[:, :-3]
    nib.Nifti1Image(cut, image.affine).to_filename(masks / "02.nii.gz")
    content = brief(archive)
    task = {**content["tasks"][0], "masks": str(masks)}
    file = config(tasks=[task], workspace=str(tmp_path / "workspace"))
    x, y, z = SHAPE
    check(
        command("study", file), 3, "1 of 7 scans could not be prepared:",
        f"has shape {x} x {y - 3} x {z}, the scan has {x} x {y} x {z}",
        "export it without resampling", "prepare again: the others are kept",
    )  # fmt: skip
    (masks / "02.nii.gz").write_bytes(whole)
    check(command("study", file), 0)


def labels_task(table: Path) -> dict[str, Any]:
    return {
        "name": "classification", "table": str(table), "by": "patient", "id_column": "patient",
        "label_column": "label",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "code", "text"),
    [
        (None, 2, "there is no label table 'labels.csv'"),
        ("patient,label\nstranger,a\nother,b\n", 3, "none of the 2 rows of the label table fits"),
        ("patient,diagnosis\nx,a\n", 3, "has no column 'label'. It has: patient, diagnosis."),
        ("", 3, "is neither CSV nor Parquet"),
        ("patient,label\n", 3, "none of the 0 rows of the label table fits"),
        (
            "patient,label\n" + "".join(f"{PATIENT_ID}-{n},same\n" for n in range(NUM_PATIENTS)),
            3, "classification needs two classes or more; column 'label' holds 1",
        ),
    ],
    ids=["missing", "unknown patients", "another column", "empty", "no rows", "one class"],
)  # fmt: skip
def test_tables_of_labels_that_do_not_fit(
    command: Command, config: Callable[..., Path], tmp_path: Path, table: str | None, code: int,
    text: str,
):  # fmt: skip
    if table is not None:
        (tmp_path / "labels.csv").write_text(table)
    check(command("study", config(tasks=[labels_task(tmp_path / "labels.csv")])), code, text)


@pytest.mark.slow
def test_a_study_whose_labels_were_mended_starts_with_the_same_command(
    command: Command, archive: Path, config: Callable[..., Path], tmp_path: Path
):
    wrong = {**labels_task(archive / "labels.csv"), "label_column": "lable"}
    check(command("study", config(tasks=[wrong])), 3, "has no column 'lable'")
    right = labels_task(archive / "labels.csv")
    check(command("study", config(tasks=[right])), 0)
    refused = command("study", config(tasks=[right], seed=9))
    check(refused, 2, "holds a run of another configuration: seed was 3, is 9")


# ---------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preprocesing": {}}, "unknown key (value {}). Did you mean 'preprocessing'?"),
        (
            {"preprocessing": {"spacing": [1, 1, 1]}},
            "preprocessing.spacing: unknown key (value [1, 1, 1]). Did you mean 'spacing_mm'?",
        ),
        ({"seed": "three"}, "seed: input should be a valid integer"),
        ({"sampling": {"crop_size": 24}}, "sampling.crop_size: input should be a valid tuple"),
        ({"backbone": "torchvison"}, "no backbone 'torchvison'. Did you mean 'torchvision'?"),
        (
            {"inits": {"b": {"init": "random"}, "a": {"init": "random", "pretext": "rotaton"}}},
            "inits.a.pretext: there is no pretext task 'rotaton'. Did you mean 'rotation'? There",
        ),
        ({"tasks": ["clasification"]}, "tasks.0: there is no downstream task 'clasification'. Did"),
        ({"protocols": ["knm"]}, "protocols.0: there is no protocol 'knm'."),
        (
            {"statistics": {"reference": "imagenet"}},
            "statistics.reference: 'imagenet' is not one of inits. There are: random, same.",
        ),
        ({"device": "gpu"}, "device"),
        ({"matrix": {"labelled_patients": [0]}}, "labelled_patients must be 1 or more"),
        ({"splits": {"val_fraction": 0.6, "test_fraction": 0.6}}, "add up to less than 1"),
        (
            {"sampling": {"crop_size": [24, 24, 8]}},
            "sampling.crop_size: [24, 24, 8] cuts 3D images, and the backbone monai takes 2D.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_typos_in_a_config(
    command: Command, config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any],
    text: str,
):  # fmt: skip
    check(command("study", config(**changes)), 2, text)
    assert [path.name for path in tmp_path.iterdir()] == ["brief.yaml"]


def test_a_mistake_inside_a_list_is_told_once(command: Command, config: Callable[..., Path]):
    refused = command("study", config(tasks=[{**labels_task(Path("a.csv")), "by": "patients"}]))
    check(refused, 2, "tasks.0.by: input should be 'scan', 'series' or 'patient'")
    assert "at least 1 item" not in refused.err


def test_a_reference_that_is_not_an_init_of_a_transfer(
    command: Command, archive: Path, tmp_path: Path
):
    content = brief(archive)
    kept = ("preprocessing", "sampling", "backbone", "tasks", "protocols", "matrix")
    transfer = {key: content[key] for key in kept}
    transfer |= {"index": "index", "inits": {"a": "random", "b": "random"}}
    file = write_config(tmp_path / "transfer.yaml", transfer)
    text = "statistics.reference: 'imagenet' is not one of inits. There are: a, b."
    check(command("transfer", file), 2, text)


@pytest.mark.slow
def test_a_crop_larger_than_the_scans_with_rotation_and_the_way_on(
    command: Command, config: Callable[..., Path]
):
    pretext = {"init": "random", "pretext": {"name": "rotation", "views": 2}}
    inits = {"random": {"init": "random"}, "rotation": pretext}
    large = config(inits=inits, sampling={"plane": "axial", "crop_size": [200, 200]})
    check(
        command("study", large), 3, "voxels, the task needs 200 x 200 without padding",
        "Make the crop smaller, or the voxels finer (preprocessing.spacing_mm)",
    )  # fmt: skip
    check(command("study", config(inits=inits)), 0)


def test_the_first_plan_counts_patients_and_cells_and_leaves_nothing_behind(
    command: Command, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    file = config(workspace=str(tmp_path / "workspace"))
    planned = command("study", file, "--dry-run", "--out", "elsewhere")
    check(planned, 0)
    assert "run folder: elsewhere" in planned.out
    assert "num files: 70" in planned.out
    assert "cells: 2" in planned.out
    assert "scans: 7" in planned.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brief.yaml", "temporary"]
    # What libraries keep for as long as the process lives is theirs.
    theirs = ("pymp-", "torchinductor_")
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if not name.startswith(theirs)] == []


# ---------------------------------------------------------------------------------------- machine


def test_missing_imagenet_weights_are_told_at_once_and_nothing_is_downloaded(
    command: Command, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def connect(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("torch.hub.download_url_to_file", connect)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = config(
        backbone={"name": "torchvision", "variant": "resnet18"},
        inits={"random": {"init": "random"}, "imagenet": {"init": "imagenet"}},
    )
    refused = command("study", file)
    check(
        refused, 4, "init imagenet: resnet18-f37072fd.pth is not on this machine",
        "copy resnet18-f37072fd.pth from a machine with a network into the torch hub cache",
        "set init.path to the file or its folder", "set init.download=true",
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["brief.yaml"]


HOLD_LOCK = """
import sys
from pathlib import Path
from medssl.tracking.journal import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_process_on_the_same_run_folder(
    command: Command, config: Callable[..., Path], tmp_path: Path
):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "runs" / "tiny")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        refused = command("study", config())
        holder.stdin.close()
    check(refused, 4, "another medssl process is using it", "or choose another --out")
    check(command("study", config()), 0)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a small disk, and yield what changes its size; skip where that is not permitted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    permitted = shutil.which("mount") and os.geteuid() == 0
    if not permitted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted by this user")

    def resize(to: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={to}", str(place)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("size", [slow("4k"), slow("24k"), "60k", slow("150k")])
def test_a_full_disk_under_the_workspace_and_the_way_on(
    command: Command, config: Callable[..., Path], tmp_path: Path, size: str
):
    with small_disk(tmp_path / "disk", size) as resize:
        file = config(workspace=str(tmp_path / "disk" / "workspace"))
        check(command("study", file), 4, "MachineError: ", "space")
        resize("16m")
        check(command("study", file), 0)


@pytest.mark.parametrize("size", [slow("12k"), "100k"])
def test_a_full_disk_under_the_run_folder_and_the_way_on(
    command: Command, config: Callable[..., Path], tmp_path: Path, size: str
):
    pretext = {"init": "random", "pretext": {"name": "rotation", "views": 2}}
    file = config(inits={"random": {"init": "random"}, "rotation": pretext})
    with small_disk(tmp_path / "disk", size) as resize:
        out = tmp_path / "disk" / "runs" / "tiny"
        full = command("study", file, "--out", out)
        check(full, 4, "MachineError: no space left on the disk", "start the same command again")
        assert not list(out.rglob("*.part"))
        resize("64m")
        check(command("study", file, "--out", out), 0)


@pytest.mark.slow
def test_a_full_disk_with_mlflow_on_it_and_the_way_on(archive: Path, tmp_path: Path):
    file = write_config(tmp_path / "brief.yaml", brief(archive, tracking={}))
    with small_disk(tmp_path / "disk", "100k") as resize:
        out = tmp_path / "disk" / "runs" / "tiny"
        full = medssl("study", file, "--out", out, cwd=tmp_path)
        assert "Traceback" not in full.stderr
        assert full.returncode == 4, full.stderr
        assert "no space left on the disk" in full.stderr
        resize("64m")
        again = medssl("study", file, "--out", out, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "undelivered" not in again.stderr


def test_a_fault_of_a_library_is_told_without_its_text(
    command: Command, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot read {UID_ROOT}")

    monkeypatch.setattr("medssl.pipelines.study.run", fail)
    failed = command("study", config())
    check(failed, 1, "Unforeseen RuntimeError in", "with --debug", "please report it")


def test_scans_that_differ_from_what_was_indexed(command: Command, tmp_path: Path):
    path = write_nifti(tmp_path / "scans" / "one.nii.gz", linear_volume())
    check(command("index", "scans"), 0)
    write_nifti(path, linear_volume((9, 9, 9)), rotation_affine())
    (tmp_path / "prepare.yaml").write_text("index: data/index\n")
    changed = command("prepare", "prepare.yaml")
    check(changed, 3, "its files changed after they were indexed. Run medssl index.")
    path.unlink()
    gone = command("prepare", "prepare.yaml")
    check(gone, 3, "its files are not where they were indexed")
