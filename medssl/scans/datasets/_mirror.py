"""Where data sets may lie already: a folder named by the user, or beside the project."""

from __future__ import annotations

import os
from pathlib import Path

from medssl.errors import MachineError

VARIABLE = "MEDSSL_DATA_MIRROR"


def find_mirror(start: Path | None = None) -> Path | None:
    """Return the folder that holds data sets, if there is one.

    That is ``MEDSSL_DATA_MIRROR`` where set (set to nothing: no mirror), else ``../shared/data``
    seen from the project that holds the working folder, or from the source tree of this package.

    Args:
        start: instead of the working folder.

    Raises:
        MachineError: the variable names a folder that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        if not named:
            return None
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise MachineError(
                f"{VARIABLE} names a folder that does not exist. Correct it, or unset it."
            )
        return folder
    here = (start or Path.cwd()).resolve()
    roots = [folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()]
    for root in [*roots[:1], Path(__file__).resolve().parents[3]]:
        folder = root.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None
