"""Splits by patient: disjoint, stratified, nested, seeded, and written to disk."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from medssl.atomic import atomic_write
from medssl.errors import ConfigError, DataError, LeakageError
from medssl.randomness import numpy_generator

MIN_PATIENTS = 3  # one each for training, validation and test


@dataclass(frozen=True)
class Splits:
    """Patients, by key, of each side of a study.

    Attributes:
        seed: what the split was drawn with.
        train, val, test: patient keys, sorted; no key is in two of them.
        unused: patients that take no part at all, neither in pretraining nor in evaluation.
    """

    seed: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sides = {"train": self.train, "val": self.val, "test": self.test, "unused": self.unused}
        seen: dict[str, str] = {}
        for side, patients in sides.items():
            for patient in patients:
                if patient in seen:
                    raise LeakageError(
                        f"patient {patient} is in {seen[patient]} and again in {side}. "
                        "A patient belongs to one side only: draw the splits again."
                    )
                seen[patient] = side

    def labelled(
        self,
        *,
        num_patients: int | None = None,
        fraction: float | None = None,
        seed: int,
        strata: Mapping[str, Hashable] | None = None,
    ) -> tuple[str, ...]:
        """Choose the training patients whose labels may be used.

        For one seed the choices are nested: fewer patients are always among more. They follow the
        strata's proportions, and every stratum gets one patient as early as possible.

        Args:
            num_patients, fraction: how many, or which part, of the training patients; give one.
            seed: another seed draws another order.
            strata: class of each patient; those absent form a class of their own.

        Returns:
            Patient keys, sorted.

        Raises:
            ConfigError: neither or both are given, or the number is not within reach.
        """
        if (num_patients is None) == (fraction is None):
            raise ConfigError("give either num_patients or fraction of the labelled patients.")
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise ConfigError(f"the label fraction is {fraction}; it must lie in (0, 1].")
            num_patients = max(1, round(fraction * len(self.train)))
        if num_patients is None or not 1 <= num_patients <= len(self.train):
            raise ConfigError(
                f"{num_patients} labelled patients are asked for, but there are "
                f"{len(self.train)} training patients. Ask for 1 to {len(self.train)}."
            )
        groups = _by_stratum(self.train, strata or {})
        return tuple(sorted(_interleave(groups, seed, "labelled")[:num_patients]))

    @property
    def held_out(self) -> frozenset[str]:
        """The patients that no backbone is pretrained on: all but those of training."""
        return frozenset({*self.val, *self.test, *self.unused})

    def for_choices(self, strata: Mapping[str, Hashable] | None = None) -> Splits:
        """Return splits under which a recipe can be chosen without a look at the test patients.

        The validation patients are evaluated on, part of the training patients validate in their
        place (as large a part as before), and the test patients take no part.

        Args:
            strata: class of each patient, which the new validation side follows.

        Raises:
            ConfigError: too few training patients are left to take validation patients from.
        """
        groups = _by_stratum(self.train, strata or {})
        share = len(self.val) / (len(self.val) + len(self.train))
        num_val = max(1, round(share * len(self.train)))
        if num_val >= len(self.train):
            raise ConfigError(
                f"{len(self.train)} training patients are too few to take validation patients "
                "from. Evaluate on test, or give training more patients."
            )
        order = _interleave(groups, self.seed, "choices")
        return Splits(
            seed=self.seed,
            train=tuple(sorted(order[num_val:])),
            val=tuple(sorted(order[:num_val])),
            test=self.val,
            unused=tuple(sorted((*self.test, *self.unused))),
        )

    @property
    def digest(self) -> str:
        """The sha256 of who is on which side."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the splits as JSON, atomically."""
        atomic_write(path, json.dumps(self._content(), indent=1) + "\n")

    def _content(self) -> dict[str, object]:
        """Return what is written: without a side that came later, where nobody is on it."""
        content = asdict(self)
        return content if self.unused else {k: v for k, v in content.items() if k != "unused"}

    @classmethod
    def read(cls, path: Path) -> Splits:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing or holds something else.
            LeakageError: a patient is on two sides.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sides = {side: tuple(map(str, content[side])) for side in ("train", "val", "test")}
            sides["unused"] = tuple(map(str, content.get("unused", ())))
            seed = int(content["seed"])
        except FileNotFoundError:
            raise DataError(
                f"there is no splits file {path.name}. Draw the splits first."
            ) from None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise DataError(
                f"{path.name} is not a splits file: it needs seed, train, val and test. "
                "Remove it and draw the splits again."
            ) from None
        return cls(seed=seed, **sides)


