"""Verdicts in sentences, and the tables behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medssl.reports.contents import Contents, read_contents

BETTER, WORSE = "better", "worse"
NOT_WORSE, NO_DIFFERENCE = "not worse", "no difference shown"
MIXED = "mixed"
MINUS = "\N{MINUS SIGN}"

METRIC_NAMES = {
    "dice": "Dice",
    "auc": "AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}
PROTOCOL_NAMES = {
    "fine_tune": "fine-tuning",
    "linear_probe": "linear probe",
    "knn": "nearest neighbours",
    "svm_map": "SVM mAP",
}
# The protocol that answers the question comes first; others in the order of the table.
_PROTOCOL_ORDER = ("fine_tune", "linear_probe")


@dataclass(frozen=True)
class Verdict:
    """One answer: a task, a protocol and a number of labelled patients.

    Attributes:
        outcome: of the pretrained inits together: better if any is, worse if any is, mixed if
            there are both; else not worse if any is, else no difference shown.
        sentence: the answer in words.
    """

    task: str
    protocol: str
    num_labelled: int
    outcome: str
    sentence: str


def verdict_lines(folder: Path) -> list[str]:
    """Return the verdicts of a run folder, one sentence each, for a terminal."""
    contents = read_contents(folder)
    found = verdicts(contents)
    if not found:
        return [no_verdict(contents)]
    several = len({(verdict.task, verdict.protocol) for verdict in found}) > 1
    return [
        f"{verdict.task}, {protocol_name(verdict.protocol)}: {verdict.sentence}"
        if several
        else verdict.sentence
        for verdict in found
    ]


def verdicts(contents: Contents) -> list[Verdict]:
    """Return an answer for each task, protocol and number of labelled patients.

    Pretrained inits are spoken of; ``random`` only where no other is there.
    """
    found = []
    for (task, protocol), group in by_protocol(contents.comparisons):
        for _, rows in group.sort_values("label_fraction").groupby("label_fraction"):
            spoken = rows[is_pretrained(rows)]
            spoken = spoken if len(spoken) else rows
            found.append(
                Verdict(
                    task,
                    protocol,
                    int(rows["num_labelled_patients"].iloc[0]),
                    _outcome(spoken),
                    _sentence(spoken, contents.confidence),
                )
            )
    return found


def title(contents: Contents) -> str:
    """Return the question that a run answers, by what it did."""
    reference = init_name(contents.reference)
    if not len(contents.results) and contents.is_matrix:
        return "Does pretraining on these scans help? This run is not finished."
    if not len(contents.results):
        return "What did pretraining on these scans learn?"
    if not len(contents.comparisons):
        return "How well do these weights serve the task?"
    if not is_pretrained(contents.comparisons).any():
        return f"How do other weights compare with {reference}?"
    return f"Does pretraining on these scans beat {reference} weights?"


def headline(contents: Contents) -> str:
    """Return the whole study in one or two sentences."""
    table = contents.comparisons
    if not len(table):
        return no_verdict(contents)
    spoken = table[is_pretrained(table)]
    if not len(spoken):
        return (
            f"No init of this study was pretrained on its own scans: what follows compares "
            f"{init_name(contents.reference)} with {_listed(sorted(set(table['init'])))}."
        )
    reference = init_name(contents.reference)
    total = len(spoken)
    better, worse, equal = (
        int((spoken["verdict"] == word).sum()) for word in (BETTER, WORSE, NOT_WORSE)
    )
    if total == 1:
        answer = {BETTER: "Yes", WORSE: "No", NOT_WORSE: "Not shown, but it is not worse"}.get(
            spoken["verdict"].iloc[0], "Not shown"
        )
        return f"{answer}, in the one comparison this study makes."
    not_worse = f"not worse in {equal}, " if equal else ""
    counts = (
        f"Of {total} comparisons with {reference}, pretraining was better in {better}, worse in "
        f"{worse}, {not_worse}and no difference was shown in {total - better - worse - equal}."
    )
    if better and not worse:
        answer = "Yes, always" if better == total else "In part"
    elif better:
        answer = "It depends"
    elif worse:
        answer = "No"
    else:
        answer = "Not shown"
    return f"{answer}. {counts}"


def no_verdict(contents: Contents) -> str:
    """Say why there is no verdict."""
    if not len(contents.results) and contents.is_matrix:
        cells = f"{contents.num_cells} {'cell' if contents.num_cells == 1 else 'cells'}"
        return (
            f"No verdict yet: this run has not come to its comparison ({cells} of its matrix done "
            "so far). Give its command again, and it goes on."
        )
    if not len(contents.results):
        return (
            "No verdict: this run pretrained a backbone and did not evaluate it. Whether its "
            "weights help a task, medssl transfer measures."
        )
    inits = ", ".join(sorted(set(contents.results["init"])))
    return (
        f"No verdict: nothing here can be compared with {init_name(contents.reference)} "
        f"(inits of this study: {inits})."
    )


def by_protocol(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Return the rows of each (task, protocol), the protocol that answers the question first."""
    if not len(table):
        return []
    groups = [
        ((str(task), str(protocol)), rows)
        for (task, protocol), rows in table.groupby(["task", "protocol"], sort=False)
    ]
    tasks = list(dict.fromkeys(str(task) for task in table["task"]))

    def place(item: tuple[tuple[str, str], pd.DataFrame]) -> tuple[int, int]:
        (task, protocol), _ = item
        known = protocol in _PROTOCOL_ORDER
        return tasks.index(task), _PROTOCOL_ORDER.index(protocol) if known else 9

    return sorted(groups, key=place)


