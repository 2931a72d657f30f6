"""Files of tensors that others wrote: safetensors, or pickles read without running their code."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medssl.errors import MachineError, WeightsError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A whole sha256: 64 hexadecimal digits, in lower case."""

COUNTER = "num_batches_tracked"
"""Batch norm's counter of batches: no weight, and not in the files of PyTorch before 0.4.1."""

_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
"""How PyTorch names what a pickle asks for beyond tensors and plain values."""

_DAMAGED = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What PyTorch raises as it reads a file with bytes missing or changed, which it does not check."""

_HEADER_BYTES = 9
"""A safetensors file begins with the length of its JSON header, 8 bytes, and a brace."""


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's content, 64 digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state(file: Path, section: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors, running none of the code a pickle can carry.

    Args:
        file: safetensors, or a file of ``torch.save``, which is read with ``weights_only=True``.
        section: the key under which the tensors lie; None: the file holds them and nothing else.
            Parts are divided by dots where sections are nested.

    Raises:
        WeightsError: the file or section holds anything but tensors by name, or cannot be read.
    """
    content = read_content(file)
    for part in section.split(".") if section else ():
        if not isinstance(content, Mapping) or not isinstance(content.get(part), Mapping):
            raise WeightsError(
                f"{file.name}: there is no section {section!r} of tensors. {_sections_of(content)}"
            )
        content = content[part]
    if not _is_state(content):
        raise WeightsError(
            f"{file.name}: is not a dictionary of tensors. {_sections_of(content)} "
            "Use the published file."
        )
    return dict(content)


def read_content(file: Path) -> Any:
    """Return whatever plain content a file of tensors holds; see `read_state`."""
    if _is_safetensors(file):
        try:
            return load_file(file)
        except (SafetensorError, ValueError, KeyError):
            raise WeightsError(
                f"{file.name}: cannot be read as safetensors; it is cut short, damaged, or "
                "another kind of file under that name. Fetch it again."
            ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _REFUSED.search(str(error))
        asks = f" It asks for {named[1]}." if named else ""
        raise WeightsError(
            f"{file.name}: holds more than tensors, and reading it could run foreign code.{asks} "
            "It was refused; use the published file, or convert it to safetensors where you "
            "trust it."
        ) from None
    except _DAMAGED:
        raise WeightsError(
            f"{file.name}: cannot be read as a file of tensors; it is cut short or damaged. "
            "Fetch it again."
        ) from None


def check_stated_hash(file: Path, stated: str | None) -> str:
    """Return the file's sha256.

    Args:
        file: any file.
        stated: the hash it must have, if one was stated.

    Raises:
        MachineError: there is no such file.
        WeightsError: it has another hash.
    """
    if not file.is_file():
        raise MachineError(
            f"there is no weight file at the path given (…/{file.name}). Set init.path to the file."
        )
    found = file_sha256(file)
    if stated is not None and found != stated:
        raise WeightsError(
            f"{file.name}: its sha256 begins with {found[:12]}, init.sha256 says {stated[:12]}. "
            "It is cut short or another file: fetch it again, or state the hash of this one."
        )
    return found


def fill_counters(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Keep the counters of batch norm at 0 where a file, being old, holds none of them.

    Args:
        state: tensors by the backbone's names; the counters are added to it.
        wanted: the backbone's tensors.

    Returns:
        What to report as adapted.
    """
    counters = [name for name in wanted if name.rpartition(".")[2] == COUNTER]
    if not counters or any(name in state for name in counters):
        return []
    state.update((name, torch.zeros_like(wanted[name])) for name in counters)
    return [(COUNTER, "not in the file, a count and no weight; kept at 0")]


def _is_safetensors(file: Path) -> bool:
    """Return whether a file says so by its name or, under another, by its first bytes."""
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    return (
        len(head) == _HEADER_BYTES
        and head.endswith(b"{")
        and struct.unpack("<Q", head[:8])[0] < file.stat().st_size
    )


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _sections_of(content: Any) -> str:
    """Say where in a file dictionaries of tensors are."""
    found = list(_find_sections(content))
    if not found:
        return "It holds no section of tensors by name either."
    return f"Tensors by name are in the section(s) {', '.join(found)}: set init.section to one."


def _find_sections(content: Any, prefix: str = "", depth: int = 2) -> Iterator[str]:
    if not isinstance(content, Mapping) or not depth:
        return
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping) or not value:
            continue
        if _is_state(value):
            yield f"{prefix}{key}"
        else:
            yield from _find_sections(value, f"{prefix}{key}.", depth - 1)
