import pytest
import torch
from pydantic import ValidationError

from medssl.randomness import torch_generator
from medssl.transforms.augmentation import AugmentationConfig, augment

NOTHING = AugmentationConfig(brightness=0, contrast=0, gamma=0, noise_std=0)
FLIPS = NOTHING.model_copy(update={"flip_axes": ("X", "Y", "Z")})
AXES = ("X", "Y", "Z")


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(size, 2, 6, 7, 5, generator=torch_generator(0, "images"))
    return images, (images[:, 0] > 0.5).long()


def test_nothing_asked_nothing_changed() -> None:
    images, masks = batch()
    found, found_masks = augment(images, masks, NOTHING, torch_generator(0), AXES)
    assert torch.equal(found, images)
    assert found_masks is not None
    assert torch.equal(found_masks, masks)


def test_masks_are_flipped_with_their_images() -> None:
    images, masks = batch(64)
    found, found_masks = augment(images, masks, FLIPS, torch_generator(1), AXES)
    assert found_masks is not None
    assert torch.equal(found_masks, (found[:, 0] > 0.5).long())
    assert 0 < sum(not torch.equal(a, b) for a, b in zip(found, images, strict=True)) < 64


def test_each_axis_is_flipped_for_about_half_of_the_samples() -> None:
    for position, axis in enumerate(AXES):
        config = NOTHING.model_copy(update={"flip_axes": (axis,)})
        images, _ = batch(200)
        found, _ = augment(images, None, config, torch_generator(2), AXES)
        mirrored = images.flip(2 + position)
        flipped = sum(torch.equal(a, b) for a, b in zip(found, mirrored, strict=True))
        assert 70 < flipped < 130


def test_an_axis_that_a_plane_does_not_hold_is_passed_over() -> None:
    config = NOTHING.model_copy(update={"flip_axes": ("X",)})
    images = torch.rand(32, 1, 6, 7)
    assert torch.equal(augment(images, None, config, torch_generator(0), ("Y", "Z"))[0], images)
    found, _ = augment(images, None, config, torch_generator(0), ("X", "Z"))
    assert not torch.equal(found, images)


@pytest.mark.parametrize("name", ["brightness", "contrast", "gamma", "noise_std"])
def test_each_sample_has_its_own_parameters(name: str) -> None:
    config = NOTHING.model_copy(update={name: 0.2})
    images = torch.rand(1, 1, 6, 6).mul(0.4).add(0.3).expand(5, 1, 6, 6)
    found, _ = augment(images, None, config, torch_generator(0), ("X", "Y"))
    means = {round(float(sample.std() + sample.mean()), 6) for sample in found}
    assert len(means) == 5


def test_noise_is_another_in_each_channel() -> None:
    """Were it the same, two sequences would be known by it to belong together."""
    config = NOTHING.model_copy(update={"noise_std": 0.2})
    images = torch.full((4, 3, 40, 40), 0.5)
    found, _ = augment(images, None, config, torch_generator(0), ("X", "Y"))
    for sample in found - images:
        alike = torch.corrcoef(sample.flatten(1)) - torch.eye(3)
        assert float(alike.abs().max()) < 0.1


def test_the_level_of_noise_is_another_in_each_channel() -> None:
    """A level in common would tell, too, that two sequences are of one image."""
    config = NOTHING.model_copy(update={"noise_std": 0.2})
    found, _ = augment(
        torch.full((60, 2, 40, 40), 0.5), None, config, torch_generator(0), ("X", "Y")
    )
    first, second = found.flatten(2).std(2).unbind(1)
    assert float(first.std()) > 0.02
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.4


def test_inputs_stay_as_they_were() -> None:
    images, masks = batch()
    before = images.clone(), masks.clone()
    config = AugmentationConfig(flip_axes=("X", "Y", "Z"))
    augment(images, masks, config, torch_generator(0), AXES)
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])


def test_the_same_generator_gives_the_same_batch() -> None:
    images, masks = batch()
    config = AugmentationConfig(flip_axes=("Y",))
    one, two, other = (
        augment(images, masks, config, torch_generator(seed), AXES)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_values_stay_in_range_and_finite() -> None:
    images, _ = batch()
    images[0] = 0
    images[1] = 1
    config = AugmentationConfig(brightness=1, contrast=0.9, gamma=2, noise_std=1)
    found, _ = augment(images, None, config, torch_generator(0), AXES)
    assert bool(torch.isfinite(found).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_axes_must_fit_the_images() -> None:
    with pytest.raises(ValueError, match="2 axes for 3 spatial dimensions"):
        augment(batch()[0], None, NOTHING, torch_generator(0), ("X", "Y"))


def test_settings_beyond_reason_are_refused() -> None:
    with pytest.raises(ValidationError):
        AugmentationConfig(contrast=1.5)
    with pytest.raises(ValidationError):
        AugmentationConfig(flip_axes=("W",))  # type: ignore[arg-type]
