"""A MONAI bundle: the network with the preparation of its images, run by MONAI's own command.

The network is an ExportedProgram. TorchScript, which older bundles carry, is deprecated in PyTorch
and traces one image size; a network definition of MONAI or torchvision exists for few backbones,
and would leave out normalisation and stages. An ExportedProgram holds all of it, holds no code to
unpickle, and is opened by PyTorch alone, so that the bundle runs where medssl is not installed.
MONAI's evaluator is not used: it needs the package ignite, and calls ``eval()``, which an
ExportedProgram, always in evaluation mode, does not have.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from medssl import __version__
from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.models.export._monai_transforms import check_expressible, monai_transforms
from medssl.models.export.base import EMBEDDING, Export, Subject
from medssl.models.export.program import write_program
from medssl.transforms.preprocessing import PreprocessingConfig

FOLDER = "bundle"
CONFIG, METADATA = "configs/inference.json", "configs/metadata.json"
NETWORK, DOCUMENT = "models/model.pt2", "docs/README.md"
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/"
    "0.8.1/meta_schema_20240725.json"
)
"""The schema that MONAI's own bundles name; ``monai.bundle verify_metadata`` downloads it."""

_IMPORTS = (
    "glob", "os", "monai", "numpy", "scipy", "scipy.ndimage", "torch", "torch.export.passes",
)  # fmt: skip

_REQUIRED = ("nibabel", "scipy")


class Bundle(Export):
    """A folder that ``python -m monai.bundle run`` takes."""

    description: ClassVar[str] = "MONAI bundle (bundle/): network and preparation, run by MONAI"

    def check(self, subject: Subject) -> None:
        """See `Export.check`."""
        check_expressible(subject.contract, _preprocessing(subject), subject.values)

    def files(self, subject: Subject) -> tuple[str, ...]:
        """See `Export.files`."""
        return tuple(f"{FOLDER}/{name}" for name in (CONFIG, METADATA, NETWORK, DOCUMENT))

    def write(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """See `Export.write`."""
        root = folder / FOLDER
        for name in (CONFIG, NETWORK, DOCUMENT):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        _write_json(root / CONFIG, inference(subject))
        _write_json(root / METADATA, describe(subject))
        (root / DOCUMENT).write_text(_document(subject, self.usage(subject)), encoding="utf-8")
        difference = write_program(subject, root / NETWORK)
        return {"images": subject.captured.rule, "largest_difference": difference}

    def usage(self, subject: Subject) -> str:
        """See `Export.usage`."""
        each = "slice" if subject.contract.spatial_dims == 2 else "image"
        return f"""`{FOLDER}/` needs MONAI with nibabel, scipy and fire, and no medssl.

```
cd {FOLDER}
python -m monai.bundle run --config_file {CONFIG} --meta_file {METADATA} \\
  --bundle_root . --dataset_dir /folder/of/nifti --output_dir /folder/for/features
```

It prepares every `*.nii.gz` of the folder as the backbone's own scans were prepared, and writes
one `.npz` each with the array `{EMBEDDING}`, one row for each {each}. More outputs:
`--outputs "['{subject.backbone.stages[-1].name}', '{EMBEDDING}']"`.
"""


def inference(subject: Subject) -> dict[str, Any]:
    """Return the content of ``inference.json``.

    Raises:
        ConfigError: MONAI cannot prepare images as the contract wants them.
    """
    transforms = monai_transforms(subject.contract, _preprocessing(subject), subject.values)
    return {
        "imports": [f"$import {name}" for name in _IMPORTS],
        "bundle_root": ".",
        "dataset_dir": "./images",
        "pattern": "*.nii.gz",
        "output_dir": "./features",
        "outputs": [EMBEDDING],
        "batch_size": 16,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "files": "$sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))",
        "network_def": (
            "$torch.export.passes.move_to_device_pass("
            f"torch.export.load(os.path.join(@bundle_root, '{NETWORK}')), str(@device)).module()"
        ),
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @files]",
            "transform": "@preprocessing",
        },
        "inferer": (
            "$lambda images_BC, network=@network_def, device=@device, size=@batch_size: "
            "[network(part.to(device)) for part in images_BC.split(size)]"
        ),
        "postprocessing": (
            "$lambda answers, names=@outputs: "
            "{name: torch.cat([answer[name] for answer in answers]).cpu().numpy() "
            "for name in names}"
        ),
        "save": (
            "$lambda file, item, folder=@output_dir, infer=@inferer, arrange=@postprocessing: "
            "numpy.savez(os.path.join(folder, os.path.basename(file).split('.nii')[0] + '.npz'), "
            "**arrange(infer(item['image'])))"
        ),
        "run": [
            "$os.makedirs(@output_dir, exist_ok=True)",
            "$torch.set_grad_enabled(False)",
            "$[save(file, item) for save in [@save] for file, item in zip(@files, @dataset)]",
        ],
    }


