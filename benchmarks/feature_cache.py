"""What reading a training set costs: bytes of state per picture, time to open, to plan an epoch, to load a batch.

    python benchmarks/feature_cache.py --pictures 100000

Every picture of the synthetic set has an entry of its own in the index; the features behind the entries are a few
hundred shared ones, so that the disk is not what is measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pixart_nodes.data.buckets import TABLES  # noqa: E402
from pixart_nodes.data.cache import Store, content_key  # noqa: E402
from pixart_nodes.data.dataset import Batches  # noqa: E402
from pixart_nodes.data.index import Index, Row, build  # noqa: E402
from pixart_nodes.data.manifest import Bucket  # noqa: E402

SHARED = 256
SIZE = "256"


def synthetic_set(root: Path, pictures: int, width: int) -> Path:
    """A training set of `pictures` entries over all buckets of the table, with captions of `width`."""
    buckets = [Bucket(ratio, *size) for ratio, size in TABLES[SIZE].items()]
    latents, captions = Store(root / "latents" / "vae"), Store(root / "captions" / "t5")
    with latents, captions:
        for number in range(SHARED):
            bucket = buckets[number % len(buckets)]
            latents.put(content_key(number), torch.randn(8, bucket.height // 8, bucket.width // 8))
            captions.put(content_key(number), torch.randn(20 + number % 100, width).half())
    rows = (
        Row(
            f"folder_{number % 1000:03}/picture_{number:09}.png", buckets[number % SHARED % len(buckets)], 300, 400,
            "train", 1, latents.places[content_key(number % SHARED)], captions.places[content_key(number % SHARED)],
            captions.places[content_key((number + 1) % SHARED)], None,
        )
        for number in range(pictures)
    )  # fmt: skip
    return build(
        root, rows, family="alpha", size=SIZE, vae_id="vae", t5_id="t5", source="synthetic", token_limit=120,
        null_caption=None,
    ).path  # fmt: skip


def resident_kib() -> int:
    """Memory of this process that is its own, in KiB (Linux); file pages that are only mapped are not counted."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def measure(path: Path, batch_size: int, batches: int) -> dict:
    before, start = resident_kib(), time.perf_counter()
    index = Index(path)
    opened = time.perf_counter()
    reader = Batches(index, "alpha", batch_size)
    reader.plan(0)
    planned = time.perf_counter()
    own = resident_kib() - before
    for step in range(batches):
        reader.batch(step)
    loaded = time.perf_counter()
    pictures = len(index)
    columns = {name: column.nbytes / pictures for name, column in index.columns.items() if column.nbytes}
    return {
        "pictures": pictures,
        "mapped_bytes_per_picture": round(index.state_bytes() / pictures, 1),
        "of_these_names": round(columns["names"] + columns["name_ends"], 1),
        "own_bytes_per_picture": round(own * 1024 / pictures, 1),
        "mapped_MiB_per_million": round(index.state_bytes() / pictures * 1e6 / 2**20, 1),
        "open_seconds": round(opened - start, 4),
        "plan_epoch_seconds": round(planned - opened, 4),
        "open_and_plan_seconds_per_million": round((planned - start) / pictures * 1e6, 3),
        "milliseconds_per_picture_loaded": round((loaded - planned) * 1000 / (batches * batch_size), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--caption-width", type=int, default=4096)
    parser.add_argument("--set", help="measure this training set instead of a synthetic one")
    arguments = parser.parse_args()
    if arguments.set:
        result = measure(Path(arguments.set), arguments.batch_size, arguments.batches)
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = synthetic_set(Path(folder), arguments.pictures, arguments.caption_width)
        sys.stdout.write(f"built in {time.perf_counter() - start:.1f} s\n")
        # In a process of its own, so that what building left in memory does not count.
        words = ["--set", str(path), "--batch-size", str(arguments.batch_size), "--batches", str(arguments.batches)]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
