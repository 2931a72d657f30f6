"""Other readers, each in a process of its own that may hang, crash or run out of memory."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = tuple[npt.NDArray[Any], npt.NDArray[np.float64]]
"""Voxels as the reader gives them, and the affine to RAS mm."""

SECONDS = 30.0
MAX_BYTES = 8 * 2**30
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def folders(root: Path) -> Iterator[Path]:
    """Yield every folder that holds files."""
    for here, _, names in sorted(os.walk(root)):
        if names:
            yield Path(here)


def nifti_files(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in root.rglob("*") if path.suffix != ".json")


def monai_reader(name: str, places: Callable[[Path], Iterator[Path]], root: Path) -> list[Volume]:
    from monai.transforms import LoadImage

    load = LoadImage(reader=name, image_only=True)
    found = []
    for place in places(root):
        image = load(str(place))
        found.append((np.asarray(image.array), np.asarray(image.affine, dtype=np.float64)))
    return found


def monai_pydicom(root: Path) -> list[Volume]:
    return monai_reader("PydicomReader", folders, root)


def monai_itk(root: Path) -> list[Volume]:
    return monai_reader("ITKReader", folders, root)


def monai_nibabel(root: Path) -> list[Volume]:
    return monai_reader("NibabelReader", nifti_files, root)


def simple_itk_volume(image: Any) -> Volume:
    import SimpleITK

    size = image.GetDimension()
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(size, size)
    depth = min(3, size)
    affine[:depth, :depth] = (directions * np.array(image.GetSpacing()))[:depth, :depth]
    affine[:depth, 3] = image.GetOrigin()[:depth]
    voxels = SimpleITK.GetArrayFromImage(image)
    num_axes = size
    order = (*range(num_axes)[::-1], *range(num_axes, voxels.ndim))
    return voxels.transpose(order), _RAS_FROM_LPS @ affine


def simple_itk_series(root: Path) -> list[Volume]:
    import SimpleITK

    found = []
    for folder in folders(root):
        reader = SimpleITK.ImageSeriesReader()
        for series in reader.GetGDCMSeriesIDs(str(folder)):
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
            found.append(simple_itk_volume(reader.Execute()))
    return found


def simple_itk_nifti(root: Path) -> list[Volume]:
    import SimpleITK

    return [simple_itk_volume(SimpleITK.ReadImage(str(path))) for path in nifti_files(root)]


def converted(folder: Path) -> list[Volume]:
    """Return the NIfTI files that a converter wrote."""
    import nibabel as nib

    found = []
    for path in sorted(folder.rglob("*.nii*")):
        image: Any = nib.load(path)
        voxels = np.asarray(image.dataobj)
        if voxels.dtype.names:
            voxels = np.stack([voxels[name] for name in voxels.dtype.names], axis=-1)
        found.append((voxels, np.array(image.affine)))
    return found


def dicom2nifti_folder(root: Path) -> list[Volume]:
    import dicom2nifti

    with tempfile.TemporaryDirectory() as out:
        dicom2nifti.convert_directory(str(root), out, compression=False, reorient=False)
        return converted(Path(out))


def dcm2niix_folder(root: Path) -> list[Volume]:
    import dcm2niix

    with tempfile.TemporaryDirectory() as out:
        command = [dcm2niix.bin, "-z", "n", "-b", "n", "-f", "%s_%j", "-o", out, str(root)]
        run = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        found = converted(Path(out))
        if run.returncode and not found:
            raise RuntimeError(f"dcm2niix ended with {run.returncode}")
        return found


DICOM_READERS: dict[str, tuple[str, Callable[[Path], list[Volume]]]] = {
    "MONAI PydicomReader": ("monai", monai_pydicom),
    "MONAI ITKReader": ("itk", monai_itk),
    "SimpleITK series reader": ("SimpleITK", simple_itk_series),
    "dicom2nifti": ("dicom2nifti", dicom2nifti_folder),
    "dcm2niix": ("dcm2niix", dcm2niix_folder),
}
NIFTI_READERS: dict[str, tuple[str, Callable[[Path], list[Volume]]]] = {
    "MONAI NibabelReader": ("monai", monai_nibabel),
    "SimpleITK": ("SimpleITK", simple_itk_nifti),
}


def is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


class Worker:
    """One process that reads with one reader; a new one takes its place when it is lost."""

    def __init__(self, read: Callable[[Path], list[Volume]]) -> None:
        self._read = read
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._read, other), daemon=True)
        self._process.start()
        other.close()

    def read(self, folder: Path) -> list[Volume] | str:
        """Return what the reader returned, or how it failed."""
        try:
            self._pipe.send(folder)
            if self._pipe.poll(SECONDS):
                result: list[Volume] | str = self._pipe.recv()
                return result
            failure = "hung"
        except (EOFError, OSError):
            failure = "crashed"
        self.close()
        self._start()
        return failure

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(read: Callable[[Path], list[Volume]], pipe: Connection) -> None:
    """Read folder after folder; runs in the process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries in C write past sys.stdout
        os.dup2(silence, stream)
    with contextlib.suppress(EOFError):
        while True:
            folder = pipe.recv()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer: list[Volume] | str = read(folder)
            except Exception as error:  # noqa: BLE001  (readers fail in any way)
                answer = f"error: {type(error).__name__}"
            pipe.send(answer)