def describe(subject: Subject) -> dict[str, Any]:
    """Return the content of ``metadata.json``, with the fields of MONAI's schema."""
    contract, backbone = subject.contract, subject.backbone
    dims = contract.spatial_dims
    pretext = (contract.pretext or {}).get("name", "none")
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medssl {__version__}"},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch").partition("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {name: metadata.version(name) for name in _REQUIRED},
        "name": f"medssl {subject.title}",
        "task": "Feature extraction by a self-supervised backbone",
        "description": (
            f"Backbone {backbone.describe()}, pretext task {pretext}: features of every stage, and "
            "one vector for each image or slice."
        ),
        "authors": "see docs/README.md",
        "copyright": "see docs/README.md",
        "license": subject.licence or "see docs/README.md",
        "data_source": f"{len(contract.patients)} patients; index {contract.index_digest[:12]}",
        "data_type": "nifti",
        "intended_use": "Research. Not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": backbone.in_channels,
                    "spatial_shape": ["*"] * dims,
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {str(n): "image" for n in range(backbone.in_channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "feature",
                    "format": "embedding",
                    "num_channels": backbone.embedding_channels,
                    "spatial_shape": [],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {"0": "features"},
                }
            },
        },
    }


def _preprocessing(subject: Subject) -> PreprocessingConfig:
    if subject.preprocessing is None:
        raise ConfigError(
            "nobody knows in full how the scans of this checkpoint were prepared: its contract is "
            "of an older medssl, and no run folder with a config.yaml lies around it. Export from "
            "the run folder, or use the formats onnx or program."
        )
    return validate_config(subject.preprocessing, PreprocessingConfig, source="preprocessing")


def _document(subject: Subject, usage: str) -> str:
    config = _preprocessing(subject)
    each = (
        f"Volumes are cut into {subject.contract.plane} slices, whole."
        if subject.contract.spatial_dims == 2
        else "Volumes are taken whole, not in patches."
    )
    values = {
        "hu": "calibrated CT: values in HU, scaled by a window",
        "arbitrary": "not calibrated, scaled by percentiles",
        None: "scaled as the contract says",
    }[subject.values]
    return f"""# {subject.title}: a MONAI bundle

{usage.replace(f"cd {FOLDER}", "cd <this folder>")}
## What it expects, and what it does not do

- NIfTI files, one 3D image each, with {subject.backbone.in_channels} channel(s). Images are
  {values}.
- {each} They may have {subject.captured.rule}, after resampling to
  {config.spacing_mm or "their own spacing (none is set)"} mm.
- It reads with nibabel. medssl checks geometry, burned-in text and much else before it prepares a
  scan; the bundle checks nothing of it. Colour images and cines are not for it.
- Two steps are expressions and no transform of MONAI's, as MONAI's own would give other images:
  the blur before voxels get coarser (MONAI's pads with zeros), and the crop of the foreground, of
  which the margin follows each image's spacing.
- Expressions in `{CONFIG}` run as Python: read the file before you run a bundle from a stranger.
- There is no evaluator of ignite; `run` loops over the data set itself.
- `monai.bundle verify_metadata` downloads the schema that `{METADATA}` names, and so
  needs a network.

{subject.card}"""


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
