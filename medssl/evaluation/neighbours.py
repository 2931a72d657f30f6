"""Nearest neighbours of scan patches: does a backbone put the same structures close together?

A patch belongs to the structure that the mask names at its centre. It asks for its nearest
patches among those of *other* patients, as neighbouring slices of one patient are nearly equal
under any weights. The number is the share of them that show the same structure, each structure
counting alike, beside what drawing patches blindly would give.

No head is fitted and no label is used but to count, so the number tells of the weights alone.
Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018),
judge features by their neighbours; Doersch et al. (ICCV 2015) show them as a gallery.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from medssl.errors import ConfigError, DataError
from medssl.evaluation.statistics import draw_resamples, expanded_interval
from medssl.models.backbones.base import Backbone
from medssl.scans.entry import Entry
from medssl.scans.store import Region, Store
from medssl.transforms.requests import SampleRequest
from medssl.transforms.sampling import cut_image

Array = npt.NDArray[Any]

BACKGROUND = "background"
"""What a patch shows whose centre is inside the body and in no labelled structure."""

_PATCHES_AT_ONCE = 256
_QUERIES_AT_ONCE = 512
"""Bounds the similarities in memory to about 4 bytes x this x patches."""


@dataclass(frozen=True)
class Patches:
    """Patches with the structure at their centre; queries and database at once.

    Attributes:
        images: (N, C, *S) float32 in [0, 1], on the CPU.
        classes: (N,) position in ``class_names``.
        patients: (N,) position in ``patient_keys``.
        class_names: what patches show; 0 is `BACKGROUND`.
        patient_keys: sorted.
        scan_keys: the scan of each patch.
        num_small_scans: scans left out as they are smaller than a patch.
    """

    images: Tensor
    classes: Array
    patients: Array
    class_names: tuple[str, ...]
    patient_keys: tuple[str, ...]
    scan_keys: tuple[str, ...]
    num_small_scans: int = 0

    def counts(self) -> dict[str, int]:
        """Return the number of patches of each class."""
        numbers = np.bincount(self.classes, minlength=len(self.class_names))
        return {name: int(n) for name, n in zip(self.class_names, numbers, strict=True)}


def cut_patches(
    store: Store,
    scan_keys: Sequence[str],
    request: SampleRequest,
    structures: Sequence[str],
    *,
    per_class: int,
    generator: np.random.Generator,
) -> Patches:
    """Cut patches whose centres are drawn alike from each structure and from the background.

    A patch lies wholly inside its scan, so that no border or padding tells where it is from.

    Args:
        store: prepared scans with masks.
        scan_keys: of the patients to cut from.
        request: plane, channels and mask; its ``crop_size`` is the patch's.
        structures: names of the mask's values 1, 2, …; other values belong to no class.
        per_class: patches of each class and patient, over all its scans; fewer where there are
            not as many voxels to centre one on.
        generator: draws the centres.

    Raises:
        ConfigError: the request names no mask.
        DataError: the patches are of fewer than two patients or of fewer than two classes.
    """
    if request.mask is None:
        raise ConfigError("patches are told apart by a mask, and the task names none.")
    names = (BACKGROUND, *structures)
    scans: dict[str, list[str]] = defaultdict(list)
    for key in sorted(set(scan_keys)):
        scans[store.entry(key).patient_key].append(key)
    images: list[Array] = []
    found: list[tuple[str, str, int]] = []  # patient, scan, class
    num_small = 0
    for patient in sorted(scans):
        keys = [scans[patient][i] for i in generator.permutation(len(scans[patient]))[:per_class]]
        share = -(-per_class // len(keys))
        for key in keys:
            entry = store.entry(key)
            kept = request.kept_axes(entry)
            wanted = zip(kept, request.crop_size, strict=True)
            if any(entry.shape[axis] < size for axis, size in wanted):
                num_small += 1
                continue
            for number, image_CS in _cut_scan(store, entry, request, len(names), share, generator):
                images.append(image_CS)
                found.append((patient, key, number))
    patients = sorted({patient for patient, _, _ in found})
    classes = np.array([number for _, _, number in found], dtype=np.int64)
    if len(patients) < 2 or len(np.unique(classes)) < 2:
        raise DataError(
            f"neighbours need patches of two patients and two structures or more, found "
            f"{len(patients)} and {len(np.unique(classes))} in {len(set(scan_keys))} scans "
            f"({num_small} of them smaller than a patch of {list(request.crop_size)} voxels). "
            "Choose a smaller patch, or check the masks."
        )
    return Patches(
        images=torch.from_numpy(np.stack(images).astype(np.float32)),
        classes=classes,
        patients=np.searchsorted(patients, [patient for patient, _, _ in found]),
        class_names=names,
        patient_keys=tuple(patients),
        scan_keys=tuple(key for _, key, _ in found),
        num_small_scans=num_small,
    )


def embed_patches(backbone: Backbone, images: Tensor, *, device: torch.device) -> dict[str, Tensor]:
    """Return every stage's mean over a patch, (N, C) float32 on ``device``, by stage name.

    Args:
        backbone: on ``device``; used in evaluation mode.
        images: (N, C, *S) in [0, 1].
        device: where the backbone is.
    """
    backbone.eval()
    parts: dict[str, list[Tensor]] = {stage.name: [] for stage in backbone.stages}
    with torch.inference_mode():
        for chunk in images.split(_PATCHES_AT_ONCE):
            outputs = backbone(chunk.to(device, non_blocking=True))
            for stage, output in zip(backbone.stages, outputs, strict=True):
                parts[stage.name].append(output.float().flatten(2).mean(2))
    return {name: torch.cat(part) for name, part in parts.items()}


def find_neighbours(features_ND: Tensor, patients: Array, k: int) -> Array:
    """Return the ``k`` nearest patches of other patients for each patch, nearest first.

    Nearness is the cosine of features from which the mean over all patches was taken: without
    that, what all patches share would make every pair look alike. Among equals the earlier patch
    comes first, on every machine.

    Args:
        features_ND: (N, D), one row a patch.
        patients: (N,) the patient of each.
        k: how many.

    Returns:
        (N, k) positions of patches.

    Raises:
        ConfigError: a patient has fewer than ``k`` patches of others to be compared with.
    """
    num_others = len(patients) - np.unique(patients, return_counts=True)[1].max()
    if not 1 <= k <= num_others:
        raise ConfigError(
            f"k is {k}, and there are {num_others} patches of other patients to choose from. "
            f"Give a k from 1 to {num_others}, or cut more patches."
        )
    centred_ND = features_ND.float() - features_ND.float().mean(0)
    unit_ND = functional.normalize(centred_ND, dim=1)
    owner_N = torch.from_numpy(patients).to(unit_ND.device)
    found = []
    for rows, owners in zip(
        unit_ND.split(_QUERIES_AT_ONCE), owner_N.split(_QUERIES_AT_ONCE), strict=True
    ):
        own = owners[:, None] == owner_N[None]
        similarity = (rows @ unit_ND.T).masked_fill(own, -torch.inf)
        # Not topk, whose choice among equals differs between devices.
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        found.append(order[:, :k])
    return torch.cat(found).cpu().numpy()


class Agreement:
    """How many neighbours show what the query shows.

    Args:
        neighbours: (N, k), from `find_neighbours`.
        patches: the patches they are positions of.
    """

    def __init__(self, neighbours: Array, patches: Patches) -> None:
        self._patches = patches
        same: Array = np.equal(patches.classes[neighbours], patches.classes[:, None])
        self.shares: Array = same.mean(1)
        self._present = np.unique(patches.classes)
        self._sums, self._counts = _tally(self.shares, patches)

    @property
    def by_class(self) -> dict[str, float]:
        """The share of each structure that there are patches of."""
        share = self._sums.sum(0)[self._present] / self._counts.sum(0)[self._present]
        names = [self._patches.class_names[number] for number in self._present]
        return dict(zip(names, map(float, share), strict=True))

    @property
    def share(self) -> float:
        """The share of neighbours of the query's structure, averaged over structures."""
        return float(np.mean(list(self.by_class.values())))

    def resampled(self, draws: Array) -> Array:
        """Return `share` for resamples of the patients whose patches are the queries.

        Args:
            draws: (R, P) how often each patient is drawn, from `draw_patients`.

        Returns:
            (R,); NaN where a resample holds no patch of a structure. The database stays as it
            is: a patient drawn twice is not its own neighbour.
        """
        with np.errstate(invalid="ignore"):
            by_class = (draws @ self._sums) / (draws @ self._counts)
        mean: Array = by_class[:, self._present].mean(1)
        return mean


