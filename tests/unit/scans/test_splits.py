from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medssl.errors import ConfigError, DataError, LeakageError
from medssl.scans.splits import Splits, make_splits
from strategies import patients

SEEDS = st.integers(0, 2**31)
FRACTIONS = st.floats(0.05, 0.45)


@given(strata=patients(), val=FRACTIONS, test=FRACTIONS, seed=SEEDS)
def test_every_patient_is_on_exactly_one_side(strata, val, test, seed):
    splits = make_splits(strata, val_fraction=val, test_fraction=test, seed=seed)
    sides = [*splits.train, *splits.val, *splits.test]
    assert sorted(sides) == sorted(strata)
    assert min(len(splits.train), len(splits.val), len(splits.test)) > 0


@given(strata=patients(), seed=SEEDS)
def test_split_does_not_depend_on_the_order_of_patients(strata, seed):
    backwards = dict(reversed(list(strata.items())))
    first = make_splits(strata, val_fraction=0.2, test_fraction=0.2, seed=seed)
    assert first == make_splits(backwards, val_fraction=0.2, test_fraction=0.2, seed=seed)


@given(seed=SEEDS)
def test_every_class_is_on_every_side_in_its_proportion(seed):
    strata = {f"p{number:03d}": "rare" if number < 10 else "common" for number in range(100)}
    splits = make_splits(strata, val_fraction=0.2, test_fraction=0.3, seed=seed)
    assert Counter(strata[key] for key in splits.test) == {"rare": 3, "common": 27}
    assert Counter(strata[key] for key in splits.val) == {"rare": 2, "common": 18}


def test_another_seed_draws_another_split():
    names = [f"p{number}" for number in range(40)]
    first = make_splits(names, val_fraction=0.2, test_fraction=0.2, seed=0)
    assert first.test != make_splits(names, val_fraction=0.2, test_fraction=0.2, seed=1).test


@given(strata=patients(min_size=6), seed=SEEDS, data=st.data())
def test_fewer_labelled_patients_are_among_more(strata, seed, data):
    splits = make_splits(strata, val_fraction=0.2, test_fraction=0.2, seed=0)
    few = data.draw(st.integers(1, len(splits.train)))
    many = data.draw(st.integers(few, len(splits.train)))
    smaller = splits.labelled(num_patients=few, seed=seed, strata=strata)
    larger = splits.labelled(num_patients=many, seed=seed, strata=strata)
    assert len(smaller) == few
    assert set(smaller) <= set(larger) <= set(splits.train)


@given(seed=SEEDS)
def test_labelled_patients_cover_every_class_as_soon_as_they_can(seed):
    strata = {f"p{number:02d}": "abc"[min(number // 5, 2)] for number in range(60)}
    splits = make_splits(strata, val_fraction=0.1, test_fraction=0.1, seed=0)
    chosen = splits.labelled(num_patients=3, seed=seed, strata=strata)
    assert {strata[key] for key in chosen} == {"a", "b", "c"}


def test_full_fraction_is_every_training_patient():
    splits = make_splits(list("abcdefgh"), val_fraction=0.2, test_fraction=0.2, seed=0)
    assert splits.labelled(fraction=1.0, seed=3) == splits.train


def test_written_splits_read_back_equal(tmp_path):
    splits = make_splits(list("abcdefgh"), val_fraction=0.2, test_fraction=0.2, seed=5)
    splits.write(tmp_path / "splits.json")
    assert Splits.read(tmp_path / "splits.json") == splits


@pytest.mark.parametrize(("count", "text"), [(0, "0 patients"), (1, "1 patient found"), (2, "2 p")])
def test_fewer_than_three_patients_cannot_be_split(count, text):
    with pytest.raises(DataError, match=f"no split possible: {text}"):
        make_splits([str(n) for n in range(count)], val_fraction=0.2, test_fraction=0.2, seed=0)


def test_fractions_that_leave_nothing_to_train_are_refused():
    with pytest.raises(ConfigError, match="add up to less than 1"):
        make_splits(list("abcd"), val_fraction=0.5, test_fraction=0.5, seed=0)


def test_patient_on_two_sides_is_a_leak():
    with pytest.raises(LeakageError, match="patient b is in train and again in test"):
        Splits(seed=0, train=("a", "b"), val=("c",), test=("b",))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seed": 0, "train": []}', "\x00"])
def test_other_file_is_not_taken_for_splits(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(DataError, match="is not a splits file"):
        Splits.read(tmp_path / "splits.json")


def test_missing_splits_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no splits file splits\.json"):
        Splits.read(tmp_path / "splits.json")


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({}, "either num_patients or fraction"),
        ({"num_patients": 1, "fraction": 0.5}, "either num_patients or fraction"),
        ({"fraction": 0.0}, r"must lie in \(0, 1\]"),
        ({"num_patients": 9}, "9 labelled patients are asked for, but there are 4"),
        ({"num_patients": 0}, "Ask for 1 to 4"),
    ],
)
def test_impossible_number_of_labelled_patients_is_refused(wish, text):
    splits = Splits(seed=0, train=tuple("abcd"), val=("e",), test=("f",))
    with pytest.raises(ConfigError, match=text):
        splits.labelled(seed=0, **wish)


def test_a_recipe_is_chosen_without_the_test_patients():
    patients = {f"p{n:03}": ("a", "b")[n % 3 == 0] for n in range(100)}
    splits = make_splits(patients, val_fraction=0.2, test_fraction=0.3, seed=4)
    found = splits.for_choices(patients)
    assert found.test == splits.val
    assert found.unused == splits.test
    assert {*found.train, *found.val} == {*splits.train}
    assert len(found.val) == round(len(splits.train) * len(splits.val) / 70)
    assert {patients[key] for key in found.val} == {"a", "b"}
    assert found.held_out == {*found.val, *splits.val, *splits.test}
    assert found.for_choices(patients) != found
    assert found == splits.for_choices(patients)


def test_splits_with_unused_patients_read_back_equal_and_others_are_written_as_before(tmp_path):
    splits = make_splits(list("abcdefgh"), val_fraction=0.2, test_fraction=0.2, seed=5)
    splits.write(tmp_path / "splits.json")
    assert "unused" not in (tmp_path / "splits.json").read_text()
    chosen_on = splits.for_choices()
    chosen_on.write(tmp_path / "splits.json")
    assert Splits.read(tmp_path / "splits.json") == chosen_on
    assert chosen_on.digest != splits.digest


def test_one_training_patient_cannot_validate_too():
    with pytest.raises(ConfigError, match="1 training patients are too few"):
        Splits(seed=0, train=("a",), val=("b",), test=("c",)).for_choices()
