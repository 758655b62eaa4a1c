"""The tiny family's autoencoder: TAESD's architecture and key names, so that ComfyUI's own VAE loader takes the file.

The encoder is set, not learnt: three latent channels are the mean colour of each 8 x 8 cell (brightness and two colour
differences), the fourth is how much edge the cell holds. Such a latent is smooth, holds for any picture, and can be
computed with a few pools while training. The decoder, which has to put the detail back, is learnt.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, relu

WIDTH = 64
SCALE = 0.18215  # alpha's latent scale: the file's raw latents are the scaled ones divided by it

SIGMA_SCALE = 0.13025  # Sigma's
# The Sigma model's VAE has the colour channels the other way round and one negated, which its decoder undoes exactly.
SIGMA_CHANNELS, SIGMA_SIGNS = [0, 2, 1, 3], torch.tensor([1.0, -1.0, 1.0, 1.0])

# Brightness and two colour differences of RGB in 0..1, then each brought to mean 0 and deviation 1 on scenes.
COLOUR = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -0.5, -0.5], [0.0, 1.0, -1.0]])
MEAN = torch.tensor([0.495, -0.02, -0.035, 0.0127])
DEVIATION = torch.tensor([0.225, 0.19, 0.16, 0.0204])


def conv(channels: int, out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


class Block(nn.Module):
    def __init__(self, channels: int = WIDTH):
        super().__init__()
        layers = [conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(), conv(channels, channels)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def make_encoder() -> nn.Sequential:
    """Pixels (B, 3, 8H, 8W) in 0..1 -> scaled latents (B, 4, H, W)."""
    stages = [conv(3, WIDTH), Block()]
    for _ in range(3):
        stages += [conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]
    return nn.Sequential(*stages, conv(WIDTH, 4))


def make_decoder() -> nn.Sequential:
    """Scaled latents (B, 4, H, W) -> pixels (B, 3, 8H, 8W) in about 0..1."""
    stages = [SoftClamp(), conv(4, WIDTH), nn.ReLU()]
    for _ in range(3):
        stages += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*stages, Block(), conv(WIDTH, 3))


def edge_kernels() -> Tensor:
    """Four one-pixel brightness differences, right, left, down and up: (4, 3, 3, 3)."""
    kernels = torch.zeros(4, 3, 3, 3)
    for kernel, (row, col) in zip(kernels, ((1, 2), (1, 0), (2, 1), (0, 1)), strict=True):
        kernel[:, row, col] = 1 / 3
        kernel[:, 1, 1] = -1 / 3
    return kernels


def encode(image: Tensor) -> Tensor:
    """What the set encoder computes, by pooling: pixels (B, 3, 8H, 8W) in 0..1 -> scaled latents (B, 4, H, W)."""
    edges = relu(conv2d(image, edge_kernels().to(image), padding=1)).sum(1, keepdim=True)
    colour = torch.einsum("ij,bjhw->bihw", COLOUR.to(image), avg_pool2d(image, 8))
    features = torch.cat([colour, avg_pool2d(edges, 8)], dim=1)
    return (features - MEAN.to(image).view(4, 1, 1)) / DEVIATION.to(image).view(4, 1, 1)


def encode_sigma(image: Tensor) -> Tensor:
    """The Sigma model's latents of the same pixels, scaled."""
    return encode(image)[:, SIGMA_CHANNELS] * SIGMA_SIGNS.view(4, 1, 1)


def sigma_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE of the Sigma model from the alpha model's file."""
    swapped = dict(tensors, vae_scale=torch.tensor(SIGMA_SCALE))
    last = max((name for name in tensors if name.startswith("taesd_encoder.") and name.endswith("weight")), key=depth)
    for name in (last, last.replace("weight", "bias")):
        sign = SIGMA_SIGNS.to(tensors[name]).view(-1, *[1] * (tensors[name].ndim - 1))
        swapped[name] = tensors[name][SIGMA_CHANNELS] * sign
    first = "taesd_decoder.1.weight"
    swapped[first] = tensors[first][:, SIGMA_CHANNELS] * SIGMA_SIGNS.to(tensors[first]).view(1, -1, 1, 1)
    return swapped


def depth(name: str) -> int:
    return int(name.split(".")[1])


@torch.no_grad()
def set_encoder(encoder: nn.Sequential) -> None:
    """Write the weights with which the TAESD encoder computes `encode`."""
    for parameter in encoder.parameters():
        parameter.zero_()
    first, *_, last = (layer for layer in encoder if isinstance(layer, nn.Conv2d))
    first.weight[:3, :, 1, 1] = torch.eye(3)
    first.weight[3:7] = edge_kernels()
    for layer in encoder:
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            for channel in range(7):
                layer.weight[channel, channel, 1:, 1:] = 0.25  # with padding 1: an exact 2 x 2 mean
    last.weight[:3, :3, 1, 1] = COLOUR / DEVIATION[:3, None]
    last.weight[3, 3:7, 1, 1] = 1 / DEVIATION[3]
    last.bias.copy_(-MEAN / DEVIATION)


@torch.no_grad()
def prepare_decoder(decoder: nn.Sequential) -> None:
    """Start the decoder as the plain blow-up of the mean colours, so that it only has to learn the detail."""
    for module in decoder.modules():
        if isinstance(module, Block):
            module.conv[4].weight.mul_(0.1)
            module.conv[4].bias.zero_()
    first, *_, last = (layer for layer in decoder if isinstance(layer, nn.Conv2d))
    first.weight[:3] = 0
    first.weight[:3, :3, 1, 1] = torch.linalg.inv(COLOUR) * DEVIATION[:3]
    first.bias[:3] = torch.linalg.inv(COLOUR) @ MEAN[:3]
    for layer in decoder:
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            layer.weight[:3] = 0
            layer.weight[range(3), range(3), 1, 1] = 1
    last.weight.mul_(0.1)
    last.weight[range(3), range(3), 1, 1] += 1
    last.bias.zero_()


def state_dict(encoder: nn.Sequential, decoder: nn.Sequential) -> dict[str, Tensor]:
    """The keys ComfyUI recognises as a stand-alone TAESD."""
    tensors = {f"taesd_encoder.{key}": value for key, value in encoder.state_dict().items()}
    tensors |= {f"taesd_decoder.{key}": value for key, value in decoder.state_dict().items()}
    return tensors | {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(0.0)}
