from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from medssl.errors import MachineError, WeightsError
from medssl.models.export.base import Subject, check_equal
from medssl.models.export.onnx import Onnx, _compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, slices: Subject) -> Path:
    """Return the export of a 2D backbone, written once."""
    folder = tmp_path_factory.mktemp("onnx")
    assert Onnx().write(slices, folder)["largest_difference"] < 1e-4
    return folder


def test_onnxruntime_answers_as_the_backbone_for_other_sizes_and_batches(
    folder: Path, slices: Subject
) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch", 1, "x", "y"]
    names = [entry.name for entry in session.get_outputs()]
    assert names == list(slices.output_names())
    images = slices.sample_images(4, (57, 49))
    answers = session.run(names, {"image": images.numpy()})
    found = {name: torch.from_numpy(a) for name, a in zip(names, answers, strict=True)}
    assert check_equal(found, slices.answers(images), "found") < 1e-4
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]  # weights are inside


@pytest.mark.slow
def test_volumes_are_exported_too(tmp_path: Path, volumes: Subject) -> None:
    assert Onnx().write(volumes, tmp_path)["largest_difference"] < 1e-4


def test_missing_packages_are_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, slices: Subject
) -> None:
    monkeypatch.setattr("medssl.models.export.onnx.PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(MachineError, match=r"needs no_such_package.*pip install 'medssl\[onnx\]'"):
        Onnx().check(slices)


def test_an_answer_of_the_runtime_that_differs_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slices: Subject
) -> None:
    class Session(onnxruntime.InferenceSession):
        def run(self, *arguments: Any, **settings: Any) -> Any:
            return [1.01 * answer for answer in super().run(*arguments, **settings)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(WeightsError, match=r"model.onnx is wrong and was not kept: output stem"):
        _compare(slices, folder / "model.onnx")