def make_splits(
    patients: Mapping[str, Hashable] | Iterable[str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Splits:
    """Divide patients into training, validation and test.

    The order of ``patients`` does not matter. Every side gets at least one patient, each stratum is
    divided in the same proportions as far as its size allows.

    Args:
        patients: keys, with the class each belongs to (or None) where there are classes.
        val_fraction, test_fraction: parts of all patients; what remains is for training.
        seed: the study's seed.

    Raises:
        ConfigError: the fractions leave nothing for training.
        DataError: there are fewer than three patients.
    """
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be above 0 and "
            "add up to less than 1."
        )
    strata = dict(patients) if isinstance(patients, Mapping) else dict.fromkeys(patients)
    if len(strata) < MIN_PATIENTS:
        raise DataError(
            f"no split possible: {len(strata)} patient{'s' * (len(strata) != 1)} found, at least "
            f"{MIN_PATIENTS} needed (training, validation, test). Index more patients; if these "
            "scans are of several people, name them under `patients` in the index config."
        )
    train: list[str] = []
    val: list[str] = []
    test: list[str] = []
    before = 0
    for group in _pooled(_by_stratum(strata, strata)):
        order = _shuffled(group, seed, "splits")
        if len(order) < MIN_PATIENTS:
            train += order
            continue
        after = before + len(order)
        num_test = round(test_fraction * after) - round(test_fraction * before)
        num_test = min(max(1, num_test), len(order) - 2)
        num_val = round(val_fraction * after) - round(val_fraction * before)
        num_val = min(max(1, num_val), len(order) - 1 - num_test)
        test += order[:num_test]
        val += order[num_test : num_test + num_val]
        train += order[num_test + num_val :]
        before = after
    return Splits(
        seed=seed, train=tuple(sorted(train)), val=tuple(sorted(val)), test=tuple(sorted(test))
    )


def _by_stratum(patients: Iterable[str], strata: Mapping[str, Hashable]) -> list[list[str]]:
    """Return the patients of each stratum, both in an order that depends on the names only."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for patient in sorted(patients):
        groups[strata.get(patient)].append(patient)
    return [groups[stratum] for stratum in sorted(groups, key=repr)]


def _pooled(groups: list[list[str]]) -> list[list[str]]:
    """Join the strata that are too small to be on every side."""
    large = [group for group in groups if len(group) >= MIN_PATIENTS]
    rare = [patient for group in groups if len(group) < MIN_PATIENTS for patient in group]
    return [*large, rare] if rare else large


def _shuffled(group: list[str], seed: int, purpose: str) -> list[str]:
    generator = numpy_generator(seed, purpose, group[0], len(group))
    return [group[index] for index in generator.permutation(len(group))]


def _interleave(groups: list[list[str]], seed: int, purpose: str) -> list[str]:
    """Order patients so that the first k are drawn from all groups in proportion, for any k.

    The first patient of each group comes before every second one, largest group first.
    """
    ranked = []
    for number, group in enumerate(groups):
        for index, patient in enumerate(_shuffled(group, seed, purpose)):
            part = (index + 0.5) / len(group)
            ranked.append((index > 0, part, -len(group), number, patient))
    return [patient for *_, patient in sorted(ranked)]
