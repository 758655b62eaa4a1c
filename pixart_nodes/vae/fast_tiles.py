"""Tiled decode that estimates what needs the whole picture on a small version of it.

Keys and values come from the decode of a small latent; the stage at the size of the latent is otherwise exact. Its
result, made small, goes through the rest of the decoder for the GroupNorm statistics. With these known, a tile needs
nothing of the picture but a margin, so whole stages run on one tile: a third of the stores of exact tiles, and
attention that grows with the picture's area instead of the area's square. All tiles share their statistics, so there
are no seams; but these are estimates, so tone and contrast shift. benchmarks/README.md says by how much.
"""

import math

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .attention import attend
from .layers import Conv, Layer, ResBlock, Upsample, channels
from .plan import Step, side, steps, stored_elements
from .store import Store
from .sweep import Sweep
from .tiles import Tile, grid

REFERENCE = 128  # longer side of the small latent: a picture of 1024 pixels; up to there, fast is exact


class FastSweep(Sweep):
    """Runs on the small latent, remembering what needs the whole picture, then stage by stage on the large one."""

    def run(self, plan: list[Step], x: Store) -> Store:
        small, self.affines, self.memory = reduced(x.values), {}, {}
        if small is x.values:
            return super().run(plan, x)
        first, *others = stages(plan)
        super().run(replanned(first, *small.shape[1:]), Store.of(small))
        x = super().run(first, x)
        _, height, width = x.shape
        small = reduced(x.read(Tile(0, height, 0, width), self.store_device)[0])
        super().run(replanned(sum(others, []), *small.shape[1:]), Store.of(small))
        for stage in others:
            x = self.stage(x, stage, is_last=stage[-1] is plan[-1])
        return x

    def affine(self, moments, norm):
        self.affines[norm] = super().affine(moments, norm)
        return self.affines[norm]

    def keys_values(self, x, layer, affine):
        """Those of the small latent, also when the large one asks."""
        if layer not in self.memory:
            self.memory[layer] = super().keys_values(x, layer, affine)
        return self.memory[layer]

    def stage(self, x: Store, stage: list[Step], is_last: bool) -> Store:
        """All layers of a stage on one tile after the other, each with the margin that its convolutions see."""
        layers = [step.layer for step in stage]
        if isinstance(layers[0], Upsample):
            x, layers = self.upsampled(x, layers[0]), layers[1:]
        _, height, width = x.shape
        out = self.new_store(channels(layers[-1])[1], height, width, is_last)
        halo, work = sum(map(reach, layers)), sum(step.work for step in stage)
        for tile in grid(height, width, side(self.elements, max(max(channels(layer)) for layer in layers))):
            window = tile.grown(halo, height, width)
            y = self.read(x, window)
            for layer in layers:
                y = self.through(layer, y)
            out.write(tile, y[tile.inside(window).index])
            self.progress(work * tile.area / (height * width))
        return out

    def through(self, layer: Layer, x: Tensor) -> Tensor:
        """x (1, C, h, w) float32 through one layer, with what was remembered. May change x."""
        if isinstance(layer, Conv):
            return self.apply(layer.conv, self.activate(x, self.affines[layer.norm]))
        if isinstance(layer, ResBlock):
            y = self.apply(layer.conv1, self.activate(x.clone(), self.affines[layer.norm1]))
            y = self.apply(layer.conv2, self.activate(y, self.affines[layer.norm2]))
            return y.add_(x if layer.shortcut is None else self.apply(layer.shortcut, x))
        y = self.normalise(x.clone(), *self.affines[layer.norm]).to(self.dtype)
        return x.add_(attend(layer, y, *self.memory[layer]))


def reduced(latent: Tensor) -> Tensor:
    """(C, H, W) -> means over cells, at most REFERENCE long, with the mean and deviation that the channels had."""
    size = small_size(*latent.shape[1:])
    if size == latent.shape[1:]:
        return latent
    small = adaptive_avg_pool2d(latent, size)
    mean, deviation = latent.mean((1, 2), keepdim=True), latent.std((1, 2), keepdim=True)
    unit = (small - small.mean((1, 2), keepdim=True)) / small.std((1, 2), keepdim=True).clamp(min=1e-6)
    return unit * deviation + mean


def small_size(height: int, width: int) -> tuple[int, int]:
    factor = max(1.0, max(height, width) / REFERENCE)
    return math.ceil(height / factor), math.ceil(width / factor)


def replanned(plan: list[Step], height: int, width: int) -> list[Step]:
    return steps([step.layer for step in plan], height, width)


def small_plan(plan: list[Step]) -> list[Step]:
    """All that runs on the small version, as one plan."""
    return replanned(plan, *small_size(plan[0].height, plan[0].width))


def stages(plan: list[Step]) -> list[list[Step]]:
    """The layers of equal resolution, the up-sampling before them included."""
    groups = [[]]
    for step in plan:
        if isinstance(step.layer, Upsample):
            groups.append([])
        groups[-1].append(step)
    return groups


def reach(layer: Layer) -> int:
    """How many positions away a layer looks, but for attention."""
    if isinstance(layer, ResBlock):
        return 2
    return layer.conv.kernel_size[0] // 2 if isinstance(layer, Conv) else 0


def extra_work(plan: list[Step]) -> int:
    """Of the run on the small latent, where there is one."""
    small = small_plan(plan)
    same = (small[0].height, small[0].width) == (plan[0].height, plan[0].width)
    return 0 if same else sum(step.work for step in small)


def fast_stored_elements(plan: list[Step]) -> int:
    """As stored_elements of an exact run: the most values in stores at one time."""
    if not extra_work(plan):
        return stored_elements(plan)
    outs = [0, *(stage[-1].out_elements for stage in stages(plan))]
    return max(stored_elements(small_plan(plan)), *(a + b for a, b in zip(outs, outs[1:], strict=False)))
