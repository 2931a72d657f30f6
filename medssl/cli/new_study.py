"""The command that looks at a folder, asks a few questions, and writes a config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from medssl.cli.options import JSON, PATH, WORKING_CODES, Command
from medssl.cli.output import print_json, show_progress
from medssl.errors import ConfigError, DataError


@click.command(
    cls=Command,
    examples=[
        "medssl init data/hippocampus",
        "medssl init data/hippocampus --yes --classes anterior,posterior --out ours.yaml",
        "medssl init /archive/export --labels labels.csv --label-column diagnosis --effort full",
        "medssl init /archive/export --task none --out pretrain.yaml",
    ],
    writes=(
        "One YAML file, study.yaml or where --out says: a study, or without labels a pretraining. "
        "It is complete and passes medssl config check."
    ),
    codes=WORKING_CODES,
)
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The file. Default: study.yaml, or pretrain.yaml.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--yes", is_flag=True, help="Ask nothing: take options, and defaults for the rest.")
@click.option(
    "--labels", type=PATH,
    help="Folder of masks named like the scans, or a table (CSV, Parquet) with a row for each "
    "scan, series or patient. Default: what is found in the folder and beside it.",
)  # fmt: skip
@click.option(
    "--task", type=click.Choice(["segmentation", "classification", "regression", "none"]),
    help="What the labels are for; none: pretraining alone. Default: what the labels look like.",
)  # fmt: skip
@click.option("--label-column", help="Column of the table that holds the labels.")
@click.option("--classes", metavar="NAME,NAME", help="Names of the masks' values 1, 2, …")
@click.option(
    "--patients", metavar="TABLE|PATTERN",
    help="Whose NIfTI files are: a table with a column of file names and one called patient, or a "
    "regular expression with one group, searched in the path.",
)  # fmt: skip
@click.option(
    "--dims", type=click.Choice(["2D", "3D"]),
    help="Whether the network sees slices or volumes. Default: 2D, which is faster.",
)  # fmt: skip
@click.option(
    "--plane", type=click.Choice(["sagittal", "coronal", "axial"]),
    help="Of slices of 3D scans. Default: the one in which the scans were taken.",
)  # fmt: skip
@click.option(
    "--effort", type=click.Choice(["look", "full"]),
    help="look: minutes to an hour, one seed. full: hours to days, several seeds. Default: look.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: auto.")
@JSON
def init(folder: Path, yes: bool, as_json: bool, **given: Any) -> None:
    """Look at a folder of scans, ask a few questions, and write the config of a first study.

    Some files are read, nothing in the folder is changed. Spacing, crops, batch and numbers of
    labelled patients follow from what is there; a comment says why. Every question can be answered
    by an option, and --yes asks none. Paths in the config are as given: relative ones hold where
    the command was given.
    """
    asks = not yes and not as_json and may_ask()
    usual = "pretrain.yaml" if given["task"] == "none" else "study.yaml"
    target: Path = given["out"] or Path(usual)
    _check_target(target, force=given["force"])
    with show_progress(as_json) as progress:
        answers = _gather(folder, given, _Asker(asks, progress), progress)
    plan, notes = answers
    if plan.labels.task == "none" and given["out"] is None:
        target = Path("pretrain.yaml")
        _check_target(target, force=given["force"])
    from medssl.atomic import atomic_write
    from medssl.pipelines.new_study_text import config_text, next_commands

    atomic_write(target, config_text(plan, target))
    commands = next_commands(plan, target)
    if as_json:
        kind = "pretrain" if plan.labels.task == "none" else "study"
        print_json({"config": str(target), "kind": kind, "notes": notes, "next": commands})
        return
    click.echo(f"Config: {target}")
    for note in notes:
        click.echo(f"note: {note}")
    click.echo("Next:")
    for command in commands:
        click.echo(f"  {command}")


def may_ask() -> bool:
    """Return whether there is somebody to ask."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise ConfigError(f"{target.name!r} is a folder; --out names the file to write.")
    if target.exists() and not force:
        raise ConfigError(
            f"there is a file {target.name!r} already. Choose another with --out, or replace it "
            "with --force."
        )