def is_pretrained(table: pd.DataFrame) -> pd.Series:
    """Return which rows belong to an init that was pretrained on the study's own scans."""
    return table["pretext"].fillna("").astype(str) != ""


def init_name(init: str) -> str:
    """Return an init as it is written in sentences."""
    return "ImageNet" if init == "imagenet" else init


def protocol_name(protocol: str) -> str:
    """Return a protocol as it is written in sentences."""
    return PROTOCOL_NAMES.get(protocol, protocol.replace("_", " "))


def metric_name(metric: str) -> str:
    """Return a metric as it is written in sentences."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def signed(value: float) -> str:
    """Return a difference with its sign, three decimals."""
    if not np.isfinite(value):
        return "?"
    text = f"{abs(value):.3f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def comparison_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the comparisons as text, for a table of the report."""
    return [
        {
            "num_labelled": int(row["num_labelled_patients"]),
            "init": init_name(row["init"]),
            "value": _number(row["value"]),
            "reference_value": _number(row["reference_value"]),
            "effect": signed(row["effect"]),
            "interval": _interval(row["ci_low"], row["ci_high"]),
            "verdict_interval": _interval(
                row.get("verdict_low", np.nan), row.get("verdict_high", np.nan)
            ),
            "seeds": _seed_range(row),
            "p_holm": p_text(row["p_holm"]),
            "verdict": row["verdict"],
        }
        for _, row in table.sort_values(
            ["label_fraction", "effect"], ascending=[True, False]
        ).iterrows()
    ]


def p_text(value: float) -> str:
    """Return a p value, never as zero."""
    if not np.isfinite(value):
        return "?"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sentence(rows: pd.DataFrame, confidence: float) -> str:
    rows = rows.sort_values("effect", ascending=False)
    first = rows.iloc[0]
    count = int(first["num_labelled_patients"])
    metric = metric_name(first["metric"])
    reference = init_name(first["reference"])
    level = f"{confidence * 100:g} % CI"
    better, worse = rows[rows["verdict"] == BETTER], rows[rows["verdict"] == WORSE]
    equal = rows[rows["verdict"] == NOT_WORSE]
    unclear = rows[rows["verdict"] == NO_DIFFERENCE]
    clauses = []
    if len(better):
        clauses.append(_effects(better, metric, level, "beats", reference))
    if len(worse):
        verb = "is worse" if clauses else "is worse than"
        other = "" if clauses else reference
        clauses.append(_effects(worse[::-1], metric, level, verb, other))
    if len(equal):
        least = f"not worse by as much as {equal['margin'].iloc[0]:g}"
        named = _effects(equal, metric, level, "", "")
        clauses.append(f"{named} {'is' if len(equal) == 1 else 'are'} {least} {metric}")
    if len(unclear):
        named = _effects(unclear, metric, level, "", "")
        if clauses:
            clauses.append(f"no difference is shown for {named}")
        else:
            clauses.append(f"no difference from {reference} is shown for {named}")
    plural = "patient" if count == 1 else "patients"
    return f"With {count} labelled {plural}, {'; '.join(clauses)}."


def _effects(rows: pd.DataFrame, metric: str, level: str, verb: str, reference: str) -> str:
    parts = []
    for number, (_, row) in enumerate(rows.iterrows()):
        name = init_name(row["init"])
        interval = f"{level} {signed(row['ci_low'])} to {signed(row['ci_high'])}{_alone(row)}"
        size = signed(row["effect"])
        if verb and number == 0:
            who = f"{name} {verb} {reference}".rstrip()
            parts.append(f"{who} by {_size(row)} {metric} ({interval})")
        elif verb:
            parts.append(f"{name} by {_size(row)} ({interval})")
        else:
            parts.append(f"{name} ({size} {metric}, {interval})")
    return _listed(parts)


def _alone(row: pd.Series) -> str:
    """Say why an interval that excludes 0 stands beside a verdict of no difference."""
    if row["verdict"] in (BETTER, WORSE) or not (row["ci_low"] > 0 or row["ci_high"] < 0):
        return ""
    if not np.isfinite(row.get("verdict_level", np.nan)):
        return " if it stood alone"
    count, level = int(row["family_size"]), 100 * (1 - row["verdict_level"])
    return (
        f" if it stood alone; as one of {count}, {level:.3g} % CI {signed(row['verdict_low'])} to "
        f"{signed(row['verdict_high'])}"
    )


def _size(row: pd.Series) -> str:
    """Return how much, without a sign that the verb already says."""
    return f"{abs(row['effect']):.3f}" if row["verdict"] == WORSE else signed(row["effect"])


def _outcome(rows: pd.DataFrame) -> str:
    found = set(rows["verdict"])
    if {BETTER, WORSE} <= found:
        return MIXED
    return next((word for word in (BETTER, WORSE, NOT_WORSE) if word in found), NO_DIFFERENCE)


def _listed(parts: list[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "?"


def _interval(low: float, high: float) -> str:
    if not (np.isfinite(low) and np.isfinite(high)):
        return "too few patients"
    return f"{signed(low)} to {signed(high)}"


def _seed_range(row: pd.Series) -> str:
    low, high = row.get("seed_effect_low", np.nan), row.get("seed_effect_high", np.nan)
    if row["num_seeds"] < 2:
        return "one seed"
    return f"{signed(low)} to {signed(high)}"
