"""Rectangles of an activation: the tiles that a sweep writes, and the windows around them that it reads."""

import math
from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """Rows top to bottom and columns left to right of a grid, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def index(self) -> tuple:
        """Picks the tile out of a (..., H, W) tensor."""
        return ..., slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, halo: int, height: int, width: int) -> "Tile":
        """With `halo` more on every side, as far as the grid of (height, width) goes."""
        return Tile(
            max(self.top - halo, 0), min(self.bottom + halo, height),
            max(self.left - halo, 0), min(self.right + halo, width),
        )  # fmt: skip

    def inside(self, window: "Tile") -> "Tile":
        """This tile in the coordinates of a window that contains it."""
        return Tile(self.top - window.top, self.bottom - window.top, self.left - window.left, self.right - window.left)

    def mapped(self, start, end, height: int, width: int) -> "Tile":
        """The part of another grid that `start` and `end` say the rows (and columns) come from."""
        return Tile(
            max(start(self.top), 0), min(end(self.bottom), height),
            max(start(self.left), 0), min(end(self.right), width),
        )  # fmt: skip


def grid(height: int, width: int, side: int) -> Iterator[Tile]:
    """Tiles of nearly equal size, none longer than `side`, that cover (height, width)."""
    for top, bottom in parts(height, side):
        for left, right in parts(width, side):
            yield Tile(top, bottom, left, right)


def parts(length: int, side: int) -> list[tuple[int, int]]:
    count = math.ceil(length / side)
    ends = [length * i // count for i in range(count + 1)]
    return list(zip(ends, ends[1:], strict=False))
