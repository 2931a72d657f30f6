"""Configs refuse what they do not know, and say where and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from medssl.config import ComponentConfig, Config, component, load_config, validate_config
from medssl.errors import ConfigError


class Rotation(ComponentConfig):
    num_rotations: int = 4
    axes: tuple[Literal["X", "Y", "Z"], ...] = ("Z",)


class Hole(Config):
    size_mm: float = Field(default=16.0, gt=0)


class Inpainting(ComponentConfig):
    hole: Hole = Hole()

    @field_validator("hole")
    @classmethod
    def hole_fits(cls, hole: Hole) -> Hole:
        if hole.size_mm > 100:
            raise ValueError("The hole is larger than a head.")
        return hole


class Multi(ComponentConfig):
    tasks: list[Any]

    @field_validator("tasks")
    @classmethod
    def tasks_are_members(cls, tasks: list[Any]) -> list[Any]:
        return [Part.model_validate({"pretext": task}).pretext for task in tasks]


class Members:
    kind = "pretext task"

    def names(self) -> list[str]:
        return ["inpainting", "multi", "rotation"]

    def config_class(self, name: str) -> type[Any]:
        return {"rotation": Rotation, "inpainting": Inpainting, "multi": Multi}[name]


class Part(Config):
    pretext: component(Members())


class Training(Config):
    steps: int
    learning_rate: float = 1e-3
    precision: Literal["bf16", "fp32"] = "fp32"


class Study(Config):
    seed: int = 0
    index: Path | None = None
    pretext: component(Members()) = Rotation(name="rotation")
    training: Training = Training(steps=10)
    cells: tuple[Training, ...] = ()
    spacing_mm: tuple[float, float, float] | None = None


def study(content: dict[str, Any], *overrides: str) -> Study:
    return validate_config(content, Study, overrides, source="study.yaml")


def mistakes(content: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        study(content, *overrides)
    first, *lines = str(caught.value).splitlines()
    assert first == "study.yaml does not fit:"
    return [line.removeprefix("  ") for line in lines]


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------- reading


def test_a_file_is_read_and_validated(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\npretext: {name: rotation, num_rotations: 24}\n")
    config = load_config(path, Study)
    assert config.seed == 3
    assert isinstance(config.pretext, Rotation)
    assert config.pretext.num_rotations == 24


def test_a_missing_file_is_named_without_its_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "doe_john" / "nothing.yaml", Study)
    assert str(caught.value) == "there is no config file 'nothing.yaml' at the path given."


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a list\n", "just words\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="study.yaml holds no keys"):
        load_config(write(tmp_path, text), Study)


def test_what_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study.yaml: line 3, not valid YAML: "):
        load_config(write(tmp_path, "seed: 1\ntraining: {steps: 3\nindex: here\n"), Study)


def test_what_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(ConfigError, match="study.yaml is not UTF-8 text"):
        load_config(path, Study)


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed: 1\nseed: 2\n", 2), ("training:\n  steps: 1\n  steps: 2\n", 3)],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    expected = rf"study.yaml: line {line}, not valid YAML: the key '\w+' is given twice\."
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, text), Study)


def test_a_list_as_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1, not valid YAML: found unhashable key"):
        load_config(write(tmp_path, "? [seed]\n: 1\n"), Study)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path, Study)


def test_yaml_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    text = "cells: [&base {steps: 5}, {<<: *base, precision: bf16}]\n"
    config = load_config(write(tmp_path, text), Study)
    assert config.cells == (Training(steps=5), Training(steps=5, precision="bf16"))


# ------------------------------------------------------------------------------------ errors


def test_an_unknown_key_gets_the_nearest_one() -> None:
    assert mistakes({"sead": 3}) == ["sead: unknown key (value 3). Did you mean 'seed'?"]


def test_an_unknown_key_like_no_other_gets_the_known_ones() -> None:
    assert mistakes({"training": {"steps": 1, "zzz": "x"}}) == [
        "training.zzz: unknown key (value 'x'). Known keys: steps, learning_rate, precision."
    ]


def test_an_unknown_key_in_a_list_gets_its_position_and_the_nearest() -> None:
    assert mistakes({"cells": [{"steps": 1}, {"steps": 1, "precison": "bf16"}]}) == [
        "cells.1.precison: unknown key (value 'bf16'). Did you mean 'precision'?"
    ]


def test_a_wrong_type_says_what_was_found_and_what_is_wanted() -> None:
    (line,) = mistakes({"training": {"steps": "many"}})
    assert line.startswith("training.steps: input should be a valid integer")
    assert line.endswith("(found 'many').")


def test_a_wrong_choice_lists_the_choices() -> None:
    assert mistakes({"training": {"steps": 1, "precision": "fp8"}}) == [
        "training.precision: input should be 'bf16' or 'fp32' (found 'fp8')."
    ]


def test_a_missing_key_is_named() -> None:
    assert mistakes({"training": {}}) == ["training.steps: is required and missing."]


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes({"sead": 1, "training": {"stps": 2}})) == 3


def test_a_long_value_is_cut() -> None:
    (line,) = mistakes({"seed": "x" * 500})
    assert line.endswith("…).")
    assert len(line) < 200


# -------------------------------------------------------------------------------- components


def test_a_component_may_be_given_by_name_alone() -> None:
    assert study({"pretext": "inpainting"}) == study({"pretext": {"name": "inpainting"}})


def test_a_component_that_is_already_a_config_is_kept() -> None:
    rotation = Rotation(name="rotation", num_rotations=10)
    assert Study(pretext=rotation).pretext is rotation


def test_a_misspelt_component_gets_the_nearest_and_all() -> None:
    (line,) = mistakes({"pretext": {"name": "rotatoin"}})
    assert line.startswith(
        "pretext: there is no pretext task 'rotatoin'. Did you mean 'rotation'? "
        "There are: inpainting, multi, rotation"
    )


@pytest.mark.parametrize("value", [3, {"num_rotations": 4}, {"name": 3}, [], None])
def test_a_component_without_a_name_says_how_to_write_it(value: object) -> None:
    (line,) = mistakes({"pretext": value})
    assert line.startswith(
        "pretext: give the pretext task as {name: …}; there are: inpainting, multi, rotation"
    )


def test_a_mistake_inside_a_component_has_its_whole_path() -> None:
    content = {"pretext": {"name": "inpainting", "hole": {"size_m": 3}}}
    assert mistakes(content) == [
        "pretext.hole.size_m: unknown key (value 3). Did you mean 'size_mm'?"
    ]


def test_a_mistake_inside_a_list_of_components_has_its_whole_path() -> None:
    content = {"pretext": {"name": "multi", "tasks": ["inpainting", {"name": "rotatoin"}]}}
    (line,) = mistakes(content)
    assert line.startswith("pretext.tasks")
    assert "Did you mean 'rotation'?" in line


def test_a_rule_between_fields_speaks_in_its_own_words() -> None:
    content = {"pretext": {"name": "inpainting", "hole": {"size_mm": 300}}}
    (line,) = mistakes(content)
    assert line.startswith("pretext.hole: the hole is larger than a head (found ")


def test_a_union_with_none_still_finds_the_nearest_key() -> None:
    class Holder(Config):
        training: Training | None = None

    with pytest.raises(ConfigError, match="Did you mean 'precision'"):
        validate_config({"training": {"steps": 1, "precison": "bf16"}}, Holder)


# --------------------------------------------------------------------------------- overrides


def test_overrides_replace_nested_values_and_are_read_as_yaml() -> None:
    config = study(
        {"training": {"steps": 1}}, "training.steps=7", "spacing_mm=[1, 1, 2.5]", "index=data/index"
    )
    assert config.training.steps == 7
    assert config.spacing_mm == (1.0, 1.0, 2.5)
    assert config.index == Path("data/index")


def test_overrides_may_add_a_section() -> None:
    assert study({}, "training.steps=7").training.steps == 7


def test_overrides_reach_into_lists_by_position() -> None:
    content = {"cells": [{"steps": 1}, {"steps": 2}]}
    assert study(content, "cells.1.steps=9").cells[1].steps == 9
    assert study(content, "cells.0={steps: 5}").cells[0].steps == 5


def test_overrides_reach_into_a_component_given_by_name_alone() -> None:
    config = study({"pretext": "rotation"}, "pretext.num_rotations=24")
    assert config.pretext == Rotation(name="rotation", num_rotations=24)


def test_overrides_reach_into_a_component_in_a_list() -> None:
    content = {"pretext": {"name": "multi", "tasks": ["inpainting", "rotation"]}}
    config = study(content, "pretext.tasks.1.num_rotations=24")
    assert config.pretext.tasks[1] == Rotation(name="rotation", num_rotations=24)


def test_overrides_leave_the_content_given_alone() -> None:
    content = {"training": {"steps": 1}}
    study(content, "training.steps=7")
    assert content == {"training": {"steps": 1}}


def test_a_value_may_contain_an_equals_sign() -> None:
    assert study({}, "index=a=b").index == Path("a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' is not of the form section.key=value."),
        ("=3", "override '=3' is not of the form section.key=value."),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML."),
        ("seed.x=1", "override 'seed.x=1': seed is a single value, not a section."),
        ("cells.2.steps=1", "override 'cells.2.steps=1': cells.2 must be a position from 0 to 1."),
        (
            "cells.0.steps.x=1",
            "override 'cells.0.steps.x=1': cells.0.steps is a single value, not a section.",
        ),
        ("cells.x=1", "override 'cells.x=1': cells.x must be a position from 0 to 1."),
        ("cells.-1=1", "override 'cells.-1=1': cells.-1 must be a position from 0 to 1."),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study({"seed": 1, "cells": [{"steps": 1}, {"steps": 2}]}, override)
    assert str(caught.value) == message


def test_an_override_into_an_empty_list_says_that_it_is_empty() -> None:
    with pytest.raises(ConfigError, match=r"cells\.0 lies in an empty list"):
        study({"cells": []}, "cells.0.steps=1")


def test_an_override_of_a_section_left_empty_fills_it() -> None:
    assert study({"training": None}, "training.steps=7").training.steps == 7


# ------------------------------------------------------------------------ digest and output

CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(-(2**40), 2**40),
        "spacing_mm": st.one_of(st.none(), st.tuples(*[st.floats(0.1, 10)] * 3)),
        "training": st.fixed_dictionaries({"steps": st.integers(0, 10**6)}),
        "pretext": st.sampled_from(["rotation", {"name": "inpainting", "hole": {"size_mm": 3.5}}]),
    },
)


@given(content=CONTENTS)
def test_a_resolved_config_reads_back_as_itself(content: dict[str, Any]) -> None:
    config = study(content)
    again = study(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.digest() == config.digest()


@given(content=CONTENTS)
def test_the_digest_does_not_depend_on_the_order_of_keys(content: dict[str, Any]) -> None:
    assert study(content).digest() == study(dict(reversed(content.items()))).digest()


def test_the_digest_notices_every_change_down_to_a_component() -> None:
    digests = {
        study({}).digest(),
        study({"seed": 1}).digest(),
        study({"pretext": {"name": "rotation", "num_rotations": 10}}).digest(),
    }
    assert len(digests) == 3


def test_a_config_cannot_be_edited() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        study({}).seed = 3  # type: ignore[misc]
