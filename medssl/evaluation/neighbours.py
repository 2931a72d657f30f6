"""Nearest neighbours of scan patches: does a backbone put the same structures close together?

A patch belongs to the structure that the mask names at its centre. It asks for its nearest
patches among those of *other* patients, as neighbouring slices of one patient are nearly equal
under any weights. The number is the share of them that show the same structure, each structure
counting alike, beside what drawing patches blindly would give.

No head is fitted, and masks serve to choose patches and to count alone, so the number tells of the
weights.
Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018),
judge features by their neighbours; Doersch et al. (ICCV 2015) show them as a gallery.
"""

from __future__ import annotations

import math
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
"""What a patch shows whose centre is not air and where the mask is 0."""

PATCH_BYTES = 2**30
"""Memory for all patches, as float32; comparing them voxel by voxel takes as much again."""

_VOXELS_AT_ONCE = 2**20
"""Voxels that a backbone sees at once: at full resolution, each of 64 channels takes 4 MiB."""

_MOST_AT_ONCE = 256
"""Patches that a backbone sees at once, however small they are."""

_PAIRS_AT_ONCE = 2**22
"""Queries times patches compared at once: sorting takes 50 bytes of each (measured), 200 MiB."""


@dataclass(frozen=True)
class Patches:
    """Patches with the structure at their centre; queries and database at once.

    Attributes:
        images: (N, C, *S) float32 in [0, 1], on the CPU; of slices, C counts neighbours too.
        classes: (N,) int64, position in ``class_names``.
        patients: (N,) int64, position in ``patient_keys``.
        class_names: what patches may show; 0 is `BACKGROUND`.
        patient_keys: of the patients with a patch, sorted.
        scan_keys: the scan of each patch.
        num_small_scans: scans left out as they are smaller than a patch.
        note: in words, what was left out to keep to the memory; empty where nothing was.
    """

    images: Tensor
    classes: Array
    patients: Array
    class_names: tuple[str, ...]
    patient_keys: tuple[str, ...]
    scan_keys: tuple[str, ...]
    num_small_scans: int = 0
    note: str = ""

    def counts(self) -> dict[str, int]:
        """Return the number of patches of each class, zeros included, by its name."""
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
    max_bytes: int = PATCH_BYTES,
) -> Patches:
    """Cut patches whose centres are drawn alike from each structure and from the background.

    A patch lies wholly inside its scan, so that no border or padding tells where it is from. Its
    centre is the voxel at half its size along each axis, rounded down.

    Args:
        store: prepared scans with masks.
        scan_keys: of the patients to cut from.
        request: plane, channels and mask; its ``crop_size`` is the patch's.
        structures: names of the mask's values 1, 2, …; other values belong to no class.
        per_class: patches of each class and patient, over all its scans, at most; fewer where a
            scan is smaller than a patch or has not as many voxels to centre one on.
        generator: draws scans and centres, and patients where not all fit into memory.
        max_bytes: memory for the patches as float32. Where all might not fit, every class of every
            patient has fewer, and where not even one of each fits, there are fewer patients.

    Returns:
        The patches, by patient, scan and class, and a note where memory left some out.

    Raises:
        ConfigError: the request names no mask, or patches are too large for the memory.
        DataError: the patches are of fewer than two patients or of fewer than two classes, or a
            scan has other dimensions or sequences than requested, or not the mask.
    """
    if request.mask is None:
        raise ConfigError("patches are told apart by a mask, and the task names none.")
    names = (BACKGROUND, *structures)
    scans: dict[str, list[str]] = defaultdict(list)
    for key in sorted(set(scan_keys)):
        scans[store.entry(key).patient_key].append(key)
    fitting = _fit(request, len(scans), len(names), per_class, max_bytes)
    kept = sorted(scans)
    if fitting.num_patients < len(scans):
        drawn = generator.permutation(len(scans))[: fitting.num_patients]
        kept = [kept[place] for place in np.sort(drawn)]
    images: list[Array] = []
    found: list[tuple[str, str, int]] = []  # patient, scan, class
    num_small = 0
    for patient in kept:
        order = generator.permutation(len(scans[patient]))
        keys = [scans[patient][place] for place in order[: fitting.per_class]]
        each, rest = divmod(fitting.per_class, len(keys))
        for place, key in enumerate(keys):
            entry = store.entry(key)
            wanted = zip(request.kept_axes(entry), request.crop_size, strict=True)
            if any(entry.shape[axis] < size for axis, size in wanted):
                num_small += 1
                continue
            share = each + (place < rest)
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
            "Check the masks; or set a smaller sampling.crop_size (for smaller patches) or a "
            "larger splits.val_fraction (for more patients) in the study's config, and run the "
            "study in a new folder."
        )
    return Patches(
        images=torch.from_numpy(np.stack(images, dtype=np.float32)),
        classes=classes,
        patients=np.searchsorted(patients, [patient for patient, _, _ in found]),
        class_names=names,
        patient_keys=tuple(patients),
        scan_keys=tuple(key for _, key, _ in found),
        num_small_scans=num_small,
        note=fitting.note,
    )