def chance_share(patches: Patches) -> float:
    """Return the `Agreement.share` expected of neighbours drawn blindly from other patients."""
    _, counts = _tally(np.ones(len(patches.classes)), patches)
    of_others = counts.sum(0) - counts  # (P, K)
    expected = of_others / of_others.sum(1, keepdims=True)
    by_query = expected[patches.patients, patches.classes]
    return float(
        np.mean([by_query[patches.classes == c].mean() for c in np.unique(patches.classes)])
    )


def draw_patients(patches: Patches, num_resamples: int, generator: np.random.Generator) -> Array:
    """Return bootstrap resamples of the patients, (R, P): draw once, and use for every init."""
    return draw_resamples(generator, num_resamples, len(patches.patient_keys))


def interval(samples: Array, patches: Patches, alpha: float) -> tuple[float, float]:
    """Return the interval of resampled values, as all of medssl's tables do."""
    return expanded_interval(samples, len(patches.patient_keys), alpha)


def _cut_scan(
    store: Store,
    entry: Entry,
    request: SampleRequest,
    num_classes: int,
    share: int,
    generator: np.random.Generator,
) -> list[tuple[int, Array]]:
    """Return up to ``share`` patches of each class of one scan, as (class, (C, *S))."""
    request.check(entry, whole=True)
    kept = request.kept_axes(entry)
    image_CS = store.read(entry.scan_key)
    mask_S = store.read_mask(entry.scan_key, str(request.mask))
    before = {axis: size // 2 for axis, size in zip(kept, request.crop_size, strict=True)}
    sizes = dict(zip(kept, request.crop_size, strict=True))
    inside = tuple(
        slice(before[axis], length - sizes[axis] + before[axis] + 1)
        if axis in before
        else slice(0, length)
        for axis, length in enumerate(mask_S.shape)
    )
    candidates_S = mask_S[inside]
    in_body_CS: Array = np.greater(image_CS, np.float16(entry.foreground_threshold))
    in_body_S: Array = np.asarray(in_body_CS.any(0))[inside]

    def read(_: Entry, region: Region) -> Array:
        part: Array = image_CS[(slice(None), *region)]
        return part

    found = []
    for number in range(num_classes):
        here_S = candidates_S == number
        places = np.flatnonzero(here_S & in_body_S if number == 0 else here_S)
        chosen = generator.choice(len(places), min(share, len(places)), replace=False)
        for place in places[np.sort(chosen)]:
            corner = np.unravel_index(place, candidates_S.shape)  # = the patch's first voxel
            region = tuple(
                slice(int(start), int(start) + sizes.get(axis, 1))
                for axis, start in enumerate(corner)
            )
            found.append((number, cut_image(read, request, entry, region)))
    return found


def _tally(values: Array, patches: Patches) -> tuple[Array, Array]:
    """Return sums of values and numbers of patches by patient and class, both (P, K)."""
    shape = (len(patches.patient_keys), len(patches.class_names))
    cell = patches.patients * shape[1] + patches.classes
    size = shape[0] * shape[1]
    sums = np.bincount(cell, values, size).reshape(shape)
    return sums, np.bincount(cell, minlength=size).reshape(shape).astype(float)
