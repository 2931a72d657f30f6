"""A finished study for the tests of what looks at one again."""

from __future__ import annotations

import json
from pathlib import Path

from medssl.config import load_config
from medssl.models.build import build_backbone
from medssl.models.checkpoints import Contract, save_checkpoint
from medssl.pipelines import index as indexing
from medssl.pipelines import prepare
from medssl.pipelines.contract import image_contract
from medssl.pipelines.facts import data_digests
from medssl.pipelines.pretraining import draw_splits
from medssl.pipelines.study import StudyConfig
from medssl.pipelines.transfer import build_tasks, labelled_patients, mask_folders
from studies import settings, write_archive, write_config


def finished_study(root: Path) -> Path:
    """Return the run folder of a study whose backbones are saved and hold random weights."""
    content = settings(write_archive(root / "archive"), include_images=True)
    content["splits"] = {"val_fraction": 0.4, "test_fraction": 0.3}
    run = root / "runs" / "tiny"
    run.mkdir(parents=True)
    config = load_config(write_config(root / "tiny.yaml", content), StudyConfig)
    (run / "config.yaml").write_text(config.to_yaml())
    index = indexing.run(config.index, config.workplace / "index")
    store = prepare.prepare(
        index,
        config.preprocessing,
        prepare.store_folder(config.workplace, config.preprocessing),
        masks=mask_folders(config),
    )
    tasks = build_tasks(config, config.sampling, index)
    splits = draw_splits(config.splits, labelled_patients(tasks, index), config.seed)
    splits.write(run / "splits.json")
    digests = data_digests(index, store, splits, tasks.values())
    (run / "provenance.json").write_text(json.dumps({"data": digests}))
    request = config.sampling.request()
    for number, label in enumerate(("rotation", "inpainting"), start=50):
        backbone, _ = build_backbone(
            config.backbone, config.inits["random"].init, in_channels=1, seed=number
        )
        contract = Contract(
            **image_contract(store, request), in_channels=1, spatial_dims=2,
            backbone=config.backbone.model_dump(mode="json"), init={"name": "random"},
            pretext={"name": label}, index_digest=index.digest, store_digest=store.digest,
            patients=splits.train, seed=0, steps=1, package_versions={},
        )  # fmt: skip
        save_checkpoint(run / "checkpoints" / label, backbone, contract)
    return run