def embed_patches(backbone: Backbone, images: Tensor, *, device: torch.device) -> dict[str, Tensor]:
    """Return every stage's mean over a patch, by stage name, finest first.

    Args:
        backbone: on ``device``; left in evaluation mode.
        images: (N, C, *S) in [0, 1]; a part at a time is copied to ``device``.
        device: where the backbone is.

    Returns:
        Tensors (N, D) float32 on ``device``; D is the stage's number of channels.
    """
    backbone.eval()
    parts: dict[str, list[Tensor]] = {stage.name: [] for stage in backbone.stages}
    with torch.inference_mode():
        at_once = _VOXELS_AT_ONCE // math.prod(images.shape[2:])
        for chunk in images.split(min(_MOST_AT_ONCE, max(1, at_once))):
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
        features_ND: (N, D), floating point, one row a patch, on any device.
        patients: (N,) the patient of each.
        k: how many, 1 or more.

    Returns:
        (N, k) int64, positions of patches.

    Raises:
        ConfigError: ``k`` is below 1, or a patient has fewer patches of others to be compared with.
    """
    num_others = len(patients) - np.unique(patients, return_counts=True)[1].max()
    if not 1 <= k <= num_others:
        raise ConfigError(
            f"k is {k}, and there are {num_others} patches of other patients to choose from. "
            f"Give --k a number from 1 to {num_others}."
        )
    centred_ND = features_ND.float() - features_ND.float().mean(0)
    unit_ND = functional.normalize(centred_ND, dim=1, out=centred_ND)  # one copy, no more
    owner_N = torch.from_numpy(patients).to(unit_ND.device)
    at_once = max(1, _PAIRS_AT_ONCE // len(patients))
    found = []
    for rows, owners in zip(unit_ND.split(at_once), owner_N.split(at_once), strict=True):
        own = owners[:, None] == owner_N[None]
        similarity = (rows @ unit_ND.T).masked_fill(own, -torch.inf)
        # Not topk, whose choice among equals differs between devices.
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        found.append(order[:, :k].clone())  # a view would keep the whole order in memory
    return torch.cat(found).cpu().numpy()


class Agreement:
    """How many neighbours show what the query shows.

    Args:
        neighbours: (N, k), from `find_neighbours`.
        patches: the patches they are positions of.

    Attributes:
        shares: (N,) the share of each query's neighbours that show its structure.
    """

    def __init__(self, neighbours: Array, patches: Patches) -> None:
        self._patches = patches
        same: Array = np.equal(patches.classes[neighbours], patches.classes[:, None])
        self.shares: Array = same.mean(1)
        self._present = np.unique(patches.classes)
        self._sums, self._counts = _tally(self.shares, patches)

    @property
    def by_class(self) -> dict[str, float]:
        """The mean of `shares` over the queries of each structure that there are any of."""
        share = self._sums.sum(0)[self._present] / self._counts.sum(0)[self._present]
        names = [self._patches.class_names[number] for number in self._present]
        return dict(zip(names, map(float, share), strict=True))

    @property
    def share(self) -> float:
        """The share of neighbours of the query's structure: the plain mean of `by_class`."""
        return float(np.mean(list(self.by_class.values())))

    def resampled(self, draws: Array) -> Array:
        """Return `share` for resamples of the patients whose patches are the queries.

        Args:
            draws: (R, P) how often each patient is drawn, from `draw_patients`.

        Returns:
            (R,), each in [0, 1]; NaN where a resample holds no patch of a structure. The database
            stays as it is: a patient drawn twice is not its own neighbour.
        """
        with np.errstate(invalid="ignore"):
            by_class = (draws @ self._sums) / (draws @ self._counts)
        mean: Array = by_class[:, self._present].mean(1)
        return mean


