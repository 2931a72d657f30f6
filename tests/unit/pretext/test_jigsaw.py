"""Jigsaw: labels, order and tiles belong together; tiles encoded once give the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medssl.config import validate_config
from medssl.errors import ConfigError
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext._permutations import permutation_set
from medssl.pretext.base import PretextBatch
from medssl.pretext.jigsaw import Config, Jigsaw, deal_labels, mosaic, shuffle
from medssl.training.network import build_network
from medssl.transforms.sampling import SampleRequest

SIZE = {2: (24, 24), 3: (20, 16, 16)}
WHOLE = {"gap": 0, "jitter": 0, "standardise": False}
"""Settings by which the tiles are exactly the cells."""

both_dims = pytest.mark.parametrize("dims", [2, 3])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(dims: int, count: int = 3, channels: int = 1) -> Tensor:
    """Return noise that is air nowhere."""
    return 0.1 + 0.9 * torch.rand(count, channels, *SIZE[dims], generator=seeded(1))


def numbered_tiles(grid: int, dims: int, side: int = 4) -> Tensor:
    """Return an image each of whose cells has a grey of its own, rising, (1, 1, *S)."""
    grey = torch.linspace(0.1, 1, grid**dims).reshape(1, 1, *[grid] * dims)
    for axis in range(2, 2 + dims):
        grey = grey.repeat_interleave(side, dim=axis)
    return grey


def backbone(dims: int) -> Backbone:
    config = BACKBONES.config_class("monai")(
        depth=10, spatial_dims=dims, base_channels=8, stem_stride=1
    )
    return build_backbone(config, INITS.config_class("random")(), in_channels=1, seed=0)[0]


def tiles_seen(task: Jigsaw, batch: PretextBatch) -> Tensor:
    """Return the tiles of every puzzle by the places they lie in, (B, P, T, C, *tile)."""
    order = batch.extras["order"]
    if task.config.encode_once:
        return shuffle(batch.inputs.unflatten(0, (len(order), task.num_tiles)), order)
    return batch.inputs.unflatten(0, order.shape)


@given(
    num_images=st.integers(1, 4),
    puzzles=st.integers(1, 5),
    num_tiles=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_shuffling_is_undone_by_the_inverse_permutations(num_images, puzzles, num_tiles, seed):
    generator = seeded(seed)
    tiles = torch.rand(num_images, num_tiles, 2, generator=generator)
    order = torch.rand(num_images, puzzles, num_tiles, generator=generator).argsort(2)
    shuffled = shuffle(tiles, order)
    assert torch.equal(shuffled.sort(2).values, tiles.sort(1).values[:, None].expand_as(shuffled))
    for puzzle in range(puzzles):
        inverse = order[:, [puzzle]].argsort(2)
        assert torch.equal(shuffle(shuffled[:, puzzle], inverse)[:, 0], tiles)


@given(kind=st.sampled_from(["greedy_max_min", "agl", "pgl"]), label=st.integers(0, 71))
def test_a_permutation_of_the_set_is_undone_by_its_inverse(kind, label):
    order = permutation_set(kind, 9, 72).permutations[label]
    tiles = torch.arange(9)[None]
    shuffled = shuffle(tiles, order[None, None])[:, 0]
    assert torch.equal(shuffled[0], order)
    assert torch.equal(shuffle(shuffled, order.argsort()[None, None])[:, 0], tiles)


@given(
    num_images=st.integers(1, 9),
    num_classes=st.integers(2, 30),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_an_image_gets_different_labels_and_every_label_comes_up_equally_often(
    num_images, num_classes, data, seed
):
    each = data.draw(st.integers(1, min(8, num_classes)))
    labels = deal_labels(num_images, each, num_classes, torch.device("cpu"), seeded(seed))
    assert labels.shape == (num_images, each)
    assert all(len(set(row)) == each for row in labels.tolist())
    frequency = torch.bincount(labels.flatten(), minlength=num_classes)
    assert frequency.max() - frequency.min() <= 1


@pytest.mark.parametrize(
    ("dims", "grid", "kind", "tiles", "classes"),
    [
        (2, None, "greedy_max_min", 9, 100),
        (2, 2, "greedy_max_min", 4, 24),
        (2, None, "agl", 9, 72),
        (2, 2, "agl", 4, 12),
        (2, None, "pgl", 9, 100),
        (3, None, "greedy_max_min", 8, 24),
        (3, None, "agl", 8, 24),
        (3, 3, "greedy_max_min", 27, 100),
        (3, 3, "agl", 27, 100),
    ],
)
def test_grid_and_number_of_classes_have_defaults_for_every_kind(dims, grid, kind, tiles, classes):
    task = Jigsaw(Config(grid=grid, permutations=kind), dims)
    assert task.num_tiles == tiles
    assert task.num_classes == len(task.permutation_set.permutations) == classes
    assert task.chance_level == 1 / classes
    assert task.chance_level < task.healthy_range[0] < task.healthy_range[1] < 1


@pytest.mark.parametrize("encode_once", [True, False])
@pytest.mark.parametrize(("dims", "grid"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_the_label_says_which_tile_lies_where(dims, grid, encode_once):
    task = Jigsaw(Config(grid=grid, encode_once=encode_once, **WHOLE), dims)
    image = numbered_tiles(grid, dims)
    batch = task.make_batch(image, seeded())
    greys = image.flatten().unique()  # rising: tile t has grey t
    tiles = tiles_seen(task, batch)
    assert tiles.shape == (1, 8, grid**dims, 1, *[4] * dims)
    for puzzle, label in enumerate(batch.target.tolist()):
        wanted = greys[task.permutation_set.permutations[label]]
        assert torch.equal(tiles[0, puzzle].flatten(1), wanted[:, None].expand(-1, 4**dims))


@pytest.mark.parametrize("encode_once", [True, False])
@both_dims
def test_the_batch_has_the_stated_shapes(dims, encode_once):
    config = Config(encode_once=encode_once, permutations_per_image=5)
    task = Jigsaw(config, dims)
    batch = task.make_batch(images(dims, 3, channels=2), seeded())
    tile = config.sizes(SIZE[dims], task.grid)[0]
    repeats = 1 if encode_once else 5
    assert batch.inputs.shape == (3 * repeats * task.num_tiles, 2, *tile)
    assert batch.target.shape == batch.extras["weight"].shape == (15,)
    assert batch.extras["order"].shape == (3, 5, task.num_tiles)


@both_dims
def test_tiles_encoded_once_give_the_answers_of_tiles_encoded_for_each_puzzle(dims):
    once = Jigsaw(Config(), dims)
    anew = Jigsaw(Config(encode_once=False), dims)
    network = build_network(backbone(dims), once, seed=0).eval()
    batches = [task.make_batch(images(dims), seeded(5)) for task in (once, anew)]
    assert torch.equal(batches[0].target, batches[1].target)
    with torch.no_grad():
        answers = [
            task.forward(network.backbone, network.head, batch)
            for task, batch in zip((once, anew), batches, strict=True)
        ]
    assert answers[0].shape == (24, once.num_classes)
    assert torch.allclose(*answers, atol=1e-5)


def test_tiles_encoded_once_give_the_gradients_of_tiles_encoded_for_each_puzzle():
    gradients = []
    for encode_once in (True, False):
        task = Jigsaw(Config(encode_once=encode_once), 2)
        network = build_network(backbone(2), task, seed=0).eval()
        batch = task.make_batch(images(2), seeded(5))
        task.loss(task.forward(network.backbone, network.head, batch), batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.allclose(*gradients, atol=1e-5)


@both_dims
def test_the_order_of_the_tiles_reaches_the_answer(dims):
    task = Jigsaw(Config(), dims)
    network = build_network(backbone(dims), task, seed=0).eval()
    batch = task.make_batch(images(dims), seeded())
    with torch.no_grad():
        answers = task.forward(network.backbone, network.head, batch)
    assert len(torch.unique(answers, dim=0)) == len(answers)


def with_air(num_air: int) -> Tensor:
    """Return a 2D image of 3x3 tiles, of which so many are air."""
    image = 0.5 + numbered_tiles(3, 2, side=8) / 2
    for cell in range(num_air):
        x, y = divmod(cell, 3)
        image[..., 8 * x : 8 * x + 8, 8 * y : 8 * y + 8] = 0.01
    return image


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_puzzles_of_images_with_more_air_tiles_than_allowed_do_not_count(allowed):
    task = Jigsaw(Config(max_air_tiles=allowed, permutations_per_image=4), 2)
    batch = task.make_batch(torch.cat([with_air(air) for air in range(6)]), seeded())
    counted = batch.extras["weight"].reshape(6, 4)
    wanted = (torch.arange(6) <= allowed).float()[:, None].expand(6, 4)
    assert torch.equal(counted, wanted)


def test_the_share_of_puzzles_that_do_not_count_is_a_metric_and_they_are_left_out():
    task = Jigsaw(Config(permutations_per_image=4), 2)
    batch = task.make_batch(torch.cat([with_air(air) for air in (0, 1, 2, 9)]), seeded())
    right = torch.nn.functional.one_hot(batch.target, 100).float() * 100
    output = torch.where(batch.extras["weight"][:, None] > 0, right, -right)
    metrics = task.metrics(output, batch)
    assert metrics["rejection_rate"] == 0.5
    assert metrics["accuracy"] == 1
    assert task.loss(output, batch) < 1e-6
    assert task.confusion(output, batch).sum() == 8


def test_a_batch_of_air_gives_no_loss_and_no_gradient():
    task = Jigsaw(Config(), 2)
    network = build_network(backbone(2), task, seed=0)
    batch = task.make_batch(torch.zeros(2, 1, *SIZE[2]), seeded())
    loss = task.loss(network(batch), batch)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in network.parameters())


@pytest.mark.parametrize(("kind", "distance"), [("greedy_max_min", 6), ("agl", 8), ("pgl", 7)])
def test_with_as_many_air_tiles_as_are_allowed_no_two_puzzles_look_alike(kind, distance):
    allowed = distance - 1
    task = Jigsaw(Config(permutations=kind, max_air_tiles=allowed), 2)
    order = task.permutation_set.permutations
    seen = order.where(order >= allowed, -1)  # tiles 0 to allowed - 1 are air
    assert len(torch.unique(seen, dim=0)) == len(order)
    with pytest.raises(ConfigError) as refused:
        Jigsaw(Config(permutations=kind, max_air_tiles=distance), 2)
    assert str(refused.value) == (
        f"pretext.max_air_tiles: with {distance} tiles of air, which look alike, some puzzles "
        f"have two answers: two permutations of the set differ at {distance} places only. Allow "
        "fewer tiles of air, or take a smaller pretext.num_permutations."
    )


def test_tiles_are_standardised_unless_told_otherwise():
    batch = Jigsaw(Config(), 2).make_batch(images(2), seeded())
    means = batch.inputs.flatten(1).mean(1)
    assert torch.allclose(means, torch.full_like(means, 0.5), atol=0.01)


def test_the_contract_holds_the_hash_of_the_set():
    task = Jigsaw(Config(permutation_seed=3), 2)
    found = permutation_set("greedy_max_min", 9, 100, 3)
    assert task.contract() == {
        "permutation_set_hash": found.hash,
        "permutation_set": {
            "name": found.name,
            "size": 100,
            "min_hamming": found.min_hamming,
            "mean_hamming": found.mean_hamming,
        },
    }
    assert task.permutation_set is found
    assert found.hash != Jigsaw(Config(), 2).contract()["permutation_set_hash"]


def test_the_request_lies_inside_the_scan():
    base = SampleRequest(3, (32, 32, 24))
    assert Jigsaw(Config(), 3).request(base) == replace(base, allow_padding=False)


def test_a_crop_too_small_for_the_grid_is_refused():
    with pytest.raises(
        ConfigError, match=r"sampling.crop_size: \[32, 32, 9\] gives 3 cells an axis of \[10, 10, 3"
    ):
        Jigsaw(Config(grid=3), 3).request(SampleRequest(3, (32, 32, 9)))


@both_dims
def test_bfloat16_gives_finite_answers_and_gradients(dims):
    task = Jigsaw(Config(), dims)
    network = build_network(backbone(dims), task, seed=0)
    batch = task.make_batch(images(dims), seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(network(batch), batch)
    loss.backward()
    assert torch.isfinite(loss)
    # Of the head alone: on CPUs, oneDNN's bfloat16 weight gradients of a convolution over one or
    # two voxels a side, as the last stages see of tiles this small, hold whatever lay in memory.
    assert all(torch.isfinite(p.grad).all() for p in network.head.parameters())


@pytest.mark.parametrize(("dims", "grid"), [(2, 3), (3, 2), (3, 3)])
def test_names_of_classes_are_short_and_unique(dims, grid):
    task = Jigsaw(Config(grid=grid), dims)
    names = task.class_names()
    assert len(set(names)) == len(names) == task.num_classes
    assert max(len(name) for name in names) <= 15


def test_the_name_of_a_class_tells_the_tiles_in_order():
    task = Jigsaw(Config(permutations="agl"), 2)
    assert list(task.class_names()[:2]) == ["0: 012345678", "1: 120453786"]
    large = Jigsaw(Config(permutations="agl", grid=3, num_permutations=702), 3)
    assert large.class_names()[701].startswith("701: ")
    assert large.class_names()[701].endswith("…")


def test_a_mosaic_puts_the_tiles_back_with_lines_between_them():
    image = numbered_tiles(3, 2)
    tiles = image[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).reshape(9, 1, 4, 4)
    picture = mosaic(tiles, 3)
    assert picture.shape == (14, 14)
    lines = torch.tensor([4, 9])
    assert (picture[lines] == 1).all()
    assert (picture[:, lines] == 1).all()
    inside = torch.tensor([place for place in range(14) if place not in lines])
    assert torch.equal(picture[inside][:, inside], image[0, 0])


def test_a_mosaic_of_3d_tiles_lays_the_layers_side_by_side():
    grey = torch.arange(8.0)[:, None, None, None, None] / 10
    picture = mosaic(grey.expand(8, 1, 3, 3, 3), 2)
    assert picture.shape == (7, 7 + 2 + 7)
    assert torch.equal(picture[[0, 4]][:, [0, 4]], torch.tensor([[0.0, 0.2], [0.4, 0.6]]))
    assert torch.equal(picture[[0, 4]][:, [9, 13]], torch.tensor([[0.1, 0.3], [0.5, 0.7]]))


@pytest.mark.parametrize("encode_once", [True, False])
def test_pictures_show_each_image_its_shuffled_tiles_and_the_answer(encode_once):
    task = Jigsaw(Config(encode_once=encode_once, **WHOLE), 2)
    scans = torch.cat([numbered_tiles(3, 2)] * 5)
    batch = task.make_batch(scans, seeded())
    names, label = task.class_names(), int(batch.target[0])
    output = torch.zeros(40, 100)
    output[:, 7] = 1
    rows = task.panels(batch, output)
    assert len(rows) == 3
    image, puzzle = rows[0]
    assert torch.equal(image.image_XY, scans[0, 0])
    assert puzzle.title == f"{names[label]}, answer {names[7]}"
    centres = puzzle.image_XY[2::5, 2::5].flatten()
    greys = scans[0].unique()
    assert torch.equal(centres, greys[task.permutation_set.permutations[label]])
    assert task.panels(batch, None)[0][1].title == names[label]


def test_pictures_say_which_puzzles_do_not_count():
    task = Jigsaw(Config(), 2)
    batch = task.make_batch(torch.cat([with_air(0), with_air(2)]), seeded())
    titles = [row[1].title for row in task.panels(batch, None)]
    marked = [title.endswith(" (does not count: too many tiles of air)") for title in titles]
    assert marked == [False, True]


def test_few_permutations_all_come_up_in_each_image():
    task = Jigsaw(Config(num_permutations=3), 2)
    batch = task.make_batch(images(2), seeded())
    assert batch.target.reshape(3, 3).sort(1).values.tolist() == [[0, 1, 2]] * 3


def test_more_puzzles_of_an_image_than_permutations_are_refused():
    with pytest.raises(ConfigError) as refused:
        Jigsaw(Config(num_permutations=5, permutations_per_image=6), 2)
    assert str(refused.value) == (
        "pretext.permutations_per_image: 6 different permutations of an image asked for; the set "
        "has 5. Choose 1 to 5."
    )


def test_more_permutations_than_the_kind_has_are_refused():
    with pytest.raises(ConfigError, match=r"agl has 72 of 9 tiles\. Choose 2 to 72\."):
        Jigsaw(Config(permutations="agl", num_permutations=100), 2)


def test_a_set_for_another_grid_is_refused():
    with pytest.raises(ConfigError, match=r"pgl permutes 9 tiles, this puzzle has 8\."):
        Jigsaw(Config(permutations="pgl"), 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grid": 4}, r"grid: input should be 2 or 3"),
        ({"permutations": "random"}, r"permutations: input should be 'greedy_max_min', 'agl'"),
        ({"num_permutations": 1}, r"num_permutations: input should be greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_exist_are_refused_by_the_config(setting, message):
    with pytest.raises(ConfigError, match=message):
        validate_config({"name": "jigsaw", **setting}, Config)


def test_a_jitter_that_standardising_would_undo_is_refused():
    with pytest.raises(ConfigError, match=r"intensity_jitter 0\.1 has no effect"):
        validate_config({"name": "jigsaw", "intensity_jitter": 0.1}, Config)


def test_a_confusion_matrix_of_very_many_classes_is_not_kept():
    task = Jigsaw(Config(num_permutations=1001), 2)
    batch = task.make_batch(images(2), seeded())
    assert task.confusion(torch.zeros(len(batch.target), task.num_classes), batch) is None