class _Asker:
    """Asks questions, or takes the default where nobody is to be asked."""

    def __init__(self, asks: bool, progress: Any) -> None:
        self.asks = asks
        self._progress = progress

    def ask(self, question: str, default: Any, **options: Any) -> Any:
        if not self.asks:
            return default
        self._progress.pause()
        return click.prompt(question, default=default, err=True, **options)

    def tell(self, text: str) -> None:
        if self.asks:
            self._progress.pause()
            click.echo(text, err=True)


def _gather(
    folder: Path, given: dict[str, Any], asker: _Asker, progress: Any
) -> tuple[Any, list[str]]:
    """Return the plan of the config, and what is worth saying of it."""
    from medssl.pipelines import new_study as choosing
    from medssl.scans import survey as looking

    layout = looking.find_layout(folder)
    if given["labels"] is not None:
        layout = looking.keep_out(layout, given["labels"])
    patients = _patients(given["patients"], layout)
    with looking.surveyed(layout, patients, progress) as survey:
        measures = choosing.measure(survey)
        asker.tell(choosing.in_words(survey, measures))
        notes = choosing.notes_on(survey, patients)
        labels = _labels(given, asker, survey, layout)
        dims = given["dims"] or "2D"
        if measures.dims == "3D" and given["dims"] is None:
            dims = asker.ask("Slices (2D, faster) or volumes (3D)", "2D",
                             type=click.Choice(["2D", "3D"]))  # fmt: skip
        effort = given["effort"] or asker.ask(
            "A first look (minutes to an hour), or the full study (hours to days)", "look",
            type=click.Choice(["look", "full"]),
        )  # fmt: skip
        device = given["device"] or _device()
        plan = choosing.make_plan(
            survey, layout, patients, labels, crop_dims=int(dims[0]), plane=given["plane"],
            effort=effort, device=device,
        )  # fmt: skip
    if labels.task == "segmentation" and not given["classes"] and not asker.asks:
        notes.append("the classes are called class_1 and so on; --classes names them")
    if not plan.is_here:
        notes.append(f"no ImageNet weights are here: medssl weights fetch {plan.backbone}")
    return plan, notes


def _device() -> str:
    """Return cpu where there is nothing else: how much is computed depends on it."""
    import torch

    return "auto" if torch.cuda.is_available() else "cpu"


def _patients(given: str | None, layout: Any) -> Any:
    from medssl.config import validate_config
    from medssl.scans.patients import PatientsConfig
    from medssl.scans.survey import find_patients

    if given is None:
        return find_patients(layout.tables, layout.scans)
    if not Path(given).is_file():
        if "(" not in given:
            raise ConfigError(
                f"--patients: there is no table {Path(given).name!r}, and a pattern needs one "
                "group in parentheses."
            )
        return validate_config({"pattern": given}, PatientsConfig, source="--patients")
    found = find_patients((Path(given),), layout.scans)
    if found is None:
        raise DataError(
            f"--patients: the table {Path(given).name!r} has no column that names every scan file "
            "with a column called patient beside it."
        )
    return found


def _labels(given: dict[str, Any], asker: _Asker, survey: Any, layout: Any) -> Any:
    """Return the labels that were given, found, or named in answer to a question."""
    from medssl.pipelines import new_study as choosing

    if given["task"] == "none":
        return choosing.Labels("none")
    path = given["labels"]
    if path is None:
        found = choosing.find_labels(survey, layout)
        answer = asker.ask(
            "Labels: a folder of masks, or a table (- for none)", str(found or "-")
        )  # fmt: skip
        path = None if answer == "-" else Path(answer)
    if path is None:
        if given["task"] is not None:
            raise ConfigError(f"no labels were found for {given['task']}. Name them: --labels.")
        return choosing.Labels("none")
    column = given["label_column"]
    if column is None and asker.asks and path.is_file():
        columns = choosing.label_columns(survey, path)
        if len(columns) > 1:
            column = asker.ask("Column of the labels", columns[0], type=click.Choice(columns))
    classes = [name.strip() for name in (given["classes"] or "").split(",") if name.strip()]
    labels = choosing.read_labels(survey, path, task=given["task"], column=column, classes=classes)
    if labels.task == "segmentation" and not classes and asker.asks:
        names = asker.ask("Names of the masks' values, from 1", ",".join(labels.classes))
        classes = [name.strip() for name in names.split(",") if name.strip()]
        labels = choosing.read_labels(survey, path, task=given["task"], classes=classes)
    return labels
