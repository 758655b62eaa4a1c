import itertools
import json
from collections import Counter

import numpy as np
import pytest

from tools.tiny.captions import STYLES, caption
from tools.tiny.oracle import FOREGROUND, lab
from tools.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TONE,
    Scene,
    SceneObject,
    background_image,
    is_held_out,
    place,
    render,
    sample_scene,
    triples,
)
from tools.tiny.words import BACKGROUND_WORDS, COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, TEXTURE_ADJECTIVES

SIDES = [(128, 128), (192, 128), (160, 96), (256, 256), (96, 160)]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_same_seed_gives_the_same_scene_caption_and_picture():
    for seed in range(20):
        first, second = rng(seed), rng(seed)
        scene = sample_scene(first)
        assert scene == sample_scene(second)
        assert caption(scene, first) == caption(scene, second)
        assert np.array_equal(render(scene, first), render(scene, second))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_split_holds_its_own_triples_only(split):
    generator = rng()
    for _ in range(500):
        for item in sample_scene(generator, split=split).objects:
            assert is_held_out(item.shape, item.colour, item.position) == (split == "held_out")


def test_the_held_out_triples_never_change():
    assert len(triples("train")) + len(triples("held_out")) == len(SHAPES) * len(COLOURS) * len(POSITIONS)
    assert len(triples("held_out")) == 69
    assert is_held_out("circle", "red", "left") and not is_held_out("circle", "red", "center")


def test_every_shape_colour_position_and_pair_of_them_is_still_in_training():
    train = triples("train")
    for axis, names in enumerate((SHAPES, COLOURS, POSITIONS)):
        counts = Counter(triple[axis] for triple in train)
        assert min(counts[name] for name in names) >= 0.7 * len(train) / len(names)
    for first, second in itertools.combinations(range(3), 2):
        pairs = Counter((triple[first], triple[second]) for triple in train)
        assert len(pairs) == (6, 8, 9)[first] * (6, 8, 9)[second]
        assert min(pairs.values()) >= 2


