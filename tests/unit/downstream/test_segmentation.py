"""Segmentation: Dice of a case, masks by file name, the sampler asked for masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_dice
from torch import Tensor
from torch.nn.functional import one_hot

from medssl.config import validate_config
from medssl.downstream.base import DownstreamBatch
from medssl.downstream.segmentation import Config, Segmentation
from medssl.errors import ConfigError, LabelError
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from medssl.scans.masks import MaskFolder
from medssl.transforms.cases import Case
from medssl.transforms.sampling import Sample, SampleRequest
from samples import write_nifti
from training import tiny_backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(("anna", "berta", "carla")):
        write_nifti(folder / "images" / f"{name}.nii.gz", seed=number)
    for name in ("anna", "carla", "nobody"):
        mask = np.zeros((8, 7, 6), np.uint8)
        write_nifti(folder / "masks" / f"{name}.nii.gz", mask)
    return folder


@pytest.fixture(scope="module")
def index(place: Path) -> Index:
    return build_index(IndexConfig(folder=place / "images", executor="local"), place / "index")


@pytest.fixture(scope="module")
def task(place: Path, index: Index) -> Segmentation:
    return Segmentation(Config(masks=place / "masks", classes=("organ", "lesion")), 3, index)


def logits(labels: Tensor, num_classes: int = 3) -> Tensor:
    """Return logits (B, K, ...) that answer with the given class map (B, ...)."""
    return one_hot(labels, num_classes).movedim(-1, 1).float() * 20


def test_scans_with_a_mask_are_labelled_and_have_no_class(task: Segmentation):
    assert len(task.targets) == 2
    assert set(task.targets.values()) == {()}
    assert task.classes == ("organ", "lesion")
    assert task.num_outputs == 3


def test_masks_that_fit_no_scan_are_refused(index: Index, tmp_path: Path):
    (tmp_path / "masks").mkdir()
    write_nifti(tmp_path / "masks" / "nobody.nii.gz")
    with pytest.raises(LabelError, match=r"^none of the 1 masks fits one of the 3 accepted scans"):
        Segmentation(Config(masks=tmp_path / "masks", classes=("organ",)), 3, index)


def test_a_folder_that_is_not_there_is_refused(index: Index, tmp_path: Path):
    with pytest.raises(LabelError, match="there is no folder of masks at the path given"):
        Segmentation(Config(masks=tmp_path / "absent", classes=("organ",)), 3, index)


def test_at_least_one_class_is_needed():
    with pytest.raises(ConfigError, match=r"classes: tuple should have at least 1 item"):
        validate_config({"name": "segmentation", "masks": "x", "classes": []}, Config)


def test_the_sampler_is_asked_for_masks(task: Segmentation):
    request = task.request(SampleRequest(3, (8, 8, 8), min_foreground=0.7))
    assert request.mask == "segmentation"
    assert request.min_foreground == 0.1
    assert request.crop_size == (8, 8, 8)


def test_masks_are_prepared_under_the_tasks_name_for_them(place: Path):
    config = Config(masks=place / "masks", classes=("organ",), mask="organs")
    assert Segmentation.masks(config) == {"organs": MaskFolder(place / "masks", config.classes)}


def test_dice_by_hand(task: Segmentation):
    target = torch.tensor([[[1, 1, 1, 0], [2, 2, 0, 0]]])
    answer = torch.tensor([[[1, 1, 0, 0], [2, 1, 2, 2]]])
    # organ: 2 of 3 found, one too many: 2 * 2 / (3 + 3); lesion: 2 * 1 / (3 + 2)
    assert task.case_scores(logits(answer), target) == pytest.approx([4 / 6, 2 / 5])


def test_a_class_that_the_case_lacks_has_no_dice(task: Segmentation):
    target = torch.tensor([[[1, 1, 0, 0]]])
    for answer in ([[[1, 1, 0, 0]]], [[[1, 1, 2, 0]]]):  # found nowhere, or wrongly somewhere
        scores = task.case_scores(logits(torch.tensor(answer)), target)
        assert scores[0] == 1
        assert math.isnan(scores[1])


def test_a_class_that_is_there_and_not_found_has_a_dice_of_zero(task: Segmentation):
    target = torch.tensor([[[1, 2, 0, 0]]])
    assert task.case_scores(logits(torch.zeros_like(target)), target) == [0, 0]


def test_the_dice_of_a_case_is_over_all_its_slices_together(task: Segmentation):
    target = torch.tensor([[[1, 1]], [[1, 0]]])
    answer = torch.tensor([[[1, 1]], [[0, 0]]])
    assert task.case_scores(logits(answer), target)[0] == pytest.approx(2 * 2 / (2 + 3))


def test_voxels_that_pad_a_case_do_not_count(task: Segmentation):
    mask = torch.zeros(1, 4, 6, 5, dtype=torch.long)
    mask[:, 1:3, :, 2:4] = 1
    padding = ((1, 1), (0, 0), (2, 1))
    images = mask[:, None].float()
    case = Case("scan", "patient", images, mask, (0,), padding, (1.0, 1.0, 1.0), np.eye(4))
    assert task.score_case(logits(torch.ones_like(mask)), case)[0] == 1


@pytest.mark.parametrize("shape", [(6, 9, 9), (3, 5, 5, 4)])
def test_dice_is_what_monai_computes(task: Segmentation, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(1)
    target, answer = (torch.randint(3, shape, generator=generator) for _ in range(2))
    target[0][target[0] == 2] = 0  # absent from one item
    wanted = compute_dice(
        *(one_hot(labels, 3).movedim(-1, 1) for labels in (answer, target)),
        include_background=False,
    )
    found = task.metrics(logits(answer), DownstreamBatch(torch.empty(0), target))["dice"]
    assert float(found) == pytest.approx(float(wanted.nanmean()), rel=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_network_answers_for_every_voxel_at_any_size(task: Segmentation, dims: int):
    backbone = tiny_backbone(dims)
    shape = (13, 10, 9)[:dims]
    made = DownstreamBatch(torch.rand(2, 1, *shape), torch.randint(3, (2, *shape)))
    output = task.forward(backbone, task.build_head(backbone), made)
    assert output.shape == (2, 3, *shape)
    assert task.loss(output, made).ndim == 0


def test_the_right_answer_has_no_loss(task: Segmentation):
    target = torch.randint(3, (2, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    made = DownstreamBatch(torch.empty(0), target)
    right, wrong = (float(task.loss(logits(x), made)) for x in (target, (target + 1) % 3))
    assert right == pytest.approx(0, abs=1e-3)
    assert wrong > 1


def test_a_batch_is_images_and_their_masks(task: Segmentation):
    images, masks = torch.rand(2, 1, 4, 4), torch.randint(3, (2, 4, 4))
    made: Any = task.batch_of(Sample(images, masks), torch.Generator())
    assert made.inputs is images
    assert made.target is masks


@pytest.mark.parametrize("seed", range(4))
def test_the_dice_of_a_case_is_monais_dice_metric(task: Segmentation, seed: int):
    generator = torch.Generator().manual_seed(seed)
    shape = [(9, 8, 7), (5, 20, 3), (1, 1, 30), (6, 6, 6)][seed]
    target, answer = (torch.randint(3, (1, *shape), generator=generator) for _ in range(2))
    metric = DiceMetric(include_background=False, reduction="none")
    wanted = metric(*(one_hot(labels, 3).movedim(-1, 1) for labels in (answer, target)))
    assert task.case_scores(logits(answer), target) == pytest.approx(wanted[0].tolist(), rel=1e-6)


class Counting:
    """A network that answers with the image itself, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, batch: DownstreamBatch) -> Tensor:
        self.seen += [tuple(batch.inputs.shape[2:])] * len(batch.inputs)
        return torch.cat([batch.inputs, -batch.inputs, 2 * batch.inputs], dim=1)


