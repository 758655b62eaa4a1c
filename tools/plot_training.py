"""Draw the loss curve of a tiny-family build: its three stages one after the other, on a logarithmic axis.

    python tools/plot_training.py build/tiny docs/tiny_family_loss.png
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from pixart_nodes.training import events  # noqa: E402

STAGES = {"pixel": "#3f789e", "alignment": "#b5651d", "aesthetics": "#2e7d4f"}
WIDTH, HEIGHT = 960, 420  # px
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 50  # px around the plot
PAPER, INK, RULE = "white", "#222222", "#dddddd"
TICKS = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def curves(work: Path) -> dict[str, list[tuple[int, float]]]:
    """Stage -> [(updates since the start of the first stage, noise MSE)], for the stages that have begun."""
    found, offset = {}, 0
    for stage in STAGES:
        records = {row["step"]: row["mse"] for row in events.read(work / f"dit-{stage}" / "events.jsonl")}
        if records:  # a resumed run may have logged a step twice: the later one counts
            found[stage] = [(offset + step, mse) for step, mse in sorted(records.items())]
            offset += max(records)
    return found


def draw(found: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """The picture of what `curves` found. Raises ValueError when there is nothing to draw."""
    points = [point for line in found.values() for point in line]
    if not points:
        raise ValueError("no stage has written events.jsonl yet")
    steps = max(step for step, _ in points)
    low, high = (f(math.log(mse) for _, mse in points) for f in (min, max))

    def place(step: float, mse: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / steps
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log(mse)) / (high - low or 1)

    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for tick in TICKS:
        if low <= math.log(tick) <= high:
            y = place(0, tick)[1]
            pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=RULE)
            pen.text((LEFT - 8, y), f"{tick:g}", fill=INK, font=font, anchor="rm")
    free = 0.0  # px: where the last label ends
    for stage, line in found.items():
        pen.line([place(*point) for point in line], fill=STAGES[stage], width=2)
        x = max(place(*line[0])[0], free)
        pen.text((x, HEIGHT - BOTTOM + 6), stage, fill=STAGES[stage], font=font)
        free = x + font.getlength(stage) + 12
    pen.text((WIDTH - RIGHT, HEIGHT - 20), f"{steps} updates", fill=INK, font=font, anchor="rm")
    pen.text((LEFT, 14), "error of the predicted noise, weighted as trained", fill=INK, font=font, anchor="lm")
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the --work folder of build_tiny.py")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    try:
        draw(curves(options.work)).save(options.picture)
    except ValueError as error:
        print(f"{options.work}: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
