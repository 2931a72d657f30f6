"""The command line: commands only. Everything heavy is imported inside the command that needs it.

Exit codes: 0 ok, 2 usage or config, 3 data, 4 environment, 5 diverged, 130/143 signals.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from medssl import __version__
from medssl.errors import ConfigError, DataError, MachineError, MedsslError, Terminated
from medssl.training.launch import by_torchrun, first_to_end, launched, rank

_INTERRUPTED = 130

_PATH = click.Path(path_type=Path)
_CONFIG = click.argument("config", type=_PATH)
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[key=value]...")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_RESUME = click.option(
    "--resume", is_flag=True, help="Insist that the run folder already holds this run."
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")


def _out(help_text: str) -> Callable[[Any], Any]:
    return click.option("--out", type=_PATH, help=help_text)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: medssl study configs/studies/demo.yaml --dry-run",
)
@click.version_option(__version__, prog_name="medssl")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Does pretraining on our own unlabelled scans beat ImageNet weights for our task?

    By how much, and how many labels does it save? Point medssl at a folder of DICOM or NIfTI.
    A command that was interrupted goes on when it is given again.
    """
    context.obj = {"debug": debug}
    if launched() and by_torchrun() and context.invoked_subcommand != "pretrain":
        raise ConfigError(
            f"torchrun started several processes of medssl {context.invoked_subcommand}, and only "
            "medssl pretrain shares its work among them. Start it without torchrun."
        )


