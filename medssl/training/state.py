"""All that a run needs to go on as if it had never stopped.

Sampling, augmentation, puzzles and dropout are functions of the seed and the step alone, so the
state is the step, the weights, their average, the optimiser and the loss scaler, and nothing else.

A state's file carries its own sha256 in its name (``training_state-00000300-0f3a….pt``), and the
one before it is kept until the next: a file that a dying disk or machine damaged is noticed, and
the training goes on from the earlier one.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from medssl.atomic import atomic_write, move_into_place
from medssl.errors import DataError

log = logging.getLogger(__name__)

_NOT_A_STATE = (
    RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, OSError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What torch raises for files that are cut off, of another kind, or of another network."""

_NAME = re.compile(r"training_state-(?P<step>\d{8,})-(?P<digest>[0-9a-f]{32})\.pt")
_KEPT = 2


@dataclass
class TrainingState:
    """The moving parts of one training.

    Attributes:
        network: backbone and head.
        optimizer: with its moments.
        scaler: of the loss, active under float16 only.
        average: exponential moving average of the network's weights, where one is kept.
        step: steps done.
        micro_batches: into how many parts every global batch is divided. Kept, so that a training
            goes on the same with another number of processes; 0 before the first start.
        notes: small plain values that a protocol keeps across a restart (best score so far).
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    step: int = 0
    micro_batches: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> nn.Module:
        """The network to validate and to keep: the average where there is one."""
        if self.average is None:
            return self.network
        averaged: nn.Module = self.average.module
        return averaged

    def save(self, folder: Path) -> Path:
        """Write everything to one file in a folder, atomically; keep the one before it."""
        content = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "micro_batches": self.micro_batches,
            "notes": self.notes,
        }
        draft = folder / "training_state.draft"

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:  # given a path, torch writes its name inside
                torch.save(content, stream)

        atomic_write(draft, write)
        path = folder / f"training_state-{self.step:08d}-{_digest(draft)}.pt"
        move_into_place(draft, path)
        older = [file for file in saved_states(folder) if file != path]
        for file in older[_KEPT - 1 :]:
            file.unlink(missing_ok=True)
        return path

    def resume(self, folder: Path, device: torch.device) -> bool:
        """Take up the newest whole state of a folder; return whether there was one.

        Raises:
            DataError: there are states, and each is damaged or belongs to another network.
        """
        files = saved_states(folder)
        for file in files:
            content = _read(file, device)
            if content is not None and self._take(content):
                return True
            log.warning("%s is damaged or of another network; trying the one before it", file.name)
        if files:
            raise DataError(
                f"the training states {', '.join(file.name for file in files)} cannot be taken up: "
                "they are damaged or belong to another network. Delete them to start this training "
                "anew."
            )
        return False

    def _take(self, content: Mapping[str, Any]) -> bool:
        average = content.get("average")
        if (average is None) != (self.average is None):
            return False
        try:
            self.network.load_state_dict(content["network"], strict=True)
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            if self.average is not None and average is not None:
                self.average.load_state_dict(average, strict=True)
            step, notes = int(content["step"]), dict(content["notes"])
            micro_batches = int(content["micro_batches"])
        except _NOT_A_STATE:
            return False
        self.step, self.notes, self.micro_batches = step, notes, micro_batches
        return True


def saved_states(folder: Path) -> list[Path]:
    """Return the training states of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((file for file in folder.iterdir() if _NAME.fullmatch(file.name)), reverse=True)


def discard_states(folder: Path) -> None:
    """Delete the training states of a folder: its training is finished."""
    for file in [*saved_states(folder), folder / "training_state.draft"]:
        file.unlink(missing_ok=True)


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return what a file holds if it is whole; None if not."""
    name = _NAME.fullmatch(path.name)
    try:
        if name is None or _digest(path) != name["digest"]:
            return None
        content = torch.load(path, map_location=device, weights_only=True)
    except _NOT_A_STATE:
        return None
    return content if isinstance(content, dict) else None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
