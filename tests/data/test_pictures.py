"""Pictures become the pixels that PixArt's own loader makes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as T

from pixart_nodes.data.pictures import contact_sheet, decode, digest, fit, load_pixels, to_pixels

from .conftest import picture


def original(image, height, width):
    """PixArt-sigma diffusion/data/datasets/InternalData_ms.py:325-338, with torchvision."""
    if height / image.height > width / image.width:
        size = height, int(image.width * height / image.height)
    else:
        size = int(image.height * width / image.width), width
    method = T.InterpolationMode.LANCZOS if max(height, width) >= 2048 else T.InterpolationMode.BICUBIC
    return T.center_crop(T.resize(image, size, method), (height, width))


@pytest.mark.parametrize(("width", "height"), [(301, 256), (256, 301), (640, 480), (255, 777), (256, 256), (90, 64)])
def test_scaling_and_cropping_is_the_originals(width, height):
    image = picture(1, width, height)
    for target in ((256, 256), (192, 320), (496, 128)):
        assert fit(image, *target).tobytes() == original(image, *target).tobytes()


def test_pixels_lie_in_zero_to_one_with_channels_last():
    pixels = to_pixels(Image.new("RGB", (5, 3), (255, 0, 51)))
    assert pixels.shape == (3, 5, 3) and pixels[0, 0].tolist() == pytest.approx([1, 0, 0.2])


def stored(values, kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(values).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(("scale", "dtype", "kind"), [
    (1, np.float32, "TIFF"), (65535, np.uint16, "TIFF"), (65535, np.uint16, "PNG"), (65535, np.uint16, "PPM"),
])  # fmt: skip
def test_grey_of_more_than_8_bit_keeps_its_range(scale, dtype, kind):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    pixels = to_pixels(decode(stored((ramp * scale).astype(dtype), kind)))
    assert (pixels - torch.from_numpy(ramp)[..., None]).abs().max() < 1.01 / 255


@pytest.mark.parametrize(("values", "message"), [
    (np.float32([[0, 200]]), "grey goes from 0 to 200 instead of 0 to 1: save it with 8 or 16 bit"),
    (np.float32([[-1, 1]]), "grey goes from -1 to 1"),
    (np.float32([[0, np.nan]]), "grey goes from nan to nan"),
    (np.int32([[0, 2**31 - 1]]), "grey has 32 bit, or a sign: save it with 8 or 16 bit"),
])  # fmt: skip
def test_numbers_of_which_nobody_can_say_what_is_white_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        decode(stored(values, "TIFF"))


def test_a_file_that_changed_or_went_is_named(tmp_path):
    path = tmp_path / "a.png"
    picture(1).save(path)
    seen = digest(path.read_bytes())
    assert load_pixels(str(path), seen, 32, 48).shape == (32, 48, 3)
    picture(2).save(path)
    with pytest.raises(ValueError, match="a.png has changed since"):
        load_pixels(str(path), seen, 32, 48)
    path.unlink()
    with pytest.raises(ValueError, match="a.png cannot be read any more"):
        load_pixels(str(path), seen, 32, 48)


def test_a_contact_sheet_shows_every_picture_under_its_bucket_up_to_a_limit(tmp_path):
    for number in range(10):
        picture(number).save(tmp_path / f"{number}.png")
    group = [(str(tmp_path / f"{number}.png"), 256, 256) for number in range(10)]
    sheet = contact_sheet([("256 x 256: 10", group), ("320 x 192: 1", [(group[0][0], 192, 320)])])
    assert sheet.shape == (20 + 2 * 116 + 20 + 71, 8 * 116, 3)
    cell = sheet[22:134, 2:114]
    assert torch.allclose(cell, to_pixels(fit(picture(0), 112, 112)))
    short = contact_sheet([("256 x 256: 10", group)], limit=3)
    assert short.shape[0] == 20 + 116
    assert contact_sheet([]).shape[0] == 1
