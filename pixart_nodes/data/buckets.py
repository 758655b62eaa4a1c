"""The picture sizes that PixArt was trained on: tables of aspect ratio -> (height, width), one per training area.

PixArt-alpha and PixArt-sigma diffusion/data/datasets/utils.py. Keys are height / width as the original rounds them,
in ascending order; where two keys are equally near, the first one wins, as there.
"""

_RATIOS_1024 = {
    0.25: (512, 2048), 0.26: (512, 1984), 0.27: (512, 1920), 0.28: (512, 1856), 0.32: (576, 1792),
    0.33: (576, 1728), 0.35: (576, 1664), 0.4: (640, 1600), 0.42: (640, 1536), 0.48: (704, 1472),
    0.5: (704, 1408), 0.52: (704, 1344), 0.57: (768, 1344), 0.6: (768, 1280), 0.68: (832, 1216),
    0.72: (832, 1152), 0.78: (896, 1152), 0.82: (896, 1088), 0.88: (960, 1088), 0.94: (960, 1024),
    1.0: (1024, 1024), 1.07: (1024, 960), 1.13: (1088, 960), 1.21: (1088, 896), 1.29: (1152, 896),
    1.38: (1152, 832), 1.46: (1216, 832), 1.67: (1280, 768), 1.75: (1344, 768), 2.0: (1408, 704),
    2.09: (1472, 704), 2.4: (1536, 640), 2.5: (1600, 640), 2.89: (1664, 576), 3.0: (1728, 576),
    3.11: (1792, 576), 3.62: (1856, 512), 3.75: (1920, 512), 3.88: (1984, 512), 4.0: (2048, 512),
}  # fmt: skip

_RATIOS_2880 = {  # not a scaled copy of the others
    0.25: (1408, 5760), 0.26: (1408, 5568), 0.27: (1408, 5376), 0.28: (1408, 5184), 0.32: (1600, 4992),
    0.33: (1600, 4800), 0.34: (1600, 4672), 0.4: (1792, 4480), 0.42: (1792, 4288), 0.47: (1920, 4096),
    0.49: (1920, 3904), 0.51: (1920, 3776), 0.55: (2112, 3840), 0.59: (2112, 3584), 0.68: (2304, 3392),
    0.72: (2304, 3200), 0.78: (2496, 3200), 0.83: (2496, 3008), 0.89: (2688, 3008), 0.93: (2688, 2880),
    1.0: (2880, 2880), 1.07: (2880, 2688), 1.12: (3008, 2688), 1.21: (3008, 2496), 1.28: (3200, 2496),
    1.39: (3200, 2304), 1.47: (3392, 2304), 1.7: (3584, 2112), 1.82: (3840, 2112), 2.03: (3904, 1920),
    2.13: (4096, 1920), 2.39: (4288, 1792), 2.5: (4480, 1792), 2.92: (4672, 1600), 3.0: (4800, 1600),
    3.12: (4992, 1600), 3.68: (5184, 1408), 3.82: (5376, 1408), 3.95: (5568, 1408), 4.0: (5760, 1408),
}  # fmt: skip

# The apps and diffusers choose among fewer ratios. The 2048 selection drops other keys than the smaller ones do.
_DROPPED_FOR_USE = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}
_DROPPED_FOR_USE_2048 = {0.27, 0.28, 2.89, 3.11, 3.62, 3.75, 3.88}

Table = dict[float, tuple[int, int]]


def _scaled(table: Table, scale: float, dropped=frozenset()) -> Table:
    return {key: (int(h * scale), int(w * scale)) for key, (h, w) in table.items() if key not in dropped}


TABLES: dict[str, Table] = {
    "256": _scaled(_RATIOS_1024, 1 / 4),
    "512": _scaled(_RATIOS_1024, 1 / 2),
    "1024": _RATIOS_1024,
    "2048": _scaled(_RATIOS_1024, 2),
    "2880": _RATIOS_2880,
    # The repository calls this one ASPECT_RATIO_2880_TEST.
    "4096": _scaled(_RATIOS_1024, 4, _DROPPED_FOR_USE_2048),
}

TEST_TABLES: dict[str, Table] = {
    "256": _scaled(_RATIOS_1024, 1 / 4, _DROPPED_FOR_USE),
    "512": _scaled(_RATIOS_1024, 1 / 2, _DROPPED_FOR_USE),
    "1024": _scaled(_RATIOS_1024, 1, _DROPPED_FOR_USE),
    "2048": _scaled(_RATIOS_1024, 2, _DROPPED_FOR_USE_2048),
    "2880": TABLES["4096"],
}


OTHER_SIZES = ("192", "384", "768", "1280", "1536")  # trained at by users, and 192 by the bundled tiny model
STEP = 16  # pixels of a patch: 8 of the VAE times 2


def training_table(size: str) -> Table:
    """PixArt's table of a size; for OTHER_SIZES the one of 1024 scaled to it, sides rounded to whole patches.

    Raises ValueError for another size.
    """
    if size in TABLES:
        return TABLES[size]
    if size not in OTHER_SIZES:
        raise ValueError(f"size {size!r} is none of {', '.join(TRAINING_SIZES)}.")
    scale = int(size) / 1024
    sizes = {key: tuple(STEP * round(side * scale / STEP) for side in sides) for key, sides in _RATIOS_1024.items()}
    first = {sides: key for key, sides in reversed(sizes.items())}  # small sizes coincide after rounding
    return {key: sides for key, sides in sizes.items() if first[sides] == key}


TRAINING_SIZES = tuple(sorted((*TABLES, *OTHER_SIZES), key=int))


def nearest_key(table: Table, ratio: float) -> float:
    """The table's key nearest to a height / width ratio."""
    return min(table, key=lambda key: abs(key - ratio))


def nearest(table: Table, height: float, width: float) -> tuple[float, int, int]:
    """The bucket whose shape is nearest to a picture's: (key, height, width), sizes in pixels.

    Raises ValueError for a picture without area.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"A picture of {width} x {height} pixels has no aspect ratio; give both sides above zero.")
    key = nearest_key(table, height / width)
    return key, *table[key]


def merge_small(counts: dict[float, int], smallest: int, tolerance: float = 1.35) -> dict[float, float]:
    """Where the pictures of each ratio go so that, if possible, no bucket has fewer than `smallest`: {ratio: ratio}.

    A bucket that is too small joins its nearest neighbour (height / width at most `tolerance` times off, so that
    little is cropped); one without such a neighbour stays, and its pictures are repeated to fill a batch.
    """
    members = {ratio: [ratio] for ratio, count in counts.items() if count}
    sizes = {ratio: counts[ratio] for ratio in members}
    alone = set()
    while small := [ratio for ratio in members if sizes[ratio] < smallest and ratio not in alone]:
        ratio = min(small, key=lambda key: (sizes[key], key))
        near = [
            other for other in members
            if other != ratio and all(max(m / other, other / m) <= tolerance for m in members[ratio])
        ]  # fmt: skip
        if not near:
            alone.add(ratio)
            continue
        target = min(near, key=lambda other: (max(ratio / other, other / ratio), -sizes[other]))
        members[target] += members.pop(ratio)
        sizes[target] += sizes.pop(ratio)
    return {ratio: target for target, ratios in members.items() for ratio in ratios}
