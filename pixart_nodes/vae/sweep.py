"""Runs the layers of an AutoencoderKL one after the other, each one tile by tile over the whole activation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from .attention import attend, project, queries
from .layers import Attention, Conv, Downsample, ResBlock, Upsample, channels, norm_of
from .plan import Step, side
from .store import Moments, Store
from .tiles import Tile, grid
from .upsampling import MergedKernels, Upsampled


@dataclass
class Sweep:
    """How a run is made: `device` and `dtype` compute; stores of `store_dtype` lie on `store_device`.

    elements: values in one tile. weights: reads a module's (weight, bias). merge: see run in exact_tiles. progress:
    called with the multiplications of each tile; what it raises ends the run.
    """

    device: torch.device
    dtype: torch.dtype
    elements: int
    store_dtype: torch.dtype
    store_device: torch.device
    weights: Callable[[nn.Module], tuple[Tensor, Tensor | None]]
    merge: bool
    progress: Callable[[float], None]

    def run(self, plan: list[Step], x: Store) -> Store:
        """The layers of `plan` on one activation. A first Conv leaves x as it is; a last Conv gives float32."""
        for index, step in enumerate(plan):
            self.step = step
            following = plan[index + 1].layer if index + 1 < len(plan) else None
            self.wants_moments = norm_of(following) is not None
            self.is_last = following is None
            x = self.LAYERS[type(step.layer)](self, x, step.layer)
        return x

    def conv(self, x, layer: Conv) -> Store:
        out = self.new_store(layer.conv.out_channels, *x.shape[1:], is_last=self.is_last)
        out.moments = self.new_moments(layer.conv.out_channels)
        affine = self.affine(x.moments, layer.norm)
        for tile, window in self.tiles(x.shape, max(channels(layer))):
            y = self.activate(self.read(x, window), affine)
            out.write(tile, self.apply(layer.conv, y)[tile.inside(window).index])
        return out

    def resblock(self, x, layer: ResBlock) -> Store:
        """x + conv2(norm2(conv1(norm1(x)))), written over x where x is stored and has the room."""
        inner, outer = channels(layer)
        hidden, trunk = self.new_store(outer, *x.shape[1:]), x
        hidden.moments = Moments(outer, self.device)
        if isinstance(x, Upsampled) or inner < outer:
            trunk = self.new_store(outer, *x.shape[1:])
        affine = self.affine(x.moments, layer.norm1)
        for tile, window in self.tiles(x.shape, max(inner, outer), share=0.5):
            y = self.read(x, window)
            if trunk is not x:
                trunk.write(tile, self.apply(layer.shortcut, y[tile.inside(window).index]))
            y = self.apply(layer.conv1, self.activate(y, affine))
            hidden.write(tile, y[tile.inside(window).index])
        shortcut = layer.shortcut if trunk is x else None
        trunk.moments = self.new_moments(outer)
        affine = self.affine(hidden.moments, layer.norm2)
        for tile, window in self.tiles(x.shape, max(inner, outer), share=0.5):
            y = self.apply(layer.conv2, self.activate(self.read(hidden, window), affine))
            residual = self.read(trunk, tile)
            if shortcut is not None:
                residual = self.apply(shortcut, residual)
            trunk.write(tile, residual.add_(y[tile.inside(window).index]))
        del hidden
        trunk.narrow(outer)
        return trunk

    def attention(self, x: Store, layer: Attention) -> Store:
        """Written over x: a tile's queries need nothing of the others but keys and values, which are kept whole."""
        affine = self.affine(x.moments, layer.norm)
        keys, values = self.keys_values(x, layer, affine)
        x.moments = self.new_moments(len(x.values))
        for tile in self.attention_tiles(x, share=0.9):
            residual = self.read(x, tile)
            y = self.normalise(residual.clone(), *affine).to(self.dtype)
            x.write(tile, residual.add_(attend(layer, y, keys, values)))
        return x

    def keys_values(self, x: Store, layer: Attention, affine) -> tuple[Tensor, Tensor]:
        """Of all positions: (1, N, C) each, in the order of the tiles, which makes no difference to attention."""
        width, height, columns = x.shape
        keys, values = (torch.empty(1, height * columns, width, dtype=self.dtype, device=self.device) for _ in "kv")
        done = 0
        for tile in self.attention_tiles(x, share=0.1):
            y = self.normalise(self.read(x, tile), *affine).to(self.dtype)
            keys[:, done : done + tile.area] = project(layer.k, y)
            values[:, done : done + tile.area] = project(layer.v, y)
            done += tile.area
        return keys, values

    def attention_tiles(self, x: Store, share: float) -> Iterator[Tile]:
        elements = min(self.elements, len(x.values) * queries(self.device.type))
        return (tile for tile, _ in self.tiles(x.shape, len(x.values), elements, share=share))

    def upsample(self, x: Store, layer: Upsample) -> Store | Upsampled:
        virtual = self.upsampled(x, layer)
        out = virtual if self.step.recomputed else self.new_store(*virtual.shape)
        out.moments = self.new_moments(layer.conv.out_channels)
        for tile, _ in self.tiles(virtual.shape, max(channels(layer))):
            out.write(tile, self.read(virtual, tile))
        return out

    def upsampled(self, x: Store, layer: Upsample) -> Upsampled:
        merged = MergedKernels(*self.weights(layer.conv), self.device, self.dtype) if self.merge else None
        return Upsampled(x, layer.conv, merged, self.dtype)

    def downsample(self, x: Store, layer: Downsample) -> Store:
        _, height, width = x.shape
        out = self.new_store(layer.conv.out_channels, height // 2, width // 2)
        out.moments = self.new_moments(layer.conv.out_channels)
        for tile, _ in self.tiles(out.shape, 4 * max(channels(layer))):
            window = tile.mapped(lambda start: 2 * start, lambda end: 2 * end + 1, height, width)
            missing = [2 * end + 1 - edge for end, edge in ((tile.right, window.right), (tile.bottom, window.bottom))]
            out.write(tile, self.apply(layer.conv, pad(self.read(x, window), (0, missing[0], 0, missing[1]))))
        return out

    LAYERS = {Conv: conv, ResBlock: resblock, Attention: attention, Upsample: upsample, Downsample: downsample}

    def tiles(self, shape, width: int, elements: int | None = None, share: float = 1.0) -> Iterator[tuple[Tile, Tile]]:
        """Tiles of an activation, and the windows that a 3x3 convolution sees. They make up `share` of the step."""
        _, height, columns = shape
        for tile in grid(height, columns, side(elements or self.elements, width)):
            yield tile, tile.grown(1, height, columns)
            self.progress(share * self.step.work * tile.area / (height * columns))

    def new_store(self, width: int, height: int, columns: int, is_last: bool = False) -> Store:
        return Store(width, height, columns, torch.float32 if is_last else self.store_dtype, self.store_device)

    def new_moments(self, width: int) -> Moments | None:
        return Moments(width, self.device) if self.wants_moments else None

    def read(self, x, tile: Tile) -> Tensor:
        return x.read(tile, self.device)

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """x (1, C, h, w) float32 through a module that computes in `dtype`, back in float32."""
        return module(x.to(self.dtype)).float()

    def affine(self, moments: Moments, norm: nn.GroupNorm | None) -> tuple[Tensor, Tensor] | None:
        """GroupNorm with the statistics of the whole activation, as scale and shift (C, 1, 1)."""
        if norm is None:
            return None
        return tuple(t.to(self.device) for t in moments.affine(norm, *self.weights(norm)))

    def activate(self, x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """GroupNorm and SiLU, in place; x as it is where there is no norm."""
        return x if affine is None else silu(self.normalise(x, *affine), inplace=True)

    @staticmethod
    def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """In place."""
        return torch.addcmul(shift, x, scale, out=x)
