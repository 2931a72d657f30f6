"""Write the config of a first study, with a comment wherever a number was chosen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medssl.config import validate_config
from medssl.pipelines.new_study import Plan, labelled_numbers
from medssl.pipelines.pretrain import PretrainConfig
from medssl.pipelines.study import StudyConfig

_FEW_PATIENTS = 30
"""With fewer, nine are for testing or less, and intervals are wide."""


@dataclass(frozen=True)
class _Scale:
    """How much is computed."""

    steps: int
    batch: int
    tune_steps: int
    tune_batch: int
    seeds: tuple[int, ...]


_LOOK = {2: _Scale(300, 16, 80, 12, (0,)), 3: _Scale(100, 8, 40, 4, (0,))}
_FULL_CPU = {2: _Scale(3000, 16, 200, 12, (0, 1, 2)), 3: _Scale(1000, 8, 100, 4, (0, 1, 2))}
_FULL_GPU = {
    2: _Scale(20_000, 32, 300, 32, (0, 1, 2, 3, 4)), 3: _Scale(10_000, 16, 300, 8, (0, 1, 2, 3, 4))
}  # fmt: skip
_LARGEST_CROP = {("look", 2): 96, ("full", 2): 160, ("look", 3): 32, ("full", 3): 64}
_LARGEST_TUNED = {("look", 2): 160, ("full", 2): 256, ("look", 3): 48, ("full", 3): 96}
_SAFETY = 0.9  # scans that were not measured may be smaller
_LEAST_CROP = 16


def config_text(plan: Plan, path: Path) -> str:
    """Return the whole config file.

    Args:
        plan: what was chosen.
        path: where the file will be; its header says so.

    Raises:
        ConfigError: the text does not fit its own schema, which no folder should bring about.
    """
    text = _pretrain_text(plan, path) if plan.labels.task == "none" else _study_text(plan, path)
    kind = PretrainConfig if plan.labels.task == "none" else StudyConfig
    validate_config(yaml.safe_load(text), kind, source=path.name)
    return text


def next_commands(plan: Plan, path: Path) -> list[str]:
    """Return what to run next."""
    file = shlex.quote(str(path))
    if plan.labels.task != "none":
        return [f"medssl study {file} --dry-run", f"medssl study {file}"]
    run = f"medssl pretrain {file} --out {shlex.quote(f'runs/{plan.name}')}"
    return [_index_command(plan), f"{run} --dry-run", run]


def index_folder(plan: Plan) -> Path:
    """Return where the index of a pretraining lies."""
    return Path("data") / f"index_{plan.name}"


def _index_command(plan: Plan) -> str:
    words = ["medssl", "index", str(plan.layout.scans)]
    if plan.patients is not None:
        words.append(f"patients={_flow(_patients(plan))}")
    if plan.layout.exclude:
        words.append(f"exclude={_flow(list(plan.layout.exclude))}")
    return shlex.join([*words, "--out", str(index_folder(plan))])


def _study_text(plan: Plan, path: Path) -> str:
    scale, numbers = _scale(plan), labelled_numbers(plan.measures.num_patients, plan.effort)
    lines = [
        f"# medssl study {shlex.quote(str(path))}",
        *_facts(plan),
        f"name: {_flow(plan.name)}",
        f"seed: 0{'':32}# everything random derives from it",
        "index:",
        *(f"  {line}" for line in _index_lines(plan)),
        *_middle(plan, plan.typical, _LARGEST_TUNED),
        "pretrain:",
        _note(f"  sampling: {_flow(_sampling(plan, _pretrain_crop(plan)))}",
              "square, inside every scan: rotation needs that"),
        f"  training: {_flow(_training(scale.steps, scale.batch))}",
        "inits:                                  # what is compared",
        "  random: {init: random}",
        _note(f"  imagenet: {{init: {_imagenet(plan)}}}", "the reference of every verdict"),
        "  rotation: {init: random, pretext: {name: rotation, views: 2}}",
        f"  inpainting: {{init: random, pretext: {_inpainting(plan)}}}",
        f"  continued: {{init: {_imagenet(plan)}, pretext: {_inpainting(plan)}}}",
        "tasks:",
        f"  - {_flow(_task(plan))}",
        "protocols:",
        f"  - {_flow(_probe(plan))}",
        "  - name: fine_tune",
        f"    training: {_flow(_training(scale.tune_steps, scale.tune_batch, rate=1.0e-3))}",
        _note(f"matrix: {{labelled_patients: {_flow(numbers)}, seeds: {_flow(list(scale.seeds))}}}",
              "5 seeds make a verdict to lean on" if len(scale.seeds) < 5 else ""),
        _note("splits: {val_fraction: 0.2, test_fraction: 0.3}", "by patient; the rest trains"),
        _note(f"device: {plan.device}", "auto takes the GPU where there is one"),
        _note("include_images: false", "true puts pictures of patients into the report"),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _pretrain_text(plan: Plan, path: Path) -> str:
    scale = _scale(plan)
    lines = [
        f"# {_index_command(plan)}",
        f"# medssl pretrain {shlex.quote(str(path))} --out {shlex.quote(f'runs/{plan.name}')}",
        *_facts(plan),
        "# Without labels nothing can be compared: this pretrains a backbone. With labels for some",
        "# patients, medssl init FOLDER --labels TABLE_OR_MASKS writes a study.",
        f"seed: 0{'':32}# everything random derives from it",
        _note(f"index: {_flow(str(index_folder(plan)))}", "the first command above writes it"),
        *_middle(plan, plan.sizes, _LARGEST_CROP),
        f"init: {_imagenet(plan)}",
        f"pretext: {_inpainting(plan)}",
        f"training: {_flow(_training(scale.steps, scale.batch))}",
        _note("splits: {val_fraction: 0.2, test_fraction: 0.3}",
              "test patients stay out, for a later study"),
        _note(f"device: {plan.device}", "auto takes the GPU where there is one"),
        _note("include_images: false", "true puts pictures of patients into the report"),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _middle(plan: Plan, sizes: Sequence[int], largest: dict[tuple[str, int], int]) -> list[str]:
    """Return the lines that both kinds of config have: scans, crops, backbone."""
    kept = [plan.measures.dims]
    select: dict[str, Any] = {"dims": kept, "num_channels": plan.measures.num_channels}
    if plan.measures.modality:
        select["modalities"] = [plan.measures.modality]
    own = " x ".join(f"{value:.3g}" for value in plan.measures.spacing_mm)
    most = largest[plan.effort, plan.crop_dims]
    if plan.labels.task == "none":
        crop = _pretrain_crop(plan)
    else:
        crop = [min(most, _down(size)) for size in sizes]
    measured = " x ".join(map(str, plan.typical))
    family, variant = plan.backbone.split(":")
    backbone: dict[str, Any] = {"name": family, "variant": variant}
    if plan.crop_dims == 3:
        backbone = {"name": "inflated", "backbone": backbone}
    always = plan.measures.is_mixed or plan.measures.num_channels != 1
    return [
        *([_note(f"select: {_flow(select)}", "the most frequent kind; there are others")]
          if always else []),
        _note(f"preprocessing: {{spacing_mm: {_flow(list(plan.spacing_mm))}}}",
              f"X, Y, Z; the scans' median is {own}"),
        _note(f"sampling: {_flow(_sampling(plan, crop))}", f"of about {measured} voxels, prepared"),
        _note(f"backbone: {_flow(backbone)}",
              "2D weights inflated to 3D" if plan.crop_dims == 3 else ""),
    ]  # fmt: skip


def _facts(plan: Plan) -> list[str]:
    measures = plan.measures
    kind = ", ".join(word for word in (measures.modality, measures.dims) if word)
    kind = f"{'mostly' if measures.is_mixed else 'all'} {kind}"
    looked = f"{measures.num_scans} scans were looked at ({kind})"
    lines = [f"# Written by medssl init: {looked}, of {measures.num_patients} patients."]
    if plan.effort == "look":
        lines.append("# A first look, few steps and one seed: for a verdict, --effort full.")
    if measures.num_patients < _FEW_PATIENTS:
        lines.append('# So few patients give wide intervals: expect "no difference shown".')
    if not plan.is_here:
        lines.append(f"# ImageNet weights are fetched once: medssl weights fetch {plan.backbone}")
    return lines


def _index_lines(plan: Plan) -> list[str]:
    lines = [f"folder: {_flow(str(plan.layout.scans))}"]
    if plan.layout.exclude:
        lines.append(_note(f"exclude: {_flow(list(plan.layout.exclude))}", "masks are no scans"))
    if plan.patients is not None:
        lines.append(_note(f"patients: {_flow(_patients(plan))}", "whose the scans are"))
    return lines


def _patients(plan: Plan) -> dict[str, Any]:
    if plan.patients is None:
        return {}
    content: dict[str, Any] = plan.patients.model_dump(
        mode="json", exclude_none=True, exclude_defaults=True
    )
    return content


def _task(plan: Plan) -> dict[str, Any]:
    labels = plan.labels
    content: dict[str, Any] = {"name": labels.task}
    if labels.task == "segmentation":
        return content | {"masks": str(labels.path), "classes": list(labels.classes)}
    if labels.table is None:
        raise ValueError("a task of a table needs one")
    return content | {
        "table": str(labels.path), "by": labels.table.by, "id_column": labels.table.id_column,
        "label_column": labels.column,
    }  # fmt: skip


def _probe(plan: Plan) -> dict[str, Any]:
    sliced = plan.crop_dims == 2 and plan.measures.dims == "3D"
    return {"name": "linear_probe"} | ({"max_slices": 8} if sliced else {})


def _training(steps: int, batch: int, rate: float = 2.0e-3) -> dict[str, Any]:
    part = max(1, steps // 4)
    return {
        "steps": steps, "global_batch_size": batch, "learning_rate": rate,
        "warmup_steps": max(1, steps // 10), "validate_every": part, "checkpoint_every": part,
    }  # fmt: skip


def _scale(plan: Plan) -> _Scale:
    if plan.effort == "look":
        return _LOOK[plan.crop_dims]
    return (_FULL_CPU if plan.device == "cpu" else _FULL_GPU)[plan.crop_dims]


def _sampling(plan: Plan, crop: Sequence[int]) -> dict[str, Any]:
    return {"crop_size": list(crop)} | ({"plane": plan.plane} if plan.plane else {})


def _pretrain_crop(plan: Plan) -> list[int]:
    side = _down(int(min(plan.sizes) * _SAFETY), least=1)
    return [min(_LARGEST_CROP[plan.effort, plan.crop_dims], side)] * plan.crop_dims


def _inpainting(plan: Plan) -> str:
    """Return the task with holes that are a quarter of the crop wide, at most 16 voxels."""
    return f"{{name: inpainting, block: {max(2, min(16, _pretrain_crop(plan)[0] // 4))}}}"


def _down(size: int, least: int = _LEAST_CROP) -> int:
    """Round down to what strides divide well; small sizes to multiples of four."""
    step = 8 if size >= 32 else 4
    return max(least, size // step * step)


def _imagenet(plan: Plan) -> str:
    return "imagenet" if plan.is_here else "{name: imagenet, download: true}"


def _note(line: str, comment: str) -> str:
    return f"{line:<38}  # {comment}" if comment else line


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
