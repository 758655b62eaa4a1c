import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from tools.tiny.oracle import read_scene, score, summarise
from tools.tiny.scenes import Scene, SceneObject, background_image, render, sample_scene

SIDES = [(128, 128), (192, 128), (160, 96), (256, 256), (128, 192), (104, 152)]


def pictures(count, seed=0, sides=SIDES, blur=0.0, noise=0.0, shift=0.0):
    """Pairs of scene and picture; the picture softened, noisy and tinted like one of a small model."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        width, height = sides[index % len(sides)]
        scene = sample_scene(rng, width=width, height=height)
        image = render(scene, rng) * (1 + rng.uniform(-shift, shift, 3))
        image = ndimage.gaussian_filter(image, (blur, blur, 0)) + noise * rng.standard_normal(image.shape)
        yield scene, image.round().clip(0, 255).astype(np.uint8)


def test_the_oracle_reads_back_at_least_99_percent_of_rendered_objects():
    result = summarise([score(image, scene) for scene, image in pictures(300)])
    assert result["object_accuracy"] >= 0.99 and result["count"] >= 0.99 and result["scenes_exact"] >= 0.98
    assert min(result["size"], result["background"], result["texture"]) >= 0.98


@pytest.mark.slow
def test_the_oracle_reads_back_at_least_99_percent_of_1000_rendered_scenes():
    result = summarise([score(image, scene) for scene, image in pictures(1000, seed=1)])
    assert result["object_accuracy"] >= 0.99 and result["scenes_exact"] >= 0.98


@pytest.mark.parametrize("damage", [
    {"blur": 1.2},
    {"blur": 1.5, "noise": 4, "shift": 0.06},
    {"noise": 6},
    {"shift": 0.08},
], ids=str)  # fmt: skip
def test_the_oracle_still_reads_97_percent_of_soft_noisy_and_tinted_pictures(damage):
    result = summarise([score(image, scene) for scene, image in pictures(150, seed=2, **damage)])
    assert result["object_accuracy"] >= 0.97 and result["count"] >= 0.97


def test_a_picture_of_another_scene_scores_low():
    pairs = list(pictures(150, seed=3, sides=[(128, 128)]))
    shifted = [(scene, pairs[index - 1][1]) for index, (scene, _) in enumerate(pairs)]
    result = summarise([score(image, scene) for scene, image in shifted])
    assert result["object_accuracy"] < 0.03 and result["scenes_exact"] < 0.02
    assert max(result["colour"], result["shape"], result["position"]) < 0.4


@pytest.mark.parametrize("key, other", [("colour", "red"), ("shape", "square"), ("position", "bottom right")])
def test_one_wrong_attribute_costs_that_attribute_and_the_object_only(key, other):
    item = SceneObject("star", "blue", "top left", "large")
    drawn = Scene((dataclasses.replace(item, **{key: other}), SceneObject("ring", "white", "center")), "pink", "plain")
    result = score(render(drawn, np.random.default_rng(0)), Scene((item, drawn.objects[1]), "pink", "plain"))
    wrong, right = result["objects"]
    assert right["all"] and not wrong["all"] and result["count_correct"]
    assert {name for name in ("colour", "shape", "position") if not wrong[name]} == {key}


def test_missing_and_extra_objects_are_counted():
    three = Scene(tuple(SceneObject("circle", "red", position) for position in ("top", "left", "right")), "beige")
    two = dataclasses.replace(three, objects=three.objects[:2])
    image_of_two, image_of_three = (render(scene, np.random.default_rng(0)) for scene in (two, three))
    missing = score(image_of_two, three)
    assert missing["found"] == 2 and not missing["count_correct"]
    assert [row["all"] for row in missing["objects"]] == [True, True, False]
    extra = score(image_of_three, two)
    assert extra["found"] == 3 and not extra["count_correct"] and all(row["all"] for row in extra["objects"])
    assert summarise([missing, extra])["scenes_exact"] == 0


def test_two_found_objects_cannot_both_count_for_one_expected_object():
    drawn = Scene((SceneObject("cross", "green", "top"),), "gray")
    wanted = Scene((SceneObject("cross", "green", "top"), SceneObject("cross", "green", "bottom")), "gray")
    result = score(render(drawn, np.random.default_rng(0)), wanted)
    assert [row["all"] for row in result["objects"]] == [True, False]
    assert not any(result["objects"][1].values())


def test_neighbours_that_touch_are_read_as_two():
    pair = tuple(SceneObject("square", "blue", position, "large") for position in ("left", "center"))
    image = render(Scene(pair, "beige", "plain"), np.random.default_rng(0))
    image[56:72, 30:60] = image[64, 21]  # a bridge between them
    assert {found.position for found in read_scene(image).objects} == {"left", "center"}


@pytest.mark.parametrize("texture", ["plain", "checkered", "gradient"])
def test_an_empty_background_has_no_objects(texture):
    reading = read_scene(background_image("navy", texture, 128, 128))
    assert reading.objects == () and reading.background == "navy" and reading.texture == texture


def test_noise_is_not_read_as_the_expected_scene():
    rng = np.random.default_rng(0)
    results = [score(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), sample_scene(rng)) for _ in range(20)]
    assert summarise(results)["object_accuracy"] == 0


def test_a_blob_of_no_known_shape_has_no_shape():
    image = background_image("gray", "plain", 128, 128).copy()
    image[20:24, 10:50] = (215, 25, 30)
    image[8:40, 10:13] = (215, 25, 30)
    assert [found.shape for found in read_scene(image).objects] == [None]


def test_sizes_and_backgrounds_that_a_caption_does_not_state_are_not_scored():
    scene = Scene((SceneObject("circle", "red", "top"),))
    result = summarise([score(render(scene, np.random.default_rng(0)), scene)])
    assert result["object_accuracy"] == 1 and result["size"] is result["background"] is result["texture"] is None


@pytest.mark.parametrize("image", [np.zeros((128, 128), np.uint8), np.zeros((128, 128, 3), np.float32),
                                   np.zeros((8, 8, 3), np.uint8)])  # fmt: skip
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        read_scene(image)
