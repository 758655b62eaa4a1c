"""A sheet of pictures, each with its caption and its score below, for a README."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, MOST = 4, 16
TILE = 224  # px, the longer side of a picture
GAP = 12
FONT_SIZE, LINE = 13, 17  # px
PAPER, INK, GOOD, BAD = "white", "#222222", "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Tile:
    """A picture, what was asked for, and how many of its objects came out right."""

    image: Image.Image
    caption: str
    right: int
    wanted: int


def save_grid(tiles: list[Tile], path: Path) -> None:
    """Write the first tiles as one picture; its format follows the ending of `path`."""
    tiles = tiles[:MOST]
    font = ImageFont.load_default(size=FONT_SIZE)
    texts = [textwrap.wrap(tile.caption, width=TILE // 7) for tile in tiles]
    columns = min(COLUMNS, len(tiles))
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [GAP + TILE + 6 + LINE * (1 + max(len(texts[index]) for index in row)) for row in rows]
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, sum(heights) + GAP), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            _paste(sheet, GAP + column * (TILE + GAP), top + GAP, tiles[index], texts[index], font)
        top += height
    sheet.save(path)


def _paste(sheet: Image.Image, left: int, top: int, tile: Tile, lines: list[str], font) -> None:
    scale = TILE / max(tile.image.size)
    width, height = (round(side * scale) for side in tile.image.size)
    sheet.paste(tile.image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((left, top + TILE + 6 + LINE * number), line, fill=INK, font=font)
    verdict = f"{tile.right} of {tile.wanted} right"
    colour = GOOD if tile.right == tile.wanted else BAD
    draw.text((left, top + TILE + 6 + LINE * len(lines)), verdict, fill=colour, font=font)
