"""Commands about weight files: list, fetch, verify, register.

For a machine without a network: fetch on one that has it, verify where the file arrives, and
name the folder in the config: init: {name: imagenet, path: /media/stick}.
"""

from __future__ import annotations

from pathlib import Path

import click

from medssl.cli.options import (
    JSON,
    PATH,
    Command,
    Group,
    out,
)
from medssl.cli.output import fail_after_answer, print_facts, print_json, show_progress
from medssl.errors import ConfigError


@click.group(
    cls=Group,
    examples=[
        "medssl weights fetch torchvision:resnet50 --out /media/stick",
        "medssl weights verify /media/stick",
    ],
)
def weights() -> None:
    """Weight files: what is published and what is here; fetch, verify, register.

    For a machine without a network: fetch on one that has it, verify where the file arrives, and
    name the folder in the config: init: {name: imagenet, path: /media/stick}.
    """


@weights.command(
    "list",
    cls=Command,
    examples=[
        "medssl weights list",
    ],
    codes=(0,),
)
@JSON
def weights_list(as_json: bool) -> None:
    """List the ImageNet weights that backbones can take, and where they are on this machine."""
    from medssl.pipelines import weights as pipeline

    rows = pipeline.table()
    if as_json:
        print_json(pipeline.facts_of(rows))
        return
    for line in pipeline.describe(rows):
        click.echo(line)


@weights.command(
    "fetch",
    cls=Command,
    examples=[
        "medssl weights fetch torchvision:resnet50 --out /media/stick",
    ],
    writes="One weight file in the folder of --out, or in the torch hub cache ($TORCH_HOME).",
    codes=(0, 2, 3, 4, 130, 143),
)
@click.argument("backbone", metavar="FAMILY:VARIANT")
@out("Folder to write the file into. Default: the torch hub cache, where init imagenet looks.")
@click.option("--sha256", help="The hash it must have, where its publisher states none.")
@JSON
def weights_fetch(backbone: str, out: Path | None, sha256: str | None, as_json: bool) -> None:
    """Download the ImageNet weights of a backbone; what is not the published file is not kept."""
    from medssl.pipelines import weights as pipeline

    with show_progress(as_json) as progress:
        got = pipeline.fetch(backbone, out, sha256=_hash(sha256), progress=progress)
    print_facts({"file": got.path, "sha256": got.sha256, "checked": got.text}, as_json)


@weights.command(
    "verify",
    cls=Command,
    examples=[
        "medssl weights verify /media/stick",
        "medssl weights verify runs/ours/checkpoints/rotation",
    ],
    codes=(0, 2, 3, 4),
)
@click.argument("target", metavar="FILE|FOLDER|all", default="all")
@click.option("--sha256", help="The hash the file must have.")
@JSON
def weights_verify(target: str, sha256: str | None, as_json: bool) -> None:
    """Compare weight files and checkpoints with the hashes that were stated for them.

    Exit code 3: a file is not what it should be; 4: there is none.

    Without a target, all weights that this machine's caches hold.
    """
    from medssl.pipelines import weights as pipeline

    checks = pipeline.verify(None if target == "all" else Path(target), sha256=_hash(sha256))
    if as_json:
        print_json(pipeline.facts_of(checks))
    else:
        for check in checks:
            mark = "ok  " if check.is_right else "FAIL"
            click.echo(f"{mark}  {check.file}: {check.text} (sha256 {check.sha256[:12] or '?'})")
    problem = pipeline.failure(checks)
    if problem is not None:
        fail_after_answer(problem, as_json)


@weights.command(
    "register",
    cls=Command,
    examples=[
        "medssl weights register runs/ours heart",
        "medssl weights register runs/ours/checkpoints/rotation heart --alias champion",
    ],
    writes="To MLflow's registry, at MLFLOW_TRACKING_URI or the database beside the run folder.",
    codes=(0, 2, 3, 4),
)
@click.argument("source", metavar="RUN|CHECKPOINT", type=PATH)
@click.argument("name")
@click.option("--alias", help="Name that is moved to this version. Default: candidate.")
@JSON
def weights_register(source: Path, name: str, alias: str | None, as_json: bool) -> None:
    """Register pretrained backbones as versions of a model in MLflow's registry.

    A config takes one as: {name: checkpoint, path: "models:/NAME@ALIAS"}. MLflow serves one:
    mlflow models predict -m models:/NAME@ALIAS -i paths.csv -t csv --env-manager local

    Of a study, every pretrained backbone becomes a version with the alias candidate_INIT; one that
    the study's verdicts name for a task gets best_for_TASK. Repeating it adds nothing twice.
    """
    from medssl.pipelines import publish

    versions = [
        {"model": version.uri, **publish.facts_of(version)}
        for version in publish.run(source, name, alias)
    ]
    if as_json:
        print_facts({"versions": versions}, as_json)
        return
    for version in versions:
        print_facts(version, as_json)


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
