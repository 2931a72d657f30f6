"""The few settings and labels of a run that people filter runs by; its config is an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssl.config import ComponentConfig, Config
from medssl.pipelines.sections import EvaluationSection


def evaluation_params(
    config: Config,
    section: EvaluationSection,
    backbone: ComponentConfig,
    inits: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Return the settings of a study or transfer.

    Args:
        config: the whole of it, for its digest and, of a study, its name.
        section, backbone, inits, seed: of it.
    """
    name = getattr(config, "name", None)
    return {
        **({"name": name} if name else {}),
        "seed": seed,
        "backbone": backbone.model_dump(mode="json"),
        "inits": ", ".join(inits),
        "tasks": ", ".join(getattr(task, "label", None) or task.name for task in section.tasks),
        "protocols": ", ".join(protocol.name for protocol in section.protocols),
        "seeds": len(section.matrix.seeds),
        "config_digest": config.digest(),
    }


def init_tags(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return labels that say what an init loaded, without the name of its file.

    Args:
        report: see `medssl.models.inits.base.LoadReport.to_dict`.
    """
    tags: dict[str, Any] = {"init_percent": round(float(report.get("percent") or 0.0), 1)}
    if report.get("sha256"):
        tags["init_sha256"] = str(report["sha256"])[:12]
    if report.get("origin"):
        tags["init_origin"] = report["origin"]
    return tags
