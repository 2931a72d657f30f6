"""What a backbone is pretrained on: the pool, or a share of its patients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.pipelines import study
from medssl.pipelines.pretraining import draw_splits, pool_of
from medssl.pipelines.sections import SplitConfig
from medssl.scans.splits import Splits
from studies import settings

PATIENTS = [f"p{number:02}" for number in range(20)]
STORE: Any = SimpleNamespace(entries=pd.DataFrame({"patient_key": PATIENTS}))
SPLITS = Splits(
    0, tuple(PATIENTS[:8]), tuple(PATIENTS[16:18]), (PATIENTS[18],), unused=(PATIENTS[19],)
)


def job(fraction: float, seed: int = 0) -> Any:
    return SimpleNamespace(section=SimpleNamespace(pool_fraction=fraction), seed=seed)


def test_the_pool_is_all_patients_who_are_not_held_out():
    assert pool_of(job(1.0), STORE, SPLITS) == PATIENTS[:16]


def test_smaller_shares_of_the_pool_lie_inside_larger_ones():
    quarter, half = (pool_of(job(share), STORE, SPLITS) for share in (0.25, 0.5))
    assert (len(quarter), len(half)) == (4, 8)
    assert {*quarter} < {*half} < {*PATIENTS[:16]}
    assert pool_of(job(0.5, seed=1), STORE, SPLITS) != half
    assert len(pool_of(job(0.001), STORE, SPLITS)) == 1


def test_a_config_says_whom_a_recipe_is_chosen_on(tmp_path):
    patients = dict.fromkeys(PATIENTS)
    drawn = draw_splits(SplitConfig(), patients, seed=1)
    chosen_on = draw_splits(SplitConfig(evaluate_on="validation"), patients, seed=1)
    assert chosen_on == drawn.for_choices(patients)
    drawn.write(tmp_path / "splits.json")
    from_file = SplitConfig(file=tmp_path / "splits.json", evaluate_on="validation")
    assert draw_splits(from_file, patients, seed=9) == chosen_on


@pytest.mark.parametrize(
    ("init", "text"),
    [
        ({"init": "random", "pretext": "rotation", "decoder": True}, "rotation leaves no decoder"),
        ({"init": "random", "decoder": True}, "an init without a pretext leaves no decoder"),
    ],
)
def test_a_decoder_that_nobody_trains_is_refused_before_anything_is_written(tmp_path, init, text):
    content = settings(tmp_path) | {"inits": {"random": {"init": "random"}, "other": init}}
    content["statistics"] = {"reference": "random"}
    config = validate_config(content, study.StudyConfig)
    with pytest.raises(ConfigError, match=f"inits.other.decoder: {text}"):
        study.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