def test_a_volume_is_answered_in_windows_of_the_crops_size(task: Segmentation):
    network, images = Counting(), torch.rand(1, 1, 20, 13, 10)
    answer = task.infer(network, images, (10, 10, 10))
    assert set(network.seen) == {(10, 10, 10)}
    assert len(network.seen) == 3 * 2 * 1  # windows share half of each side
    torch.testing.assert_close(answer, torch.cat([images, -images, 2 * images], dim=1))


def test_windows_count_most_at_their_middle(task: Segmentation):
    """Two windows that disagree meet half-way, each prevailing near its own centre."""
    images = torch.zeros(1, 1, 15, 10, 10)
    answers = iter([torch.zeros(1, 3, 10, 10, 10), torch.ones(1, 3, 10, 10, 10)])

    def network(batch: DownstreamBatch) -> Tensor:
        return torch.cat([next(answers) for _ in batch.inputs])

    line = task.infer(network, images, (10, 10, 10))[0, 0, :, 5, 5]
    assert (line[:5] == 0).all()
    assert (line[10:] == 1).all()
    assert (line[5:10].diff() > 0).all()
    assert float(line[7]) == pytest.approx(0.5)


def test_slices_stay_whole(task: Segmentation):
    network = Counting()
    task.infer(network, torch.rand(3, 1, 40, 50), (16, 16))
    assert network.seen == [(40, 50)] * 3
