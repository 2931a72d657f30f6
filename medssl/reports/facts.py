"""What a report says of data, limits and provenance."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from medssl.models.origin import taken_to_3d
from medssl.reports.contents import Contents, name_of
from medssl.reports.tables import init_name

# Below these, an interval is wide or a verdict fragile, and the report says so.
FEW_PATIENTS = 20
FEW_SEEDS = 5

_FEW_TENSORS = 3
"""Tensors that are named one by one where they were adapted alike."""

_HELD_OUT = (
    "Splits are by patient. Losses and scores of validation come from fixed puzzles, cut from "
    "validation patients who were not trained on; patients of the test side took no part in it."
)

Rows = list[tuple[str, str]]


def warnings_of(contents: Contents) -> list[str]:
    """Return what a reader must know before the verdict."""
    found = leaks_of(contents)
    unused = int((contents.data.get("splits") or {}).get("unused") or 0)
    if unused:
        found.append(
            "These are results of validation patients, to choose a recipe by, and no evidence: "
            f"{unused} test patients took no part. Run the chosen recipe once with "
            "splits.evaluate_on=test."
        )
    stopped = [run.name for run in contents.pretraining if run.status not in ("FINISHED", "")]
    if stopped:
        found.append(f"Pretraining did not run to its end: {', '.join(stopped)}.")
    if len(contents.results) and "started" in contents.provenance and not _is_finished(contents):
        found.append(
            "This run has not come to its end; its numbers may be those of an earlier one."
        )
    if contents.num_failed:
        found.append(
            f"{contents.num_failed} {_plural(contents.num_failed, 'cell', 'cells')} of the matrix "
            "failed and "
            f"{_plural(contents.num_failed, 'is', 'are')} missing here; failures.csv lists "
            f"{_plural(contents.num_failed, 'it', 'them')}, and the same command runs "
            f"{_plural(contents.num_failed, 'it', 'them')} again."
        )
    found += [
        f"Pretext task {part['task']} of {init_name(name)}: {part['words']}."
        for name, validation in contents.validations.items()
        for part in validation.get("parts", [])
        if part["state"] in ("stuck", "suspicious", "nothing counts") or part.get("beaten_by")
    ]
    return found


def leaks_of(contents: Contents) -> list[str]:
    """Return what is known of test patients, or of their images, among those trained on."""
    found = []
    overlap = int(contents.data.get("test_patients_in_pool") or 0)
    if overlap:
        favours = (
            "The comparison favours the pretrained inits."
            if len(contents.results)
            else "A comparison on them would favour these weights."
        )
        found.append(
            f"{overlap} test {_plural(overlap, 'patient was', 'patients were')} in the pretraining "
            f"pool. {favours}"
        )
    copies = int(contents.data.get("test_images_elsewhere") or 0)
    if copies:
        found.append(
            f"The {_plural(copies, 'image', 'images')} of {copies} test "
            f"{_plural(copies, 'scan is', 'scans are')} also among those trained on, under other "
            "names. All numbers here are too good by an unknown amount."
        )
    repeated = int(contents.data.get("test_images_repeated") or 0)
    if repeated:
        found.append(
            f"{repeated} test scans show the same images as those of other test patients. "
            "Intervals take them for more people than they are."
        )
    unknown = [init_name(label) for label in contents.data.get("inits_not_looked_into") or ()]
    if unknown:
        found.append(
            "Whether copies of test images were in the pretraining of "
            f"{', '.join(unknown)} is not known: no hashes of its images came with the checkpoint."
        )
    return found


def _is_finished(contents: Contents) -> bool:
    return bool(contents.provenance.get("finished"))


def pretraining_method(contents: Contents) -> str:
    """Say how a run that only pretrained went about it; empty for all others."""
    if len(contents.results) or not contents.pretraining:
        return ""
    settings = contents.pretraining[0].params
    config = contents.config
    backbone, init = name_of(config.get("backbone")), name_of(config.get("init")) or "random"
    start = taken_to_3d(init, backbone) or {"imagenet": "ImageNet"}.get(init, init)
    weights = "the weights of a checkpoint" if init == "checkpoint" else f"{start} weights"
    steps = f"{_count(settings.get('steps'))} steps of {settings.get('global_batch_size')} images"
    task = f"the pretext task {settings.get('pretext')}"
    if len(contents.pretraining) > 1:  # a study that has not come to its evaluation
        return "Each backbone was trained with its pretext task; no label was read. " + _HELD_OUT
    return (
        f"One backbone ({backbone}) started from {weights} and was trained with {task} for "
        f"{steps}; no label was read. {_HELD_OUT}"
    )


def pretext_rows(contents: Contents) -> list[dict[str, str]]:
    """Return how each pretext task did on validation patients, one row a task."""
    return [
        {
            "init": init_name(name),
            "task": str(part["task"]),
            "metric": str(part["metric"]),
            "value": _shown(part["value"]),
            "trivial": "; ".join(
                [
                    _shown(part["trivial"]),
                    *(f"{name} {value:.3g}" for name, value in part.get("rivals", {}).items()),
                ]
            ),
            "healthy": " to ".join(f"{bound:.3g}" for bound in part["healthy_range"]),
            "state": str(part["state"]),
        }
        for name, validation in contents.validations.items()
        for part in validation.get("parts", [])
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def limits(contents: Contents) -> list[str]:
    """Return what this study cannot say."""
    table = contents.comparisons if len(contents.comparisons) else contents.results
    if not len(table):
        return ["This run says how well puzzles are solved, not whether that helps a task."]
    num_seeds, num_patients = int(table["num_seeds"].min()), int(table["num_patients"].min())
    found = []
    if num_seeds == 1:
        found.append(
            "One seed for each cell: intervals and verdicts speak about these very training runs "
            "on other patients. Nothing is known of other runs, which may fall differently; a "
            f"difference may be one of luck. At least {FEW_SEEDS} are needed for a verdict to lean "
            "on."
        )
    elif num_seeds < FEW_SEEDS:
        rough = (
            " Two seeds hardly show how much runs differ: intervals are wider than they would have "
            "to be."
        )
        found.append(
            f"Only {num_seeds} seeds for each cell.{rough if num_seeds == 2 else ''} At least "
            f"{FEW_SEEDS} are needed for a verdict to lean on."
        )
    if num_patients < FEW_PATIENTS:
        found.append(
            f"Only {num_patients} test {_plural(num_patients, 'patient', 'patients')}: intervals "
            "are rough."
        )
    found += [
        (
            "The intervals speak about other patients of the same kind"
            f"{', and about other training runs from the same weights' if num_seeds > 1 else ''}. "
            "They do not cover other hospitals, scanners or tasks."
        ),
        (
            "“No difference shown” does not mean equal: the interval says how large a difference "
            "remains possible."
        ),
        (
            "Each init was pretrained once. A recipe that was tuned longer may do better, for the "
            "pretrained inits as for the reference."
        ),
    ]
    return found


def data_rows(contents: Contents) -> Rows:
    """Return the data's summary."""
    data = contents.data
    if not data:
        return []
    splits = data.get("splits") or {}
    spacing = data.get("spacing_mm")
    modalities = data.get("modalities") or {}
    rows = [
        ("Data set", str(data.get("dataset") or "own scans")),
        ("Licence", str(data.get("licence") or "")),
        ("Scans used", _count(data.get("num_scans"))),
        ("Patients", _count(data.get("num_patients"))),
        ("Modalities", ", ".join(f"{key or 'not stated'} {n}" for key, n in modalities.items())),
        ("Spacing", " × ".join(f"{mm:g}" for mm in spacing) + " mm" if spacing else "as scanned"),
        (
            "Patients for training, validation, test",
            ", ".join(str(splits.get(part, "?")) for part in ("train", "val", "test")),
        ),
        ("Patients in the pretraining pool", _count(data.get("pretraining_pool"))),
        ("Test patients in the pretraining pool", _count(data.get("test_patients_in_pool"))),
        ("Test scans whose image is elsewhere too", _count(data.get("test_images_elsewhere"))),
        ("Test scans of two patients with one image", _count(data.get("test_images_repeated"))),
        ("Digest of the index", _short(data.get("index_digest"))),
    ]
    return [(label, value) for label, value in rows if value]


