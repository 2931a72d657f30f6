from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medssl.reports.gallery import PIXELS, Block, Tile, save_gallery, save_layers


def block(title: str, *, same: bool = True, rows: int = 2) -> Block:
    grey = np.full((8, 6), 0.5, np.float32)
    return Block(
        title, [[Tile(grey, "anterior"), Tile(grey, "posterior", same)] for _ in range(rows)]
    )


def table(inits: tuple[str, ...] = ("random", "imagenet", "rotation")) -> pd.DataFrame:
    rows = [
        {"init": init, "layer": layer, "k": 10, "share": 0.5, "ci_low": 0.4, "ci_high": 0.6,
         "chance": 0.3}
        for init in inits
        for layer in ("layer1", "layer2")
    ]  # fmt: skip
    return pd.DataFrame([{**rows[0], "init": PIXELS, "layer": "image"}, *rows])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    """Return how many pixels are of a colour."""
    return int((np.abs(pixels(path) - colour).max(2) < 12).sum())


BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def test_same_and_different_neighbours_have_frames_of_two_colours(tmp_path: Path):
    path = tmp_path / "gallery.png"
    save_gallery(path, [block("random", same=True)], "heading")
    assert count(path, BLUE) > 500
    assert count(path, ORANGE) == 0
    save_gallery(path, [block("random", same=False)], "heading")
    assert count(path, BLUE) == 0
    assert count(path, ORANGE) > 300


def test_same_and_different_neighbours_differ_without_colours(tmp_path: Path):
    """Only the letter and the line of the frame are left in grey."""
    pictures = []
    for same in (True, False):
        path = tmp_path / f"{same}.png"
        save_gallery(path, [block("random", same=same)], "heading")
        coloured = pixels(path)
        ink = (np.abs(coloured - BLUE).max(2) < 12) | (np.abs(coloured - ORANGE).max(2) < 12)
        pictures.append(ink)
    assert (pictures[0] != pictures[1]).sum() > 200


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 9])
def test_every_init_has_room_for_its_block(tmp_path: Path, num_blocks: int):
    path = tmp_path / "gallery.png"
    save_gallery(path, [block(f"init {number}") for number in range(num_blocks)], "heading")
    one = count(path, BLUE)
    save_gallery(path, [block("init", rows=1)], "heading")
    # Twice the rows, times the blocks: nothing lies outside the picture or over another.
    assert one == pytest.approx(count(path, BLUE) * 2 * num_blocks, rel=0.03)


def test_the_same_patches_give_the_same_file(tmp_path: Path):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    save_gallery(first, [block("random")], "heading")
    save_gallery(again, [block("random")], "heading")
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("num_more", [0, 1, 9])
def test_the_bars_of_every_init_are_drawn(tmp_path: Path, num_more: int):
    inits = ("random", "imagenet", *(f"pretext{number}" for number in range(num_more)))
    path = tmp_path / "layers.png"
    save_layers(path, table(inits), "imagenet")
    assert pixels(path).shape[1] > 900
    assert count(path, (28, 33, 38)) > 1000  # the reference's bars
    assert (count(path, ORANGE) > 1000) == (num_more > 0)


def test_bars_are_drawn_without_the_pixels_row(tmp_path: Path):
    both, only = tmp_path / "both.png", tmp_path / "only.png"
    rows = table()
    save_layers(both, rows, "imagenet")
    save_layers(only, rows[rows["init"] != PIXELS], "imagenet")
    assert both.read_bytes() != only.read_bytes()
