"""A run folder with invented numbers of a realistic shape, to build reports from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.evaluation.statistics import compare, estimate, labels_saved, learning_curves, power
from medssl.reports.panels import save_panels
from medssl.tracking.base import Tracker, TrackingConfig

GAINS = {"random": -0.035, "imagenet": 0.0, "rotation": 0.003, "inpainting": 0.02}
LABELLED = {3: 0.04, 10: 0.13, 78: 1.0}
LAYERS = ("stem", "stage1", "stage2", "stage3", "stage4")
CONFIG = """\
name: hippocampus
seed: 0
backbone: {name: timm, variant: efficientnet_lite0}
inits: {random: {init: random}, imagenet: {init: imagenet}, rotation: {pretext: rotation}}
matrix: {seeds: [0, 1, 2]}
statistics: {reference: imagenet, num_resamples: 10000, alpha: 0.05}
include_images: true
"""

BASELINES = pd.DataFrame(
    {
        "baseline": ["position", "intensity"], "task": "hippocampus", "label_fraction": 1.0,
        "num_labelled_patients": 78, "metric": "dice", "value": [0.86, 0.3], "ci_low": [0.8, 0.25],
        "ci_high": [0.88, 0.35], "init": "inpainting", "protocol": "fine_tune", "init_value": 0.87,
        "effect": [0.01, 0.57], "effect_low": [-0.01, 0.5], "effect_high": [0.03, 0.6],
        "p_value": [0.3, 0.0], "is_close": [True, False],
    }
)  # fmt: skip


def predictions(num_patients: int = 45, seeds: tuple[int, ...] = (0, 1, 2)) -> pd.DataFrame:
    """Dice of two classes: inits that differ most where labels are few."""
    generator = np.random.default_rng(7)
    difficulty = generator.normal(0, 0.05, num_patients)
    rows: list[dict[str, Any]] = []
    for num_labelled, fraction in LABELLED.items():
        level = 0.66 + 0.055 * np.log10(num_labelled) * 1.6
        weight = 1.2 / (1 + np.log10(num_labelled))
        for init, gain in GAINS.items():
            for seed in seeds:
                for protocol, layer, quality in _readouts():
                    mean = level + quality + gain * weight + generator.normal(0, 0.002)
                    dice = mean + difficulty[:, None] + generator.normal(0, 0.02, (num_patients, 2))
                    rows += [
                        {
                            "init": init,
                            "pretext": init if init in ("rotation", "inpainting") else "",
                            "backbone": "timm",
                            "task": "hippocampus",
                            "task_kind": "segmentation",
                            "protocol": protocol,
                            "layer": layer,
                            "selected": layer in ("", "stage3"),
                            "label_fraction": fraction,
                            "num_labelled_patients": num_labelled,
                            "seed": seed,
                            "patient_key": f"p{patient:04}",
                            "scan_key": f"s{patient:04}",
                            "target": np.nan,
                            "scores": list(np.clip(dice[patient], 0, 1)),
                        }
                        for patient in range(num_patients)
                    ]
    return pd.DataFrame(rows)


def _readouts() -> list[tuple[str, str, float]]:
    probe = [-0.25, -0.16, -0.1, -0.05, -0.09]
    layers = [("linear_probe", layer, q) for layer, q in zip(LAYERS, probe, strict=True)]
    return [("fine_tune", "", 0.0), *layers]


def write_run(folder: Path, *, synthetic: bool = False, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Write all files that a study leaves, and return the folder."""
    write_journal(folder)
    table = predictions(seeds=seeds)
    table.to_parquet(folder / "predictions.parquet")
    estimate(table, num_resamples=200).to_csv(folder / "results.csv", index=False)
    comparisons = compare(table, num_resamples=2000)
    comparisons.to_csv(folder / "comparisons.csv", index=False)
    labels_saved(table, num_resamples=200).to_csv(folder / "labels_saved.csv", index=False)
    learning_curves(table, num_resamples=200).to_csv(folder / "learning_curves.csv", index=False)
    power(comparisons).to_csv(folder / "power.csv", index=False)
    BASELINES.to_csv(folder / "baselines.csv", index=False)
    (folder / "config.yaml").write_text(CONFIG)
    data = {
        "dataset": "hippocampus",
        "synthetic": synthetic,
        "licence": "CC-BY-SA-4.0",
        "citation": "Antonelli et al., The Medical Segmentation Decathlon, Nat. Commun. 2022",
        "num_scans": 195,
        "num_accepted": 195,
        "num_patients": 130,
        "splits": {"train": 78, "val": 7, "test": 45},
        "rejected": {"localizer": 2, "missing_slice": 1},
        "modalities": {"MR": 195},
        "spacing_mm": [1.0, 1.0, 1.0],
        "pretraining_pool": 78,
        "test_patients_in_pool": 0,
        "index_digest": "5f" * 32,
    }
    provenance = {
        "command": "medssl study configs/studies/demo.yaml",
        "config_digest": "ab" * 32,
        "started": "2026-11-22T10:00:00+00:00",
        "finished": "2026-11-22T10:11:30+00:00",
        "restarts": 0,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.7", "medssl": "0.1.0", "torch": "2.14.1", "monai": "1.6.1"},
        "machine": {"system": "Linux", "num_cores": 2, "memory_gib": 8.0, "accelerators": []},
        "inits": {
            "random": {"source": "random", "loaded": 0, "percent": 0.0, "sha256": None},
            "imagenet": {
                "source": "imagenet",
                "loaded": 311,
                "percent": 100.0,
                "sha256": "579344248a93" + "0" * 52,
                "adapted": [["conv_stem.weight", "three colours summed into one channel"]],
            },
        },
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "provenance.json").write_text(json.dumps(provenance))
    _write_pictures(folder)
    return folder


def write_journal(folder: Path) -> None:
    """Write what two pretrainings log."""
    generator = np.random.default_rng(0)
    pretexts = {"rotation": ("accuracy", 0.25, 0.93), "inpainting": ("psnr", None, 21.0)}
    with Tracker(folder, TrackingConfig(mlflow=False)) as tracker, tracker.run("study"):
        for name, (metric, chance, best) in pretexts.items():
            params = {"pretext": name, "chance_level": chance, "steps": 300}
            with tracker.run(f"pretrain/{name}", parent="study", params=params) as run:
                start = chance if chance is not None else 12.0
                for step in range(0, 301, 2):
                    risen = 1 - np.exp(-step / 80)
                    value = start + (best - start) * risen
                    loss = 1.4 * (1 - 0.8 * risen)
                    noisy = generator.normal(0, 0.04, 2)
                    run.log(
                        step,
                        {
                            "train/loss": loss + noisy[0],
                            f"train/{metric}": value + noisy[1] * start,
                            "lr": 2e-3 * (1 - step / 300),
                        },
                    )
                    if step % 50 == 0:
                        run.log(step, {"val/loss": loss + 0.05, f"val/{metric}": value * 0.97})


def _write_pictures(folder: Path) -> None:
    x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48), indexing="ij")
    image = np.clip(np.exp(-(x**2 + 3 * y**2) * 2) + 0.3 * np.exp(-((x - 0.4) ** 2) * 30), 0, 1)
    row = [(np.rot90(image, turns), f"turned by {90 * turns}") for turns in range(4)]
    (folder / "figures").mkdir(exist_ok=True)
    save_panels(folder / "figures" / "pretext_rotation.png", [row, row])