def rejection_rows(contents: Contents) -> Rows:
    """Return how many files or series were not used, by reason."""
    rejected = contents.data.get("rejected") or {}
    return [
        (str(reason).replace("_", " "), str(count))
        for reason, count in sorted(rejected.items(), key=lambda item: -item[1])
    ]


def init_rows(contents: Contents) -> list[dict[str, str]]:
    """Return what was loaded into the backbone for each init."""
    rows = []
    for name, report in (contents.provenance.get("inits") or {}).items():
        adapted = report.get("adapted") or []
        rows.append(
            {
                "init": init_name(str(name)),
                "source": str(report.get("source", "")),
                "loaded": f"{report.get('loaded', 0)} ({report.get('percent', 0):.0f} %)",
                "adapted": _adapted(adapted),
                "sha256": _short(report.get("sha256")),
            }
        )
    return rows


def _adapted(adapted: Iterable[tuple[str, str]]) -> str:
    """Name what was adapted, tensors that were adapted alike together."""
    alike: dict[str, list[str]] = {}
    for tensor, how in adapted:
        alike.setdefault(how, []).append(tensor)
    parts = [
        f"{', '.join(tensors)}: {how}"
        if len(tensors) <= _FEW_TENSORS
        else f"{len(tensors)} tensors ({tensors[0]} to {tensors[-1]}): {how}"
        for how, tensors in alike.items()
    ]
    return "; ".join(parts) or "none"


