"""Bucket tables against the tables of both PixArt repositories and of diffusers."""

import json
import os
from pathlib import Path

import pytest

from pixart_nodes.data.buckets import OTHER_SIZES, TABLES, TEST_TABLES, nearest, nearest_key, training_table

GOLDEN_DIR = Path(os.environ.get("PIXART_GOLDEN_DIR", Path(__file__).parents[1] / "goldens"))
GOLDEN = json.loads((GOLDEN_DIR / "aspect_ratios.json").read_text())


def table_called(name):
    """alpha.ASPECT_RATIO_512_TEST, sigma.ASPECT_RATIO_2048, diffusers.ASPECT_RATIO_1024_BIN ... -> our table."""
    repository, name = name.split(".")
    size = name.split("_")[2]
    selected = name.endswith("_TEST") or (repository == "diffusers" and size != "2048")
    return (TEST_TABLES if selected else TABLES)[size]


@pytest.mark.parametrize("name", GOLDEN["tables"])
def test_table_holds_the_published_sizes_in_the_published_order(name):
    published = [(float(key), tuple(map(int, size))) for key, size in GOLDEN["tables"][name].items()]
    assert list(table_called(name).items()) == published


@pytest.mark.parametrize("table", sorted({e["table"] for e in GOLDEN["closest_ratio_examples"]}))
def test_nearest_bucket_is_the_one_that_the_original_chooses(table):
    for example in (e for e in GOLDEN["closest_ratio_examples"] if e["table"] == table):
        key, height, width = nearest(table_called(table), example["height"], example["width"])
        assert [height, width] == [int(side) for side in example["bin"]], example
        if "ratio_key" in example:
            assert key == example["ratio_key"]


def test_first_key_wins_where_two_are_equally_near():
    assert nearest_key({0.25: (1, 4), 0.75: (3, 4)}, 0.5) == 0.25


def test_4096_table_is_four_times_the_1024_table():
    assert all(TABLES["4096"][key] == (4 * h, 4 * w) for key, (h, w) in TABLES["1024"].items() if key in TABLES["4096"])


def test_every_size_suits_the_network():
    assert all(side % 16 == 0 for table in TABLES.values() for size in table.values() for side in size)


def test_picture_without_area_is_refused():
    with pytest.raises(ValueError, match="no aspect ratio"):
        nearest(TABLES["1024"], 0, 512)


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_other_training_sizes_have_whole_patches_about_that_area_and_no_shape_twice(size):
    table = training_table(size)
    assert all(side % 16 == 0 for sides in table.values() for side in sides)
    assert len(set(table.values())) == len(table)
    assert table[1.0] == (int(size), int(size))
    assert all(0.7 < h * w / int(size) ** 2 < 1.25 for h, w in table.values())


def test_a_size_without_a_table_is_refused_with_the_sizes_there_are():
    with pytest.raises(ValueError, match="'200' is none of 192, 256"):
        training_table("200")