@cli.command()
@_CONFIG
@_OVERRIDES
@_out("Run folder. Default: runs/<name of the study>.")
@_RESUME
@_DRY_RUN
@_JSON
def study(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run a whole study: index, prepare, pretrain, transfer, compare, report.

    \b
    medssl study configs/studies/demo.yaml
    medssl study my.yaml seed=1 matrix.seeds='[0,1,2]' --out runs/second
    """
    from medssl.config import load_config
    from medssl.pipelines import study as pipeline

    loaded = load_config(config, pipeline.StudyConfig, overrides)
    if dry_run:
        _print(pipeline.plan(loaded, out), as_json)
        return
    with _progress(as_json) as progress:
        folder = pipeline.run(loaded, out, resume=resume, progress=progress)
    _print_study(folder, as_json)


@cli.command()
@_CONFIG
@_OVERRIDES
@_out("Run folder. Default: runs/pretrain.")
@_RESUME
@_DRY_RUN
@_JSON
def pretrain(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Pretrain a backbone on the scans of an index.

    \b
    medssl pretrain configs/pretrain/rotation_3d.yaml training.steps=2000 --out runs/rotation
    """
    from medssl.config import load_config
    from medssl.pipelines import pretrain as pipeline

    loaded = load_config(config, pipeline.PretrainConfig, overrides)
    folder = out or Path("runs/pretrain")
    if dry_run:
        from medssl.pipelines import planning

        _print(planning.plan(loaded, folder), as_json)
        return
    with _progress(as_json) as progress:
        pipeline.run(loaded, folder, resume=resume, progress=progress)
    table = folder / "profile" / "profile.txt"
    facts = {"run_folder": str(folder), "report": str(folder / "report.html")}
    if table.is_file():
        facts["profile"] = str(table.parent)
        if not as_json:
            click.echo(table.read_text(encoding="utf-8"))
    _print(facts, as_json)


@cli.command()
@_CONFIG
@_OVERRIDES
@_out("Run folder. Default: runs/pretrain.")
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
@click.option("--file", type=_PATH, help="Where to write it. Default: print it.")
@_JSON
def slurm(
    config: Path, overrides: tuple[str, ...], out: Path | None, file: Path | None, as_json: bool,
    **job: Any,
) -> None:  # fmt: skip
    """Write the batch file that pretrains under Slurm, and goes on until it is done.

    \b
    medssl slurm configs/pretrain/rotation_3d.yaml --out runs/rotation --nodes 2 \\
      --gpus-per-node 4 --time 12:00:00 --file rotation.sbatch
    sbatch rotation.sbatch
    """
    from medssl.pipelines import slurm as pipeline

    script = pipeline.build(config, overrides, out or Path("runs/pretrain"), pipeline.Job(**job))
    if file is not None:
        pipeline.write(script, file)
    if as_json:
        _print({"file": None if file is None else str(file), "script": script}, as_json)
    elif file is None:
        click.echo(script, nl=False)
    else:
        click.echo(f"Batch file: {file} (submit it with: sbatch {file})")


@cli.command()
@_CONFIG
@_OVERRIDES
@_out("Run folder. Default: runs/transfer.")
@_RESUME
@_DRY_RUN
@_JSON
def transfer(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Evaluate inits on downstream tasks and compare them.

    \b
    medssl transfer configs/transfer/segmentation.yaml --dry-run
    """
    from medssl.config import load_config
    from medssl.pipelines import transfer as pipeline

    loaded = load_config(config, pipeline.TransferConfig, overrides)
    if dry_run:
        _print(pipeline.plan(loaded), as_json)
        return
    with _progress(as_json) as progress:
        folder = pipeline.run(
            loaded, out or Path("runs/transfer"), resume=resume, progress=progress
        )
    _print_study(folder, as_json)


@cli.command()
@click.argument("config", type=_PATH)
@_OVERRIDES
@_out("Folder of the index. Default: data/index.")
@click.option(
    "--audit/--no-audit",
    "wants_audit",
    default=True,
    show_default=True,
    help="Write audit.html with thumbnails, audit.csv and audit.json into the index.",
)
@_DRY_RUN
@_JSON
def index(
    config: Path, overrides: tuple[str, ...], out: Path | None, wants_audit: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Index a folder of DICOM and NIfTI: a config file, or simply the folder.

    \b
    medssl index /archive/export
    medssl index configs/index/hippocampus.yaml
    """
    from medssl.config import load_config, validate_config
    from medssl.pipelines import index as pipeline
    from medssl.pipelines.facts import keep_dataset_facts
    from medssl.scans.building import IndexConfig

    if config.suffix in (".yaml", ".yml"):
        loaded = load_config(config, IndexConfig, overrides)
    else:
        loaded = validate_config({"folder": str(config)}, IndexConfig, overrides)
    if dry_run:
        _print(pipeline.plan(loaded), as_json)
        return
    with _progress(as_json) as progress:
        built = pipeline.run(loaded, out or Path("data/index"), progress=progress)
        keep_dataset_facts(loaded.folder, built.folder)
        page = _audit(built, progress) if wants_audit else None
    if as_json:
        written = {"audit": str(page)} if page else {}
        _print({"index": str(built.folder), **written, **built.summary}, as_json)
        return
    for line in pipeline.describe(built):
        click.echo(line)
    click.echo(f"Index: {built.folder}")
    if page:
        click.echo(f"Audit: {page} (shows pixels of patients: keep it where the scans are)")


def _audit(index: Any, progress: Any) -> Path:
    from medssl.pipelines import audit as pipeline

    return pipeline.run(index, progress=progress)


@cli.command()
@click.argument("index", type=_PATH)
@_out("Where to write audit.html, audit.csv and audit.json. Default: the folder of the index.")
@click.option(
    "--max-scans", type=click.IntRange(min=0), default=200, show_default=True,
    help="Thumbnails at most, chosen evenly over modalities and flags.",
)  # fmt: skip
@_JSON
def audit(index: Path, out: Path | None, max_scans: int, as_json: bool) -> None:
    """Show what an index accepted and rejected, and why, on one page that needs no network.

    \b
    medssl audit data/index --max-scans 500
    """
    from medssl.pipelines import audit as pipeline

    with _progress(as_json) as progress:
        page = pipeline.run(index, out, max_scans=max_scans, progress=progress)
    rejected = index / "private" / "rejected.csv"
    _print({"audit": str(page), "rejected_files": str(rejected)}, as_json)


@cli.command()
@click.argument("path")
@click.option(
    "--index", "index_folder", type=_PATH, help="PATH is the key of a scan in this index."
)
@_JSON
def inspect(path: str, index_folder: Path | None, as_json: bool) -> None:
    """Explain one file, one folder, or one scan of an index: accepted or not, and why.

    \b
    medssl inspect /archive/export/series_12
    medssl inspect 7f3a19c02b44d1e8 --index data/index
    """
    from medssl.pipelines import inspect as pipeline

    found = pipeline.run(path, index_folder)
    if as_json:
        _print(pipeline.facts_of(found), as_json)
        return
    for line in pipeline.describe(found, path if index_folder else Path(path).name or path):
        click.echo(line)


@cli.command()
@_CONFIG
@_OVERRIDES
@_DRY_RUN
@_JSON
def prepare(config: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Prepare the scans of an index: orient, resample, crop, scale, store."""
    from medssl.config import load_config
    from medssl.pipelines import prepare as pipeline

    loaded = load_config(config, pipeline.PrepareConfig, overrides)
    if dry_run:
        _print(pipeline.plan(loaded), as_json)
        return
    with _progress(as_json) as progress:
        store = pipeline.run(loaded, progress=progress)
    _print({"store": str(store.folder), "scans": len(store.scan_keys)}, as_json)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@_out("Where to write tables and report. Default: runs/comparison.")
@click.option("--reference", default="imagenet", show_default=True, help="Init to compare with.")
@_JSON
def compare(runs: tuple[Path, ...], out: Path | None, reference: str, as_json: bool) -> None:
    """Compare the inits of several runs, from their predictions alone."""
    from medssl.pipelines import compare as pipeline
    from medssl.pipelines.sections import StatisticsConfig

    folder = out or Path("runs/comparison")
    pipeline.run(runs, folder, statistics=StatisticsConfig(reference=reference))
    _print_study(folder, as_json)


@cli.command()
@click.argument("run", type=_PATH)
@_JSON
def report(run: Path, as_json: bool) -> None:
    """Write a run folder's report anew."""
    from medssl.reports.html import build_report

    _print({"report": str(build_report(run))}, as_json)


@cli.command()
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=_PATH)
@click.option(
    "--format",
    "formats",
    multiple=True,
    required=True,
    metavar="NAME",
    help="onnx, program (PyTorch ExportedProgram), state_dict (torchvision, timm, MONAI) or "
    "bundle (MONAI); may be given several times.",
)
@_out("Folder to write. Default: runs/export/<name of the checkpoint>.")
@click.option(
    "--values",
    type=click.Choice(["hu", "arbitrary"]),
    help="What the images of a MONAI bundle hold, where intensity is auto: HU (CT), or not.",
)
@click.option(
    "--image-size",
    metavar="N,N[,N]",
    help="Voxels along each axis, to capture the network at this size alone.",
)
@click.option("--licence", help="Licence of the weights, for the documents.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in that folder.")
@_DRY_RUN
@_JSON
def export(
    source: Path, formats: tuple[str, ...], out: Path | None, values: Any, image_size: str | None,
    licence: str | None, overwrite: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export a backbone for software other than medssl, compared with it, with a model card.

    \b
    medssl export runs/ours/checkpoints/inpainting --format onnx --format state_dict
    medssl export runs/rotation --format bundle --values arbitrary --out weights/rotation
    """
    from medssl.pipelines import export as pipeline

    options: dict[str, Any] = {
        "values": values,
        "image_size": None if image_size is None else _sizes(image_size),
        "licence": licence,
        "overwrite": overwrite,
    }
    folder = out or Path("runs/export") / source.resolve().name
    if dry_run:
        _print(pipeline.plan(source, formats, folder, **options), as_json)
        return
    with _progress(as_json) as progress:
        exported = pipeline.run(source, formats, folder, **options, progress=progress)
    if as_json:
        _print({"out": str(exported.folder), **exported.facts}, as_json)
        return
    for line in pipeline.describe(exported):
        click.echo(line)
    click.echo(f"Export: {exported.folder} (MODEL_CARD.md says how to load it)")


def _sizes(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--image-size takes numbers of voxels like 96,96,96, found {text!r}.")
    return tuple(map(int, numbers))


@cli.command()
@click.argument("run", type=_PATH)
@_JSON
def sync(run: Path, as_json: bool) -> None:
    """Deliver to MLflow what a run folder's journal holds and MLflow lacks."""
    from medssl.tracking.base import sync as deliver

    outcome = deliver(run)
    _print(
        {
            "delivered": outcome.delivered,
            "undelivered": outcome.undelivered,
            "refused": outcome.refused,
            "target": outcome.target,
        },
        as_json,
    )
    if outcome.undelivered:
        raise _UndeliveredError(outcome.problem)


class _UndeliveredError(MedsslError):
    exit_code = 4

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"MLflow did not take everything ({problem}). Nothing is lost: the journal keeps it. "
            "Check the server and run medssl sync again."
        )


@cli.group()
def datasets() -> None:
    """Public and synthetic data sets: list, fetch, verify."""


@datasets.command("list")
@_JSON
def datasets_list(as_json: bool) -> None:
    """List the data sets with licence and citation."""
    from medssl.scans.datasets.base import cards

    _print(
        {
            card.name: {"title": card.title, "licence": card.licence, "synthetic": card.synthetic,
                        "citation": card.citation}
            for card in cards()
        },
        as_json,
    )  # fmt: skip


@datasets.command("fetch")
@click.argument("name")
@_out("Where to. Default: data/<name>.")
@click.option("--no-network", is_flag=True, help="Take it from the mirror, or not at all.")
@_JSON
def datasets_fetch(name: str, out: Path | None, no_network: bool, as_json: bool) -> None:
    """Bring a data set to this machine, from MEDSSL_DATA_MIRROR or the network."""
    from medssl.scans.datasets.base import fetch

    with _progress(as_json) as progress:
        fetched = fetch(
            name,
            out or Path("data") / name,
            network=not no_network,
            progress=lambda done, total: progress(f"fetch {name}", done, total),
        )
    if fetched.synthetic and not as_json:
        click.secho(
            "These data are synthetic: they show that the software runs, and prove nothing.",
            fg="yellow", bold=True, err=True,
        )  # fmt: skip
    _print(
        {"folder": str(fetched.folder), "from": fetched.origin, "licence": fetched.card.licence},
        as_json,
    )


@datasets.command("verify")
@click.argument("folder", type=_PATH)
@_JSON
def datasets_verify(folder: Path, as_json: bool) -> None:
    """Compare a fetched data set with the checksums it came with."""
    from medssl.scans.datasets.base import verify

    differences = verify(folder)
    _print({key: len(paths) for key, paths in differences.items()}, as_json)
    if any(differences.values()):
        raise DataError(
            "the data set differs from what was fetched. Remove the folder and fetch it again."
        )


@cli.group()
def weights() -> None:
    """Weight files: what is published and what is here; fetch, verify, register.

    \b
    For a machine without a network:
      medssl weights fetch torchvision:resnet50 --out /media/stick     on one that has it
      medssl weights verify /media/stick                               where it arrives
      init: {name: imagenet, path: /media/stick}                       in the config
    """


@weights.command("list")
@_JSON
def weights_list(as_json: bool) -> None:
    """List the ImageNet weights that backbones can take, and where they are on this machine."""
    from medssl.pipelines import weights as pipeline

    rows = pipeline.table()
    if as_json:
        click.echo(json.dumps(pipeline.facts_of(rows), indent=2))
        return
    for line in pipeline.describe(rows):
        click.echo(line)


@weights.command("fetch")
@click.argument("backbone", metavar="FAMILY:VARIANT")
@_out("Folder to write the file into. Default: the torch hub cache, where init imagenet looks.")
@click.option("--sha256", help="The hash it must have, where its publisher states none.")
@_JSON
def weights_fetch(backbone: str, out: Path | None, sha256: str | None, as_json: bool) -> None:
    """Download the ImageNet weights of a backbone; what is not the published file is not kept.

    \b
    medssl weights fetch torchvision:resnet50 --out /media/stick
    """
    from medssl.pipelines import weights as pipeline

    with _progress(as_json) as progress:
        got = pipeline.fetch(backbone, out, sha256=_hash(sha256), progress=progress)
    _print({"file": got.path, "sha256": got.sha256, "checked": got.text}, as_json)


@weights.command("verify")
@click.argument("target", metavar="FILE|FOLDER|all", default="all")
@click.option("--sha256", help="The hash the file must have.")
@_JSON
def weights_verify(target: str, sha256: str | None, as_json: bool) -> None:
    """Compare weight files and checkpoints with the hashes that were stated for them.

    Exit code 3: a file is not what it should be; 4: there is none.

    \b
    medssl weights verify /media/stick
    medssl weights verify runs/ours/checkpoints/rotation
    """
    from medssl.pipelines import weights as pipeline

    checks = pipeline.verify(None if target == "all" else Path(target), sha256=_hash(sha256))
    if as_json:
        click.echo(json.dumps(pipeline.facts_of(checks), indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.is_right else "FAIL"
            click.echo(f"{mark}  {check.file}: {check.text} (sha256 {check.sha256[:12] or '?'})")
    problem = pipeline.failure(checks)
    if problem is not None:
        raise problem


@weights.command("register")
@click.argument("source", metavar="RUN|CHECKPOINT", type=_PATH)
@click.argument("name")
@click.option("--alias", help="Name that is moved to this version. Default: candidate.")
@_JSON
def weights_register(source: Path, name: str, alias: str | None, as_json: bool) -> None:
    """Register pretrained backbones as versions of a model in MLflow's registry.

    A config takes one as: {name: checkpoint, path: "models:/NAME@ALIAS"}. MLflow serves one:
    mlflow models predict -m models:/NAME@ALIAS -i paths.csv -t csv --env-manager local

    Of a study, every pretrained backbone becomes a version with the alias candidate_INIT; one that
    the study's verdicts name for a task gets best_for_TASK. Repeating it adds nothing twice.

    \b
    medssl weights register runs/ours/checkpoints/rotation heart --alias champion
    medssl weights register runs/ours heart
    """
    from medssl.pipelines import publish

    versions = [
        {"model": version.uri, **publish.facts_of(version)}
        for version in publish.run(source, name, alias)
    ]
    if as_json:
        click.echo(json.dumps({"versions": versions}, indent=2))
        return
    for version in versions:
        _print(version, as_json)


def _hash(text: str | None) -> str | None:
    """Return a whole sha256 in lower case.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    digits = text.strip().lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ConfigError(f"--sha256 takes 64 hexadecimal digits, not {text!r}. Copy it whole.")
    return digits


@cli.group()
def config() -> None:
    """Configuration files: check, show, schema."""


@config.command("check")
@click.argument("file", type=_PATH)
@_OVERRIDES
@_JSON
def config_check(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether a config file is right, and what kind it is."""
    from medssl.pipelines.kinds import load_any

    kind, loaded = load_any(file, overrides)
    _print({"kind": kind, "digest": loaded.digest()}, as_json)


@config.command("show")
@click.argument("file", type=_PATH)
@_OVERRIDES
def config_show(file: Path, overrides: tuple[str, ...]) -> None:
    """Print a config file with every default filled in."""
    from medssl.pipelines.kinds import load_any

    click.echo(load_any(file, overrides)[1].to_yaml(), nl=False)


@config.command("schema")
@click.argument("kind", required=False)
@_out("Folder to write one <kind>.json each into.")
def config_schema(kind: str | None, out: Path | None) -> None:
    """Print the JSON Schema of one kind of config, or write all of them."""
    from medssl.pipelines.kinds import schema, write_schemas

    if out is not None:
        write_schemas(out)
    elif kind is None:
        raise ConfigError("name a kind (index, prepare, pretrain, transfer, study), or give --out.")
    else:
        click.echo(json.dumps(schema(kind), indent=2))


@cli.command("list")
@click.argument(
    "kind",
    type=click.Choice(
        ["pretext", "downstream", "backbones", "inits", "formats", "protocols", "datasets",
         "executors", "exports"]
    ),
)  # fmt: skip
@_JSON
def list_(kind: str, as_json: bool) -> None:
    """List the components of a kind: the names that configs take."""
    import importlib

    where = {
        "pretext": ("medssl.pretext", "PRETEXT_TASKS"),
        "downstream": ("medssl.downstream", "DOWNSTREAM_TASKS"),
        "backbones": ("medssl.models.backbones", "BACKBONES"),
        "inits": ("medssl.models.inits", "INITS"),
        "formats": ("medssl.scans.formats", "FORMATS"),
        "protocols": ("medssl.evaluation.protocols", "PROTOCOLS"),
        "datasets": ("medssl.scans.datasets", "DATASETS"),
        "executors": ("medssl.executors", "EXECUTORS"),
        "exports": ("medssl.models.export", "EXPORTS"),
    }
    module, name = where[kind]
    names = getattr(importlib.import_module(module), name).names()
    click.echo(json.dumps(names) if as_json else "\n".join(names))


@cli.command()
@click.argument("config", type=_PATH, required=False)
@_OVERRIDES
@click.option(
    "--disk", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Measure this folder's disk, with a file of 64 MB. Default: where temporary files go.",
)  # fmt: skip
@_JSON
def doctor(
    config: Path | None, overrides: tuple[str, ...], disk: Path | None, as_json: bool
) -> None:
    """Say what this machine can do, and what to mend.

    With a config file, say whether the ImageNet weights that it starts from are here.

    \b
    medssl doctor
    medssl doctor --disk /data/prepared
    medssl doctor configs/studies/demo.yaml
    """
    from medssl.pipelines.doctor import examine

    findings = examine(config, overrides, folder=disk)
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "note": "note", "problem": "MEND"}[finding.level]
            click.echo(f"{mark}  {finding.subject}: {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        sys.exit(4)


@cli.command()
@click.argument("run", metavar="RUN_FOLDER", type=_PATH)
@_out("Where to write. Default: gallery, inside the run folder.")
@click.option(
    "--k", type=click.IntRange(min=1), default=10, show_default=True,
    help="Neighbours that are counted.",
)  # fmt: skip
@_JSON
def gallery(run: Path, out: Path | None, k: int, as_json: bool) -> None:
    """Show which patches of other patients each init finds alike, and count the right ones.

    \b
    medssl gallery runs/demo
    """
    from medssl.pipelines import gallery as pipeline

    with _progress(as_json) as progress:
        found = pipeline.run(run, out, k=k, progress=progress)
    if as_json:
        _print({"gallery": str(found.folder), **found.facts}, as_json)
        return
    for line in pipeline.describe(found):
        click.echo(line)
    pictures = found.facts["pictures_of_patients"]
    note = " (shows pixels of patients: keep it where the scans are)" if pictures else ""
    click.echo(f"Gallery: {found.folder}{note}")


@cli.command()
@click.argument("run", metavar="RUN_FOLDER", type=_PATH)
@_out("Where to write. Default: features_of_scans, inside the run folder.")
@_JSON
def features(run: Path, out: Path | None, as_json: bool) -> None:
    """Show what the frozen features of a study know: classes, scanners, sites, and each other.

    Writes maps of scans (PCA and t-SNE) by label, scanner, site and patient, the likeness of every
    layer of every init (CKA), and how well a linear classifier tells scanners and sites: features
    that tell them may carry them into your results. Test patients are not looked at.

    \b
    medssl features runs/demo
    """
    from medssl.pipelines import features as pipeline

    with _progress(as_json) as progress:
        found = pipeline.run(run, out, progress=progress)
    if as_json:
        _print(
            {
                "features": str(found.folder), "num_scans": found.num_scans,
                "num_patients": found.num_patients,
                "told_apart": found.told.to_dict("records"),
            },
            as_json,
        )  # fmt: skip
        return
    for line in pipeline.describe(found):
        click.echo(line)
    click.echo(f"Features: {found.folder}")


@cli.group()
def pretext() -> None:
    """Pretext tasks: see their puzzles, and how far shortcuts solve them."""


@pretext.command("preview")
@_CONFIG
@_OVERRIDES
@_out("Folder for one PNG a task. Default: runs/preview/<name of the config>.")
@_DRY_RUN
@_JSON
def pretext_preview(
    config: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Draw real puzzles of the pretext tasks of a config, with their labels.

    \b
    medssl pretext preview configs/pretrain/rotation_3d.yaml pretext.turns=axes
    """
    from medssl.pipelines import preview as pipeline

    loaded = pipeline.read_config(config, overrides)
    folder = out or pipeline.DEFAULT_FOLDER / config.stem
    if dry_run:
        _print(pipeline.plan(loaded, folder), as_json)
        return
    with _progress(as_json) as progress:
        written = pipeline.run(loaded, folder, progress=progress)
    _print({name: str(path) for name, path in written.items()}, as_json)
    click.secho(
        "These pictures show pixels of patients: keep them where the scans are.",
        fg="yellow", bold=True, err=True,
    )  # fmt: skip


@pretext.command("audit")
@_CONFIG
@_OVERRIDES
@_out("Folder for tables and figures. Default: runs/shortcuts/<name of the config>.")
@click.option(
    "--steps", type=click.IntRange(min=1),
    help="Steps of each probe. Default: those of the config, at most 200.",
)  # fmt: skip
@_DRY_RUN
@_JSON
def pretext_audit(
    config: Path, overrides: tuple[str, ...], out: Path | None, steps: int | None, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure how much of a pretext task is solved by shortcuts alone.

    The task is trained on border strips, silhouettes, means, thumbnails and constant scans.

    \b
    medssl pretext audit configs/pretrain/rotation_3d.yaml --steps 100
    """
    from medssl.pipelines import shortcuts as pipeline
    from medssl.pipelines.preview import read_config

    loaded, folder = read_config(config, overrides), out or pipeline.DEFAULT_FOLDER / config.stem
    if dry_run:
        _print(pipeline.plan(loaded, folder, steps=steps), as_json)
        return
    with _progress(as_json) as progress:
        audits = pipeline.run(loaded, folder, steps=steps, progress=progress)
    if as_json:
        _print({"out": str(folder), "audits": pipeline.facts_of(audits)}, as_json)
        return
    for line in pipeline.describe(audits):
        click.echo(line)
    click.echo(f"Tables and figures: {folder}")


def main() -> NoReturn:
    """Run the command line, and turn errors into messages and exit codes.

    Of several processes of torchrun the first alone shows progress and results, and the one that
    ends first says why.
    """
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv[1:]
    if launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each process warns
    try:
        with _silence(wanted=rank() > 0 and not debug):
            cli.main(standalone_mode=False)
    except click.ClickException as error:
        if first_to_end():
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _tell("\nInterrupted. Give the same command again to go on.")
        sys.exit(_INTERRUPTED)
    except Terminated as stop:
        _tell(f"{str(stop) or 'Terminated.'} Give the same command again to go on.")
        # torchrun would start the processes of a training again that its time limit ended.
        sys.exit(0 if by_torchrun() and stop.is_planned else stop.exit_code)
    except MedsslError as error:
        if debug:
            raise
        _tell(f"{type(error).__name__}: {error}", fg="red")
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        _tell(_unforeseen(error), fg="red")
        sys.exit(MachineError.exit_code if _is_full(error) else MedsslError.exit_code)
    sys.exit(0)


@contextlib.contextmanager
def _silence(*, wanted: bool) -> Iterator[None]:
    """Drop what is printed and warned of inside the block, if wanted."""
    if not wanted:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _tell(message: str, fg: str | None = None) -> None:
    """Print why the command ends, once for all processes."""
    if first_to_end():
        click.secho(message, fg=fg, err=True)


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _unforeseen(error: Exception) -> str:
    """Describe an error of a library; its own text may name a file or a person, so it is kept."""
    if _is_full(error):
        return (
            "MachineError: no space left on the disk. "
            "Free some space and start the same command again: it resumes."
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "medssl" in Path(frame.filename).parts] or frames
    where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    return (
        f"Unforeseen {type(error).__name__} in {where}: a fault of medssl, or a case it does not "
        "know. `medssl --debug` with the same command shows the whole of it; please report it."
    )


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    if by_torchrun():  # which sends the signal once more, and would disturb what is being ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _progress(as_json: bool) -> Any:
    from medssl.pipelines.display import Display

    return Display(quiet=as_json)


def _print_study(folder: Path, as_json: bool) -> None:
    """Print a finished study's verdicts and where its report is."""
    from medssl.reports.tables import verdict_lines

    facts_file = folder / "data.json"
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else {}
    lines = verdict_lines(folder)
    if as_json:
        _print(
            {"run_folder": str(folder), "report": str(folder / "report.html"), "verdicts": lines,
             "synthetic": bool(facts.get("synthetic"))},
            as_json,
        )  # fmt: skip
        return
    if facts.get("synthetic"):
        click.secho("SYNTHETIC DATA PROVE NOTHING.", fg="yellow", bold=True)
    for line in lines:
        click.echo(line)
    click.echo(f"Report: {folder / 'report.html'}")


def _print(facts: Mapping[str, Any], as_json: bool, depth: int = 0) -> None:
    """Print facts for people, or as JSON."""
    if as_json:
        click.echo(json.dumps(facts, indent=2, default=str))
        return
    for key, value in facts.items():
        name = "  " * depth + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            click.echo(f"{name}:" if value else f"{name}: none")
            _print(value, as_json, depth + 1)
        elif isinstance(value, (list, tuple)):
            click.echo(f"{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            click.echo(f"{name}: {value}")
