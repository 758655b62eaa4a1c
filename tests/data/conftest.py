"""Small pictures, and encoders that are a few sums: the cache does not care what its features mean."""

import pytest
import torch
from PIL import Image

from pixart_nodes.data.encode import Encoders, fill, stores
from pixart_nodes.data.index import index_of
from pixart_nodes.data.manifest import ScanOptions, scan

WIDTH = 16  # of a caption's features


def picture(seed: int, width: int = 256, height: int = 256) -> Image.Image:
    noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (8, 8), bytes(noise.flatten().tolist())).resize((width, height))


def write_pictures(folder, shapes, start: int = 0):
    """p0.png, p1.png, ... with captions; shapes is [(width, height), ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shape in enumerate(shapes, start):
        picture(number, *shape).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"picture number {number}")
    return folder


def kinds(manifest):
    """{picture: kind of its problem}."""
    return {problem.name: problem.kind for problem in manifest.problems}


class FakeEncoders:
    """Counts its calls. Latents are the means of 8 x 8 pixels with a std, captions one row per word."""

    def __init__(self, family="alpha", vae="vae", t5="t5", limit=None):
        self.family, self.vae, self.t5 = family, vae, t5
        self.limit = limit or {"alpha": 120, "sigma": 300}[family]
        self.images, self.texts = 0, []

    def record(self) -> Encoders:
        return Encoders(
            self.family, self.vae, self.encode_images, self.t5, str.strip, self.encode_captions,
            lambda: torch.zeros(self.limit, WIDTH), self.limit,
        )  # fmt: skip

    def encode_images(self, pixels):
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        mean = torch.cat([mean, mean.sum(1, keepdim=True)], 1)
        return torch.cat([mean, torch.full_like(mean, 0.5)], 1)

    def encode_captions(self, texts):
        self.texts += texts
        return [self.features(text) for text in texts]

    def features(self, text):
        return torch.stack([
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, word)))) for word in text.split()
        ])[: self.limit].half().float()  # fmt: skip


def build_cache(source, root, encoders=None, options=None, prompts=(), **fill_options):
    """scan -> fill -> training set, as the node and the command do."""
    manifest = scan(source, options or ScanOptions(size="256"))
    record = (encoders or FakeEncoders()).record()
    latents, captions = stores(root, record)
    fill(manifest, record, latents, captions, prompts=prompts, **fill_options)
    return index_of(root, manifest, record, latents, captions, prompts)


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", [(256, 256)] * 4 + [(320, 192)] * 3)