def chance_share(patches: Patches) -> float:
    """Return the `Agreement.share` expected of neighbours drawn blindly from other patients.

    As of neighbours found, it is the mean over each structure's queries, then over structures.
    """
    _, counts = _tally(np.ones(len(patches.classes)), patches)
    of_others = counts.sum(0) - counts  # (P, K)
    expected = of_others / of_others.sum(1, keepdims=True)
    by_query = expected[patches.patients, patches.classes]
    return float(
        np.mean([by_query[patches.classes == c].mean() for c in np.unique(patches.classes)])
    )


def draw_patients(patches: Patches, num_resamples: int, generator: np.random.Generator) -> Array:
    """Return how often each patient is in each bootstrap resample, (R, P) float64.

    Draw once, and use for every init, so that their differences are paired.
    """
    return draw_resamples(generator, num_resamples, len(patches.patient_keys))


def interval(samples: Array, patches: Patches, alpha: float) -> tuple[float, float]:
    """Return the lower and upper end of the interval of resampled values (R,), see `statistics`.

    Both are NaN where there are fewer than two patients, or too few of the values are defined.

    Args:
        samples: from `Agreement.resampled`, or differences of such.
        patches: whose patients were resampled.
        alpha: what the interval leaves out: 0.05 for 95 %.
    """
    return expanded_interval(samples, len(patches.patient_keys), alpha)


@dataclass(frozen=True)
class _Fitting:
    """How many patients, and patches of each class of each, fit into memory."""

    num_patients: int
    per_class: int
    note: str = ""


def _fit(
    request: SampleRequest, num_patients: int, num_classes: int, per_class: int, max_bytes: int
) -> _Fitting:
    patch_bytes = 4 * request.in_channels * math.prod(request.crop_size)
    most = max_bytes // patch_bytes
    if num_patients * num_classes * per_class <= most:
        return _Fitting(num_patients, per_class)
    if most < 2 * num_classes:
        raise ConfigError(
            f"a patch of {_times(request.crop_size)} voxels (channels: {request.in_channels}) "
            f"takes {patch_bytes / 2**20:.1f} MiB; one of each of {num_classes} structures of two "
            f"patients exceeds the {max_bytes / 2**20:.0f} MiB for patches. Set a smaller "
            "sampling.crop_size in the study's config, and run the study in a new folder."
        )
    kept = min(num_patients, most // num_classes)
    fewer = min(per_class, most // (kept * num_classes))
    of_patients = f"; {kept} of {num_patients} patients" if kept < num_patients else ""
    return _Fitting(
        kept,
        fewer,
        f"Patches may take {max_bytes / 2**20:.0f} MiB, that is {most} of "
        f"{_times(request.crop_size)} voxels: each structure of each patient has {fewer} at most "
        f"in place of {per_class}{of_patients}.",
    )


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _cut_scan(
    store: Store,
    entry: Entry,
    request: SampleRequest,
    num_classes: int,
    share: int,
    generator: np.random.Generator,
) -> list[tuple[int, Array]]:
    """Return up to ``share`` patches of each class of one scan, as (class, (C, *S) float16)."""
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
            # A copy: a view would keep the whole scan in memory.
            found.append((number, cut_image(read, request, entry, region).copy()))
    return found


def _tally(values: Array, patches: Patches) -> tuple[Array, Array]:
    """Return sums of values and numbers of patches by patient and class, both (P, K)."""
    shape = (len(patches.patient_keys), len(patches.class_names))
    cell = patches.patients * shape[1] + patches.classes
    size = shape[0] * shape[1]
    sums = np.bincount(cell, values, size).reshape(shape)
    return sums, np.bincount(cell, minlength=size).reshape(shape).astype(float)
