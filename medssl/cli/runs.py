"""Commands that train: study, pretrain, transfer, and the batch file for Slurm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medssl.cli.options import (
    CONFIG,
    DRY_RUN,
    JSON,
    OVERRIDES,
    PATH,
    RESUME,
    TRAINING_CODES,
    Command,
    out,
)
from medssl.cli.output import print_facts, print_study, show_progress


@click.command(
    cls=Command,
    examples=[
        "medssl study configs/studies/demo.yaml",
        "medssl study my.yaml seed=1 matrix.seeds='[0,1,2]' --out runs/second",
    ],
    writes=(
        "The run folder, runs/<name> by default: config.yaml (resolved), journal.jsonl, "
        "checkpoints/, predictions.parquet, results.csv, figures/, report.html, "
        "provenance.json. The index and prepared scans go into the config's workspace, "
        "data/workspace by default; they show patients and stay where the scans are."
    ),
    codes=TRAINING_CODES,
)
@CONFIG
@OVERRIDES
@out("Run folder. Default: runs/<name of the study>.")
@RESUME
@DRY_RUN
@JSON
def study(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run a whole study: index, prepare, pretrain, transfer, compare, report.

    Prints a verdict for each init, task and number of labelled patients: better than the reference
    (ImageNet weights by default), not worse, no difference shown, or worse. The config says all
    the rest; medssl init writes one for a folder of scans. Any value of it can be changed behind
    its name, as section.key=value.

    Interrupted, killed or out of power: the same command goes on where it was.
    """
    from medssl.config import load_config
    from medssl.pipelines import study as pipeline

    loaded = load_config(config, pipeline.StudyConfig, overrides)
    if dry_run:
        print_facts(pipeline.plan(loaded, out), as_json)
        return
    with show_progress(as_json) as progress:
        folder = pipeline.run(loaded, out, resume=resume, progress=progress)
    print_study(folder, as_json)


@click.command(
    cls=Command,
    examples=[
        "medssl pretrain configs/pretrain/rotation_3d.yaml --dry-run",
        "medssl pretrain configs/pretrain/rotation_3d.yaml training.steps=2000 --out runs/rotation",
        "torchrun --nproc-per-node 4 -m medssl pretrain configs/pretrain/rotation_3d.yaml",
    ],
    writes=(
        "The run folder, runs/pretrain by default: config.yaml (resolved), journal.jsonl, "
        "checkpoint/ or checkpoints/ (weights and their contract), figures/, report.html, "
        "provenance.json; with training.profile=true also profile/."
    ),
    codes=TRAINING_CODES,
)
@CONFIG
@OVERRIDES
@out("Run folder. Default: runs/pretrain.")
@RESUME
@DRY_RUN
@JSON
def pretrain(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Pretrain a backbone on the scans of an index.

    The config names an index, which medssl index writes first. --dry-run says what the training
    would take in time, memory and disk, and which batch fits: it rehearses a few steps on random
    crops and writes nothing.
    """
    from medssl.config import load_config
    from medssl.pipelines import pretrain as pipeline

    loaded = load_config(config, pipeline.PretrainConfig, overrides)
    folder = out or Path("runs/pretrain")
    if dry_run:
        from medssl.pipelines import planning

        print_facts(planning.plan(loaded, folder), as_json)
        return
    with show_progress(as_json) as progress:
        pipeline.run(loaded, folder, resume=resume, progress=progress)
    table = folder / "profile" / "profile.txt"
    facts = {"run_folder": str(folder), "report": str(folder / "report.html")}
    if table.is_file():
        facts["profile"] = str(table.parent)
        if not as_json:
            click.echo(table.read_text(encoding="utf-8"))
    print_facts(facts, as_json)


@click.command(
    cls=Command,
    examples=[
        (
            "medssl slurm configs/pretrain/rotation_3d.yaml --out runs/rotation --nodes 2 \\\n"
            "  --gpus-per-node 4 --time 12:00:00 --file rotation.sbatch"
        ),
        "sbatch rotation.sbatch",
    ],
    writes="The batch file, where --file says so.",
    codes=(0, 2, 4),
)
@CONFIG
@OVERRIDES
@out("Run folder. Default: runs/pretrain.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="GPUs of each machine, one process a GPU; 0 computes on CPUs.",
)
@click.option(
    "--processes-per-node",
    type=click.IntRange(min=1),
    help="Processes on each machine, if not one a GPU.",
)
@click.option(
    "--cpus-per-task",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Cores of each machine, for all its processes together.",
)
@click.option("--time", default="24:00:00", show_default=True, help="Of one turn, as Slurm has it.")
@click.option("--partition", help="Slurm's partition.")
@click.option("--account", help="Slurm's account.")
@click.option("--container", metavar="IMAGE", help="Run in this image, with Apptainer.")
@click.option("--file", type=PATH, help="Where to write it. Default: print it.")
@JSON
def slurm(
    config: Path, overrides: tuple[str, ...], out: Path | None, file: Path | None, as_json: bool,
    **job: Any,
) -> None:  # fmt: skip
    """Write the batch file that pretrains under Slurm, and goes on until it is done.

    The job saves before its time is over and queues itself again until the training is done;
    scancel makes it save and stay away.
    """
    from medssl.pipelines import slurm as pipeline

    script = pipeline.build(config, overrides, out or Path("runs/pretrain"), pipeline.Job(**job))
    if file is not None:
        pipeline.write(script, file)
    if as_json:
        print_facts({"file": None if file is None else str(file), "script": script}, as_json)
    elif file is None:
        click.echo(script, nl=False)
    else:
        click.echo(f"Batch file: {file} (submit it with: sbatch {file})")


@click.command(
    cls=Command,
    examples=[
        "medssl transfer configs/transfer/hippocampus_3d.yaml --dry-run",
        "medssl transfer configs/transfer/hippocampus_3d.yaml matrix.seeds='[0]' --out runs/probe",
    ],
    writes=(
        "The run folder, runs/transfer by default: config.yaml (resolved), journal.jsonl, "
        "checkpoints/, predictions.parquet, results.csv, figures/, report.html, "
        "provenance.json."
    ),
    codes=TRAINING_CODES,
)
@CONFIG
@OVERRIDES
@out("Run folder. Default: runs/transfer.")
@RESUME
@DRY_RUN
@JSON
def transfer(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Evaluate inits on downstream tasks and compare them.

    The config names an index, prepared scans are made from it as needed, and inits: random,
    ImageNet, and checkpoints that medssl pretrain or a study has written.
    """
    from medssl.config import load_config
    from medssl.pipelines import transfer as pipeline

    loaded = load_config(config, pipeline.TransferConfig, overrides)
    if dry_run:
        print_facts(pipeline.plan(loaded), as_json)
        return
    with show_progress(as_json) as progress:
        folder = pipeline.run(
            loaded, out or Path("runs/transfer"), resume=resume, progress=progress
        )
    print_study(folder, as_json)
