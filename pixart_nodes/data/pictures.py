"""Picture files -> pixels, as PixArt's training saw them, and a contact sheet of many."""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

# What Pillow's decoders raise on damaged files.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
SIXTEEN_BIT = ("PNG", "PPM")  # formats whose grey is 16 bit at most, also where Pillow calls it I
THUMBNAIL = 112
SHEET_COLUMNS = 8


def digest(data: bytes) -> str:
    """The content address of a file: 128 bits of BLAKE2b as hexadecimal text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def decode(data: bytes) -> Image.Image:
    """A whole picture as RGB, turned as its EXIF says, transparency on white.

    Raises one of DAMAGED for a file that is no picture, is cut off, or is an animation.
    """
    image = Image.open(io.BytesIO(data))
    if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        raise ValueError(f"it is an animation of {image.n_frames} frames")
    image.load()
    image = eight_bit(ImageOps.exif_transpose(image), image.format)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bit(image: Image.Image, format: str | None) -> Image.Image:
    """Grey of 16 bit, or of floating point in 0..1, as 8 bit; Pillow would clip it at 255. Others stay.

    Raises ValueError for numbers of which nobody can say what is white.
    """
    if image.mode == "F":
        low, high = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).aminmax()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"its grey goes from {low:g} to {high:g} instead of 0 to 1: save it with 8 or 16 bit")
        return image.point(lambda value: value * 255 + 0.5).convert("L")
    if image.mode == "I" and format not in SIXTEEN_BIT:
        raise ValueError("its grey has 32 bit, or a sign: save it with 8 or 16 bit")
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return image.convert("I").point(lambda value: value / 256)
    return image


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to cover height x width, centre cropped: PixArt-sigma diffusion/data/datasets/InternalData_ms.py:325-338.

    Bicubic, and Lanczos from 2048 pixels on, as there.
    """
    scale = max(height / image.height, width / image.width)
    size = max(width, int(image.width * scale)), max(height, int(image.height * scale))
    method = Image.Resampling.LANCZOS if max(height, width) >= 2048 else Image.Resampling.BICUBIC
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.resize(size, method).crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> Tensor:
    """(H, W, 3), 0..1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).float() / 255


def load_pixels(path: str, expected: str, height: int, width: int) -> Tensor:
    """One picture of a data set at the size of its bucket: (height, width, 3), 0..1.

    Raises ValueError when the file is no longer the one with the digest `expected`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read any more ({error}). Scan the data set again.") from error
    if digest(data) != expected:
        raise ValueError(f"{path} has changed since the data set was scanned. Scan the data set again.")
    return to_pixels(fit(decode(data), height, width))


def contact_sheet(groups: Iterable[tuple[str, list[tuple[str, int, int]]]], limit: int = 64) -> Tensor:
    """Thumbnails under the headings of their groups [(heading, [(path, height, width), ...])]: (H, W, 3), 0..1.

    At most `limit` pictures, so that a large data set does not take long; a heading tells how many there are.
    """
    rows = []
    for heading, pictures in groups:
        shown = pictures[:limit]
        limit -= len(shown)
        cells = [thumbnail(*picture) for picture in shown]
        rows += [heading, *(cells[at : at + SHEET_COLUMNS] for at in range(0, len(cells), SHEET_COLUMNS))]
    heights = [20 if isinstance(row, str) else max(cell.height for cell in row) + 4 for row in rows]
    sheet = Image.new("RGB", (SHEET_COLUMNS * (THUMBNAIL + 4), max(1, sum(heights))), "#202020")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            ImageDraw.Draw(sheet).text((6, top + 4), row, fill="white")
        else:
            for column, cell in enumerate(row):
                sheet.paste(cell, (column * (THUMBNAIL + 4) + 2, top + 2))
        top += height
    return to_pixels(sheet)


def thumbnail(path: str, height: int, width: int) -> Image.Image:
    """What the bucket keeps of a picture, at most THUMBNAIL pixels on its longer side."""
    scale = THUMBNAIL / max(height, width)
    return fit(decode(Path(path).read_bytes()), max(1, round(height * scale)), max(1, round(width * scale)))
