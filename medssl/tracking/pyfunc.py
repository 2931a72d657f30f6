"""Backbones as MLflow models: a folder with the code to run, the weights, and what goes in.

The folder is written without a server (`write_model`) and registered later. Nothing in it is
pickled: its code is a file that is run (`serve`), its weights are safetensors, and its
ExportedProgram is one that MLflow loads with ``MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.tracking.client import prepare_environment

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT = "checkpoint"
"""Name of the artifact, and of the folder below ``artifacts/``, that holds weights and contract."""

PROGRAM = Path("data") / "model.pt2"
"""Where MLflow's flavour ``pytorch`` keeps an ExportedProgram."""

PATH_COLUMN, IMAGE_COLUMN = "path", "image"

Predict = Callable[["pd.DataFrame"], "pd.DataFrame"]


@dataclass(frozen=True)
class Pieces:
    """What an MLflow model is made of.

    Attributes:
        code: a file that calls `serve`.
        checkpoint: folder with ``backbone.safetensors``, ``contract.json`` and what ``code`` needs.
        program: an ExportedProgram of the backbone; None where it cannot be captured.
        example: images that may be given, (B, C, *S) as nested lists, B at least 2.
        requirements: of pip; nothing is inferred, as that would need a network.
        metadata: facts for whoever looks at the model.
    """

    code: Path
    checkpoint: Path
    program: Path | None
    example: Sequence[Any]
    requirements: Sequence[str]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def serve(load: Callable[[Path], Predict]) -> None:
    """Make the file that calls this the code of an MLflow model.

    Args:
        load: takes the folder of the checkpoint; returns what answers a table of inputs.
    """
    prepare_environment()
    with quiet_mlflow():
        from mlflow.models import set_model
        from mlflow.pyfunc.model import PythonModel

        class Served(PythonModel):  # type: ignore[misc,unused-ignore]
            _skip_type_hint_validation = True  # MLflow would ask for types; a signature is given

            def load_context(self, context: Any) -> None:
                self._predict = load(Path(context.artifacts[CHECKPOINT]))

            # Without types, which MLflow would take for the signature.
            def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
                del context, params
                return self._predict(model_input)

    set_model(Served())


def write_model(folder: Path, pieces: Pieces) -> None:
    """Write an MLflow model with the flavours ``python_function`` and, with a program, ``pytorch``.

    Args:
        folder: must not exist yet.
        pieces: what goes into it.
    """
    prepare_environment()
    import pandas as pd

    with quiet_mlflow():
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    # One signature holds either columns or tensors, and this model takes a path or an array.
    inputs: list[Any] = [
        ColSpec(DataType.string, PATH_COLUMN, required=False),
        ColSpec(AnyType(), IMAGE_COLUMN, required=False),
    ]
    counts = [ColSpec(DataType.long, name) for name in ("row", "scan", "num_images")]
    outputs: list[Any] = [*counts, ColSpec(Array(DataType.double), "features")]
    model = Model()
    with quiet_mlflow():
        save_model(
            folder,
            mlflow_model=model,
            python_model=str(pieces.code),
            artifacts={CHECKPOINT: str(pieces.checkpoint)},
            signature=ModelSignature(Schema(inputs), Schema(outputs)),
            input_example=pd.DataFrame({IMAGE_COLUMN: list(pieces.example)}),
            pip_requirements=list(pieces.requirements),
            metadata=dict(pieces.metadata),
        )
    if pieces.program is not None:
        (folder / PROGRAM).parent.mkdir(parents=True, exist_ok=True)
        pieces.program.replace(folder / PROGRAM)
        import torch

        model.add_flavor(
            "pytorch",
            model_data=PROGRAM.parent.as_posix(),
            pytorch_version=str(torch.__version__),
            serialization_format="pt2",
            code=None,
        )
        model.save(str(folder / "MLmodel"))
    _forget_places(folder)


def _forget_places(folder: Path) -> None:
    """Take out of ``MLmodel`` where code and artifacts lay on this machine before."""
    import yaml

    file = folder / "MLmodel"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    function = content["flavors"]["python_function"]
    function["model_code_path"] = Path(function["model_code_path"]).name
    for artifact in function["artifacts"].values():
        artifact["uri"] = artifact["path"]
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Keep MLflow's remarks about itself, its imports and its types from the reader."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
