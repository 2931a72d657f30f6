"""The preparation of scans, as `medssl.transforms.preprocessing` does it, in MONAI's transforms.

Every entry is one of ``preprocessing`` in a bundle's ``inference.json``. Where MONAI lacks what
medssl does, a ``Lambdad`` holds it in one expression; where neither can say it, it is refused.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from medssl.errors import ConfigError
from medssl.models.checkpoints import Contract
from medssl.transforms.preprocessing import (
    BODY_FRACTION,
    BODY_HU,
    HIGHEST_THRESHOLD,
    IntensityConfig,
    PreprocessingConfig,
)
from medssl.transforms.requests import ACROSS

_RAS_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]
_SPACING_OF = "numpy.linalg.norm(numpy.asarray(x.affine, dtype=float)[:3, :3], axis=0)"

Values = Literal["hu", "arbitrary"]


def check_expressible(
    contract: Contract, preprocessing: PreprocessingConfig, values: Values | None
) -> None:
    """Refuse what a bundle would do otherwise than medssl does.

    Raises:
        ConfigError: the message names the field, and what to do.
    """
    if preprocessing.blank:
        raise ConfigError(
            f"a MONAI bundle cannot blank {' and '.join(preprocessing.blank)} (contract: blank), "
            "and without that it would see other images than the backbone was trained on. Use the "
            "formats onnx or program, with scans that medssl prepares."
        )
    if contract.spatial_dims == 2 and contract.plane is None:
        raise ConfigError(
            "a MONAI bundle of a 2D backbone cuts volumes into slices, and the contract names no "
            "plane: it was trained on 2D scans. Use the formats onnx or program."
        )
    if contract.spatial_dims == 2 and contract.in_channels != 1:
        raise ConfigError(
            f"a MONAI bundle of a 2D backbone takes one channel, found {contract.in_channels}: the "
            "contract does not say whether they are neighbouring slices or sequences. Use the "
            "formats onnx or program."
        )
    kind = preprocessing.intensity.kind
    if kind == "auto" and values is None:
        raise ConfigError(
            "intensity is scaled by the kind of each scan (contract: intensity kind auto), which "
            "a MONAI bundle cannot tell from a file. Say what its images will hold: --values hu "
            "for calibrated CT, --values arbitrary for anything else."
        )
    if kind == "window_hu" and values == "arbitrary":
        raise ConfigError(
            "the backbone was trained on a window in HU (contract: intensity), so its bundle needs "
            "--values hu, found --values arbitrary."
        )


def monai_transforms(
    contract: Contract, preprocessing: PreprocessingConfig, values: Values | None
) -> list[dict[str, Any]]:
    """Return the transforms, from a file's path to a batch (B, C, *S) of images in [0, 1].

    Of a 2D backbone, the batch is the slices of the volume, in order.

    Raises:
        ConfigError: see `check_expressible`.
    """
    check_expressible(contract, preprocessing, values)
    window = _window(preprocessing.intensity, values)
    steps: list[dict[str, Any]] = [
        _step("LoadImaged", image_only=True, ensure_channel_first=True, reader="NibabelReader"),
        _step("Orientationd", axcodes=preprocessing.orientation, labels=_RAS_LABELS),
    ]
    if preprocessing.spacing_mm is not None:
        spacing_mm = list(preprocessing.spacing_mm)
        if preprocessing.antialias:
            steps.append(_lambda(_blur(spacing_mm)))
        steps.append(
            _step(
                "Spacingd", pixdim=spacing_mm, mode="bilinear", padding_mode="border",
                align_corners=False, dtype="$torch.float32",
            )
        )  # fmt: skip
    if window is not None:
        low, high = window
        steps.append(
            _step("ScaleIntensityRanged", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)
        )
    else:
        intensity = preprocessing.intensity
        steps.append(
            _step(
                "ScaleIntensityRangePercentilesd", lower=intensity.lower, upper=intensity.upper,
                b_min=0.0, b_max=1.0, clip=True, channel_wise=True,
            )
        )  # fmt: skip
    if preprocessing.crop_foreground:
        steps.append(_lambda(_crop(_threshold(preprocessing, window), preprocessing.margin_mm)))
    # As the store keeps images.
    steps += [_step("CastToTyped", dtype=f"$torch.{name}") for name in ("float16", "float32")]
    steps.append(_step("EnsureTyped", track_meta=False))
    if contract.spatial_dims == 3:
        return [*steps, _lambda("x[None]")]
    return [*steps, _lambda(f"x.movedim({1 + ACROSS[str(contract.plane)]}, 0)")]


def _window(intensity: IntensityConfig, values: Values | None) -> tuple[float, float] | None:
    """Return the values that become 0 and 1, or None where percentiles say."""
    is_window = intensity.kind == "window_hu" or (intensity.kind == "auto" and values == "hu")
    return intensity.window_hu if is_window else None


def _threshold(config: PreprocessingConfig, window: tuple[float, float] | None) -> float:
    """Return above which scaled value tissue lies; see `medssl.transforms.preprocessing`."""
    if config.foreground_threshold is not None:
        return config.foreground_threshold
    if window is None:
        return BODY_FRACTION
    low, high = window
    return float(np.clip((BODY_HU - low) / (high - low), 0, HIGHEST_THRESHOLD))


def _blur(spacing_mm: list[float]) -> str:
    """Return the expression that blurs before voxels get coarser; MONAI's blur darkens borders."""
    sigma = f"numpy.maximum(0, (numpy.asarray({spacing_mm}) / {_SPACING_OF} - 1) / 2)"
    return (
        "monai.data.MetaTensor(torch.from_numpy(scipy.ndimage.gaussian_filter("
        f"x.numpy(), sigma=(0, *{sigma}), mode='nearest')), affine=x.affine)"
    )


def _crop(threshold: float, margin_mm: float) -> str:
    """Return the expression that cuts off the air; an image of air alone stays whole."""
    return (
        f"monai.transforms.CropForeground(select_fn=lambda y: y > {threshold!r}, "
        f"margin=numpy.ceil({margin_mm!r} / {_SPACING_OF}).astype(int).tolist(), "
        f"allow_smaller=True)(x) if bool((x > {threshold!r}).any()) else x"
    )


def _step(target: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": "image", **settings}


def _lambda(expression: str) -> dict[str, Any]:
    return _step("Lambdad", func=f"$lambda x: {expression}", track_meta=False)
