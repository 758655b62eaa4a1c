"""What a run over the layers will cost, before it starts: sizes, arithmetic, memory."""

import math
from dataclasses import dataclass

from .layers import Attention, Downsample, Layer, ResBlock, Upsample, channels

MIN_TILE = 16  # pixels; below, more time goes into the halos than into the tiles
# Values in a tile on a CPU at most, 16 MB: 128 px in Stable Diffusion's decoder. Larger ones are slower, because their
# memory comes as new pages for every operation (768 px, of the untiled time: 0.74, tiles of 256 px 0.85, 512 px 0.96).
CPU_ELEMENTS = 128 * 128 * 256

# Peak of one sweep in float32 copies of a tile with the larger of its channel counts. Tensors alone were measured at
# 3.4 (exact) and 5.4 (fast) with benchmarks/live_tensors.py; the rest is for what convolutions allocate themselves.
LIVE_COPIES = 7


@dataclass(frozen=True)
class Step:
    """One layer, the (height, width) that it gets, and whether its result is recomputed instead of stored."""

    layer: Layer
    height: int
    width: int
    recomputed: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        if isinstance(self.layer, Upsample):
            return self.height * 2, self.width * 2
        if isinstance(self.layer, Downsample):
            return self.height // 2, self.width // 2
        return self.height, self.width

    @property
    def out_elements(self) -> int:
        return channels(self.layer)[1] * math.prod(self.out_size)

    @property
    def work(self) -> int:
        """Multiplications, roughly: for the progress bar."""
        area, (inner, outer) = math.prod(self.out_size), channels(self.layer)
        if isinstance(self.layer, ResBlock):
            return area * 9 * outer * (inner + outer)
        if isinstance(self.layer, Attention):
            return area * outer * (4 * outer + 2 * area)
        if isinstance(self.layer, Upsample):
            return area * 4 * inner * outer * (2 if self.recomputed else 1)
        return area * math.prod(self.layer.conv.kernel_size) * inner * outer


def steps(layers: list[Layer], height: int, width: int, recompute: bool = True) -> list[Step]:
    """The layers with their sizes, for an input of (height, width).

    recompute: do not store the largest up-sampled activation where the block after it has fewer channels, but compute
    it twice: once for its statistics, once for that block. In Stable Diffusion's decoder that saves a sixth of the
    memory for a twentieth of the arithmetic.
    """
    plan = []
    for layer in layers:
        plan.append(Step(layer, height, width))
        height, width = plan[-1].out_size
    upsamples = [i for i, step in enumerate(plan) if isinstance(step.layer, Upsample)]
    if recompute and upsamples:
        last = max(upsamples, key=lambda i: plan[i].out_elements)
        after = plan[last + 1].layer
        if isinstance(after, ResBlock) and channels(after)[1] < channels(after)[0]:
            plan[last] = Step(plan[last].layer, plan[last].height, plan[last].width, recomputed=True)
    return plan


def stored_elements(plan: list[Step]) -> int:
    """The most values that are in stores at one time, for one image."""
    most, before = 0, 0  # before: values that an Upsample which is not stored is computed from
    for step in plan:
        area, (inner, outer) = step.height * step.width, channels(step.layer)
        if isinstance(step.layer, ResBlock):
            x = before or inner * area
            live = x + outer * area * (2 if before or inner < outer else 1)
        elif isinstance(step.layer, Attention):
            live = inner * area
        else:
            live = inner * area + (0 if step.recomputed else step.out_elements)
        most, before = max(most, live), inner * area if step.recomputed else 0
    return most


def widest(plan: list[Step]) -> int:
    """Channels of the widest activation where the grid is largest: there a tile has the size that was asked for."""
    full = max(math.prod(step.out_size) for step in plan)
    return max(max(channels(step.layer)) for step in plan if math.prod(step.out_size) == full)


def tile_elements(plan: list[Step], tile: int, on_cpu: bool) -> int:
    """Values in one tile, the same in every layer: where there are more channels, tiles are smaller."""
    elements = min(tile * tile, max(math.prod(step.out_size) for step in plan)) * widest(plan)
    return min(elements, CPU_ELEMENTS) if on_cpu else elements


def side(elements: int, width: int) -> int:
    """Of a square tile of `elements` values in `width` channels."""
    return max(MIN_TILE // 2, math.isqrt(elements // width))


def working_bytes(plan: list[Step], tile: int, itemsize: int, on_cpu: bool) -> int:
    """Memory on the computing device above weights and stores; itemsize: bytes of a value in the attention."""
    tokens = max((step.height * step.width * channels(step.layer)[1] for step in plan
                  if isinstance(step.layer, Attention)), default=0)  # fmt: skip
    sweep = LIVE_COPIES * 4 * tile_elements(plan, tile, on_cpu)
    return sweep + 2 * tokens * itemsize


def largest_tile(plan: list[Step], budget: int, itemsize: int, on_cpu: bool) -> int:
    """The tile in pixels, a multiple of 16, with which `working_bytes` stays within `budget`; 0 if none does."""
    rest = budget - working_bytes(plan, 0, itemsize, on_cpu)
    tile = math.isqrt(max(rest, 0) // (LIVE_COPIES * 4 * widest(plan)))
    return tile // MIN_TILE * MIN_TILE
