"""ExportedProgram: PyTorch's own format of a network without its Python code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from medssl.models.export.base import Export, Subject, check_equal

FILE = "model.pt2"


class Program(Export):
    """A ``.pt2`` file, for PyTorch without medssl."""

    description: ClassVar[str] = "PyTorch ExportedProgram (model.pt2): PyTorch without medssl"

    def files(self, subject: Subject) -> tuple[str, ...]:
        """See `Export.files`."""
        return (FILE,)

    def write(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """See `Export.write`."""
        difference = write_program(subject, folder / FILE)
        return {"images": subject.captured.rule, "largest_difference": difference}

    def usage(self, subject: Subject) -> str:
        """See `Export.usage`."""
        return f"""`{FILE}` needs PyTorch alone (written by {torch.__version__.partition("+")[0]}).

```python
import torch

network = torch.export.load("{FILE}").module()
outputs = network(images)  # {describe_input(subject)}
embedding = outputs["embedding"]
```

Outputs: {", ".join(f"`{name}`" for name in subject.output_names())}. It takes
{subject.captured.rule}. For a GPU, give the loaded program to
`torch.export.passes.move_to_device_pass` before `.module()`. It is for inference, not training.
"""


def write_program(subject: Subject, file: Path) -> float:
    """Write the captured backbone, read it back, and return the largest difference.

    Raises:
        WeightsError: it does not answer as the backbone does; the file is removed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        torch.export.save(subject.captured.program, file)
        network = torch.export.load(file).module()
    worst = 0.0
    for batch, size in subject.captured.trial_sizes():
        images = subject.sample_images(batch, size)
        with torch.no_grad():
            found = network(images)
        worst = max(worst, check_equal(found, subject.answers(images), file.name))
    return worst


def describe_input(subject: Subject) -> str:
    """Return what goes in, in the words of a comment: shape, type, range."""
    axes = "X, Y, Z" if subject.backbone.spatial_dims == 3 else "X, Y"
    return f"(B, {subject.backbone.in_channels}, {axes}), float32, in [0, 1]"
