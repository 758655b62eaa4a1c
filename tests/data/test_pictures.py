"""Pictures become the pixels that PixArt's own loader makes of them."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as T

from pixart_nodes.data.pictures import contact_sheet, digest, fit, load_pixels, to_pixels

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
