"""ONNX: a network for runtimes other than PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from medssl.errors import MachineError
from medssl.models.export.base import Export, Subject, check_equal
from medssl.models.export.program import describe_input

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Onnx(Export):
    """An ``.onnx`` file, weights inside, for onnxruntime and its like."""

    description: ClassVar[str] = "ONNX (model.onnx): onnxruntime and other runtimes"
    extra: ClassVar[str | None] = "onnx"

    def check(self, subject: Subject) -> None:
        """See `Export.check`."""
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise MachineError(
                f"export to ONNX needs {', '.join(missing)}, not installed here. "
                "Run: pip install 'medssl[onnx]'."
            )

    def files(self, subject: Subject) -> tuple[str, ...]:
        """See `Export.files`."""
        return (FILE,)

    def write(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """See `Export.write`."""
        file = folder / FILE
        captured = subject.captured
        axes: dict[int, str] = {0: "batch"}
        if captured.sizes == "any":
            axes.update(zip(range(2, captured.example.ndim), "xyz", strict=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            written = torch.onnx.export(
                captured.program,
                (captured.example,),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=list(subject.output_names()),
                dynamic_shapes={"image": axes},
            )
            cast("Any", written).save(file, external_data=False)
        worst, opset = _compare(subject, file)
        return {"images": captured.rule, "opset": opset, "largest_difference": worst}

    def usage(self, subject: Subject) -> str:
        """See `Export.usage`."""
        return f"""`{FILE}` needs onnxruntime, or another runtime of ONNX.

```python
import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
(embedding,) = session.run(["embedding"], {{"image": images}})  # {describe_input(subject)}
```

Outputs: {", ".join(f"`{name}`" for name in subject.output_names())}. It takes
{subject.captured.rule}.
"""


def _compare(subject: Subject, file: Path) -> tuple[float, int]:
    """Run the file in onnxruntime; return the largest difference, and the version of operators."""
    import onnx
    import onnxruntime

    content = file.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = list(subject.output_names())
    worst = 0.0
    for batch, size in subject.captured.trial_sizes():
        images = subject.sample_images(batch, size)
        answers = session.run(names, {"image": images.numpy()})
        found: dict[str, Tensor] = {
            name: torch.from_numpy(answer) for name, answer in zip(names, answers, strict=True)
        }
        worst = max(worst, check_equal(found, subject.answers(images), file.name))
    opsets = onnx.load_from_string(content).opset_import
    return worst, next(int(entry.version) for entry in opsets if not entry.domain)
