"""The model card: what weights are, where they come from, what they did, and what they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medssl import __version__
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import Contract, lineage


@dataclass(frozen=True)
class Result:
    """One verdict on a downstream task.

    Attributes:
        task, protocol, num_labelled_patients, metric: what was measured.
        value: the metric, the mean over seeds.
        low, high: its interval over patients; None: none was computed.
        num_patients: of the test side.
        against: the difference from another init, in words.
    """

    task: str
    protocol: str
    num_labelled_patients: int
    metric: str
    value: float
    low: float | None
    high: float | None
    num_patients: int
    against: str = ""

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "none"
        return f"{self.low:.3f} to {self.high:.3f}"


def render_card(
    title: str,
    backbone: Backbone,
    contract: Contract,
    *,
    data: Mapping[str, Any],
    validation: Mapping[str, Any],
    results: Sequence[Result],
    licence: str,
    imagenet_licence: str | None,
) -> str:
    """Return a model card in Markdown: counts and digests, no path, no patient, no key.

    Args:
        title: what the weights are called.
        backbone: the network.
        contract: its contract.
        data: the run's ``data.json``; may be empty.
        validation: ``validation.json`` beside the checkpoint; may be empty.
        results: of the run, on this init.
        licence: of the weights.
        imagenet_licence: of the weights that training started from, if it did.
    """
    environment = Environment(
        loader=PackageLoader("medssl.models.export"),
        autoescape=False,  # noqa: S701  (Markdown, not HTML; all values are medssl's own)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    settings = {k: v for k, v in (contract.pretext or {}).items() if k != "name"}
    return environment.get_template("MODEL_CARD.md.j2").render(
        title=title,
        backbone=backbone,
        contract=contract,
        data=data,
        num_scans=contract.num_scans,
        parts=validation.get("parts", []),
        step=validation.get("step"),
        results=results,
        licence=licence,
        imagenet_licence=imagenet_licence,
        pretext_settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        version=__version__,
        lineage=lineage(contract),
    )
