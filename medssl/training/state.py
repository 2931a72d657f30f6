"""All that a run needs to go on as if it had never stopped.

Sampling, augmentation and puzzles are functions of the seed and the step alone, so the state is
the step, the weights, the optimiser and the loss scaler, and nothing else.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medssl.atomic import atomic_write
from medssl.errors import DataError

_NOT_A_STATE = (
    RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, OSError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What torch raises for files that are cut off, of another kind, or of another network."""


@dataclass
class TrainingState:
    """The moving parts of one training.

    Attributes:
        network: backbone and head.
        optimizer: with its moments.
        scaler: of the loss, active under float16 only.
        step: steps done.
        notes: small plain values that a protocol keeps across a restart (best score so far).
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write everything to one file, atomically."""
        content = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "notes": self.notes,
        }
        atomic_write(path, lambda temporary: torch.save(content, temporary))

    def load(self, path: Path, device: torch.device) -> None:
        """Take up where ``path`` left off.

        Raises:
            DataError: the file is damaged or belongs to another network.
        """
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            self.network.load_state_dict(content["network"], strict=True)
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            step, notes = int(content["step"]), dict(content["notes"])
        except _NOT_A_STATE as error:
            raise DataError(
                f"the training state {path.name} cannot be taken up ({type(error).__name__}): it "
                "is damaged or belongs to another network. Delete it to start this training anew."
            ) from None
        self.step, self.notes = step, notes
