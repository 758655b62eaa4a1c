"""Captions and aspect ratios."""

import re

import torch

from pixart_nodes.data.buckets import TABLES, TEST_TABLES, nearest, nearest_key
from pixart_nodes.text.captions import clean_caption, clean_caption_once, no_cleaning

from .case import Case


def caption_cleaning(case: Case):
    cleaners = {
        "original": clean_caption, "original_single_pass": clean_caption_once, "no_cleaning": no_cleaning,
        "diffusers_alpha": clean_caption, "diffusers_sigma": clean_caption, "diffusers_no_cleaning": no_cleaning,
    }  # fmt: skip
    for row in case.json():
        for kind, clean in cleaners.items():
            yield f"{kind}: {row['input'][:30]!r}", clean(row["input"]), row[kind]


def bucket_table(name: str):
    """Our table for the original's and diffusers' names: "alpha.ASPECT_RATIO_512_TEST"."""
    _, size, kind = re.fullmatch(r"(\w+)\.ASPECT_RATIO_(\d+)_?(TEST|BIN)?", name).groups()
    return TEST_TABLES[size] if kind == "TEST" or (kind == "BIN" and size != "2048") else TABLES[size]


def aspect_ratios(case: Case):
    """Tables and nearest buckets. Of the app's prompt flags only the choice of the bucket concerns us (--ar h:w)."""
    golden = case.json()
    for name, table in golden["tables"].items():
        ours = {float(ratio): [float(side) for side in size] for ratio, size in bucket_table(name).items()}
        yield name, ours, {float(ratio): size for ratio, size in table.items()}
    for row in golden["closest_ratio_examples"]:
        key, *size = nearest(bucket_table(row["table"]), row["height"], row["width"])
        name = f"{row['table']} {row['height']}x{row['width']}"
        yield name, (size, key), (row["bin"], row.get("ratio_key", key))
        if "pipeline_aspect_ratio_input" in row:
            yield f"{name} ratio", size[0] / size[1], row["pipeline_aspect_ratio_input"]
    for row in golden["prompt_examples"]:
        flag = re.search(r"--(?:ar|aspect_ratio) (\d+):(\d+)", row["prompt"])
        table = bucket_table(row["table"])
        key = nearest_key(table, int(flag[1]) / int(flag[2]) if flag else 1.0)
        ratio = torch.tensor(key).item()                                      # the original keeps it in float32
        yield row["prompt"], ([list(table[key])], [[ratio]]), (row["hw"], row["ar"])
