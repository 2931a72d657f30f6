"""Pretrain a backbone on unlabelled scans with a pretext task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from medssl.config import ComponentConfig, component
from medssl.errors import MachineError
from medssl.models.backbones import BACKBONES
from medssl.models.inits import INITS
from medssl.pipelines import prepare, publish
from medssl.pipelines.facts import data_digests, data_facts
from medssl.pipelines.leakage import Leakage
from medssl.pipelines.pretraining import (
    LABEL,
    Pretraining,
    PretrainSection,
    draw_splits,
    earlier_contract,
    patients_of,
    pool_of,
    pretrain_backbone,
)
from medssl.pipelines.progress import Progress, silent
from medssl.pipelines.run_folder import RunFolder, check_same_config, command_line
from medssl.pipelines.sections import SamplingConfig, SplitConfig
from medssl.pipelines.starts import start_in_words
from medssl.pretext import PRETEXT_TASKS
from medssl.reports.html import build_report
from medssl.scans.index import Index
from medssl.scans.selection import SelectionConfig
from medssl.scans.splits import Splits
from medssl.scans.store import Store
from medssl.tracking.base import Tracker, TrackingConfig
from medssl.training.devices import select_device
from medssl.training.distributed import joined, peers_needed
from medssl.transforms.preprocessing import PreprocessingConfig


class PretrainConfig(PretrainSection):
    """Configuration of ``medssl pretrain``.

    Attributes:
        seed: everything random derives from it.
        index: folder of the index, from ``medssl index``.
        select: which scans of the index to work on.
        preprocessing: how scans are prepared; done first where the store lacks them.
        store: folder of prepared scans; inside the index's folder by default.
        sampling: what is cut out of them.
        backbone: the network.
        init: its starting weights.
        pretext: the task.
        splits: which patients are held out; test patients never take part.
        device: ``auto`` takes the GPU where there is one.
        include_images: whether pictures of puzzles go into the run folder.
        tracking: MLflow.
    """

    seed: int = 0
    index: Path
    store: Path | None = None
    select: SelectionConfig = SelectionConfig()
    preprocessing: PreprocessingConfig
    sampling: SamplingConfig
    backbone: Annotated[ComponentConfig, component(BACKBONES)]
    init: Annotated[ComponentConfig, component(INITS)] = ComponentConfig(name="random")
    pretext: Annotated[ComponentConfig, component(PRETEXT_TASKS)]
    splits: SplitConfig = SplitConfig()
    device: str = "auto"
    include_images: bool = False
    tracking: TrackingConfig = TrackingConfig()


def run(
    config: PretrainConfig,
    out: Path = Path("runs/pretrain"),
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Pretrain a backbone and return the run folder (`medssl.load_backbone` takes it).

    Args:
        config: what to do.
        out: the run folder. One that holds the same configuration is resumed, or left as it is
            when it is finished.
        resume: require that ``out`` already holds this run.
        progress: receives how far it is.

    Raises:
        MedsslError: see `medssl.errors`.
    """
    check_same_config(out, config, resume=resume)
    with joined(config.device) as ranks:
        config.training.micro_batches(ranks.size)  # refuses a batch before anything is written
        index = Index.open(config.index).select(config.select)
        job = Pretraining(
            LABEL, config.backbone, config.init, config.pretext, config,
            config.sampling, config.seed, select_device(config.device, ranks), ranks,
        )  # fmt: skip
        job.task().request(config.sampling.request())  # refuses crops before anything is written
        if ranks.leads:
            _lead(job, config, index, out, resume, progress)
        else:
            with peers_needed():
                _follow(job, config, index, out)
    if ranks.leads:  # nobody waits for a registry
        publish.after_run(out, config.tracking)
    return out


def _lead(
    job: Pretraining,
    config: PretrainConfig,
    index: Index,
    out: Path,
    resume: bool,
    progress: Progress,
) -> None:
    """Prepare, pretrain, and write all there is to write."""
    with Tracker(out, config.tracking) as tracker:
        folder = RunFolder(out, config, command_line(), resume=resume)
        with tracker.run("pretrain/backbone", params=job.parameters()) as handle, peers_needed():
            folder.send_config(handle)

            def prepared() -> tuple[Store, Splits]:
                store = _prepared(config, index, progress)
                splits = draw_splits(config.splits, dict.fromkeys(patients_of(store)), config.seed)
                folder.pin_data(data_digests(index, store, splits))
                handle.inputs(data_digests(index, store, splits), "pretraining")
                splits.write(out / "splits.json")
                return store, splits

            store, splits = job.ranks.leader_first("prepare", prepared)
            earlier = earlier_contract(config.init)
            facts = data_facts(
                index, store, splits,
                pretraining_pool=pool_of(job, store, splits),
                leakage=Leakage(len({*splits.test} & {*(earlier.patients if earlier else ())})),
            )  # fmt: skip
            folder.write_json("data.json", facts)
            pretrain_backbone(
                job, index, store, splits, out / "checkpoints" / "backbone", handle, progress,
                out / "figures" / "pretext_backbone.png" if config.include_images else None,
            )  # fmt: skip
            folder.finish()
            handle.artifact(out / "checkpoints" / "backbone")
            folder.send_report(handle, build_report(out))


def _follow(job: Pretraining, config: PretrainConfig, index: Index, out: Path) -> None:
    """Compute this process's part of every step, and write nothing."""
    store = job.ranks.leader_first("prepare", lambda: _prepared(config, index, silent))
    splits = out / "splits.json"
    if not splits.is_file():
        raise MachineError(
            f"process {job.ranks.rank} does not see the run folder that process 0 writes. Give an "
            "--out that every machine sees as the same folder."
        )
    pretrain_backbone(
        job, index, store, Splits.read(splits), out / "checkpoints" / "backbone", None, silent, None
    )


def _prepared(config: PretrainConfig, index: Index, progress: Progress) -> Store:
    folder = prepare.store_folder(config.index, config.preprocessing, config.store)
    return prepare.prepare(index, config.preprocessing, folder, progress=progress)


def plan(config: PretrainConfig) -> dict[str, Any]:
    """Return what `run` would do, touching nothing."""
    index = Index.open(config.index).select(config.select)
    patients = dict.fromkeys(map(str, index.accepted["patient_key"].unique()))
    splits = draw_splits(config.splits, patients, config.seed)
    return {
        "scans": len(index.accepted),
        "patients": len(patients),
        "patients_trained_on": len(splits.train),
        "patients_validated_on": len(splits.val),
        "pretext": config.pretext.name,
        "backbone": config.backbone.name,
        "init": start_in_words(config.backbone, config.init),
        "steps": config.training.steps,
        "images": config.training.steps * config.training.global_batch_size,
        "device": str(select_device(config.device)),
    }