def provenance_rows(contents: Contents) -> Rows:
    """Return when, where and with which code the run was made."""
    facts = contents.provenance
    machine = facts.get("machine") or {}
    memory = machine.get("memory_gib")
    described = [
        str(machine.get("system", "")),
        str(machine.get("processor", "")),
        f"{machine['num_cores']} cores" if machine.get("num_cores") else "",
        f"{memory:g} GiB memory" if isinstance(memory, int | float) else "",
        ", ".join(machine.get("accelerators") or []) or ("no GPU" if machine else ""),
    ]
    rows = [
        ("Started", moment(facts.get("started"))),
        ("Finished", moment(facts.get("finished"))),
        ("Took", _duration(facts.get("started"), facts.get("finished"))),
        ("Interrupted and resumed", _count(facts.get("restarts") or None)),
        ("Machine", ", ".join(part for part in described if part)),
        ("Code", str(facts.get("git_commit") or "")),
        ("Digest of the configuration", _short(facts.get("config_digest"))),
        ("Digest of the prepared scans", _short(facts.get("store_digest"))),
    ]
    return [(label, value) for label, value in rows if value]


def version_rows(contents: Contents) -> Rows:
    """Return the versions of the packages that can change a result."""
    versions: dict[str, Any] = contents.provenance.get("versions") or {}
    return [(str(name), str(version)) for name, version in versions.items()]


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _count(value: Any) -> str:
    return "" if value is None else f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _short(digest: Any) -> str:
    return f"{str(digest)[:16]}…" if digest else ""


def moment(text: Any) -> str:
    """Return a time of day as people read it; empty where it is not known."""
    found = _parsed(text)
    return found.strftime("%Y-%m-%d %H:%M UTC") if found else ""


def _duration(started: Any, finished: Any) -> str:
    first, last = _parsed(started), _parsed(finished)
    if first is None or last is None:
        return ""
    seconds = max(0, round((last - first).total_seconds()))
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _parsed(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None