def test_one_two_and_three_objects_all_occur_and_never_share_a_cell():
    generator = rng()
    scenes = [sample_scene(generator) for _ in range(1000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 250
    assert all(len({item.position for item in scene.objects}) == len(scene.objects) for scene in scenes)
    assert all(len(sample_scene(generator, max_objects=1).objects) == 1 for _ in range(50))


def test_every_object_colour_is_far_from_every_background_tone_and_every_other_colour():
    tones = {(name, tone): np.clip(np.array(rgb) + tone, 0, 255)
             for name, rgb in BACKGROUNDS.items() for tone in (-TONE, 0, TONE)}
    for colour, rgb in COLOURS.items():
        for tone, background in tones.items():
            assert np.linalg.norm(lab(rgb) - lab(background)) > 28, (colour, tone)
            assert np.linalg.norm(np.array(rgb) - background) > 2.5 * FOREGROUND, (colour, tone)
    for first, second in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(lab(first) - lab(second)) > 40


@pytest.mark.parametrize("width, height", SIDES)
def test_an_object_stays_inside_its_grid_cell_whatever_the_jitter(width, height):
    for position, size in itertools.product(POSITIONS, SIZES):
        item = SceneObject("circle", "red", position, size)
        row, column = divmod(POSITIONS.index(position), 3)
        for jitter in itertools.product((-1, 1), repeat=3):
            x, y, radius = place(item, width, height, jitter)
            assert column * width / 3 < x - radius < x + radius < (column + 1) * width / 3
            assert row * height / 3 < y - radius < y + radius < (row + 1) * height / 3
            assert abs(x - (column + 0.5) * width / 3) <= 0.04 * min(width, height) + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_diameter_and_has_soft_edges(shape):
    scene = Scene((SceneObject(shape, "red", "center", "large"),), "gray", "plain", 256, 256)
    image = render(scene, rng())
    changed = np.abs(image.astype(int) - background_image("gray", "plain", 256, 256)).sum(-1)
    rows, columns = np.nonzero(changed)
    assert 0.27 * 256 * 0.85 < np.ptp(columns) + 1 < 0.31 * 256
    assert 0.27 * 256 * 0.8 < np.ptp(rows) + 1 < 0.31 * 256
    levels = np.unique(changed)
    assert len(levels) > 3 and levels[-1] == np.abs(np.array(COLOURS["red"]) - 128).sum()


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_has_two_tones_on_the_lattice_of_the_vae(texture):
    image = background_image("beige", texture, 128, 96).astype(int)
    offset = image[..., 0] - BACKGROUNDS["beige"][0]
    cells = offset.reshape(12, 8, 16, 8)
    if texture == "gradient":
        assert offset[0, 0] == TONE and offset[-1, 0] == -TONE and np.ptp(offset, axis=1).max() == 0
        return
    assert np.ptp(cells, axis=(1, 3)).max() == 0
    assert set(np.unique(offset)) == ({0} if texture == "plain" else {-TONE, TONE})


def test_a_scene_survives_json():
    generator = rng()
    for width, height in SIDES:
        scene = sample_scene(generator, width=width, height=height)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_a_scene_is_read_with_american_spelling_other_names_and_without_what_is_optional():
    scene = Scene.from_dict({"objects": [{"shape": "Circle", "color": "red", "position": "upper-left"},
                                         {"shape": "star", "color": "blue", "position": "centre"}]})
    assert scene == Scene((SceneObject("circle", "red", "top left"), SceneObject("star", "blue", "center")))
    assert render(scene, rng()).shape == (128, 128, 3)
    assert not any(word in caption(scene, rng(seed)) for seed in range(50) for word in ("background", "small", "large"))


@pytest.mark.parametrize("data, message", [
    ({}, "objects"),
    ({"objects": []}, "objects"),
    ({"objects": ["circle"]}, "objects"),
    ({"objects": [{"shape": "circle", "position": "top"}]}, "colour"),
    ({"objects": [{"shape": "blob", "color": "red", "position": "top"}]}, "blob"),
    ({"objects": [{"shape": "ring", "color": "red", "position": "top"}] * 2}, "same position"),
    ({"objects": [{"shape": "ring", "color": "red", "position": "top"}], "width": 100}, "multiples of 8"),
])  # fmt: skip
def test_a_wrong_scene_is_refused_with_its_reason(data, message):
    with pytest.raises(ValueError, match=message):
        Scene.from_dict(data)


def test_captions_vary_and_stay_short():
    generator = rng()
    for style in STYLES:
        scenes = [sample_scene(generator, max_objects=1 if style == "class" else 3) for _ in range(500)]
        captions = [caption(scene, generator, style) for scene in scenes]
        assert len(set(captions)) > (150 if style == "class" else 450)
        assert max(len(text.split()) for text in captions) <= 90
        assert all(text.strip() == text and "  " not in text and ".." not in text for text in captions)


def test_a_dense_caption_names_every_object_and_its_place():
    generator = rng()
    for _ in range(300):
        scene = sample_scene(generator)
        text = caption(scene, generator).lower()
        for item in scene.objects:
            assert any(word in text for word in (item.shape, *SHAPE_WORDS[item.shape]))
            assert any(word in text for word in (item.colour, *COLOUR_WORDS[item.colour]))
            for axis in item.position.split():
                other = {"top": ("upper",), "bottom": ("lower",), "center": ("centre", "middle")}.get(axis, ())
                assert any(word in text for word in (axis, *other)), text


def test_no_word_stands_for_two_names():
    for table in (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, BACKGROUND_WORDS, TEXTURE_ADJECTIVES):
        words = [word for name, others in table.items() for word in {name, *others}]
        assert len(words) == len(set(words))


def test_an_unknown_caption_style_is_refused():
    with pytest.raises(ValueError, match="dense"):
        caption(sample_scene(rng()), rng(), "long")
