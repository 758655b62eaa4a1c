"""`accelerate launch -m pixart_nodes.data`: several processes, one cache; killed and started again."""

import os
import re
import signal
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from pixart_nodes.data.__main__ import main
from pixart_nodes.data.dataset import Batches
from pixart_nodes.data.index import Index

from .conftest import build_cache, write_pictures

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pixart_nodes" / "assets" / "tiny"
MODELS = ["--vae", str(TINY / "vae" / "pixart-tiny-vae.safetensors"),
          "--t5", str(TINY / "text_encoders" / "pixart-tiny-t5")]  # fmt: skip


def encode_words(pictures, cache):
    return ["encode", "--source", str(pictures), "--cache", str(cache), "--family", "alpha", "--size", "256", *MODELS]


def start(words, processes):
    """accelerate has no switch for several processes on CPUs; with --multi_gpu and no GPU to see, it does just that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", str(port), "-m", "pixart_nodes.data"]  # fmt: skip
    alone = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launch, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | alone,
    )  # fmt: skip


def finished(words, processes=2):
    process = start(words, processes)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def one_process(tmp_path, capsys):
    """The training set that a single process makes, in a cache of its own."""

    def run(pictures):
        assert main(encode_words(pictures, tmp_path / "alone")) == 0
        return Index(capsys.readouterr().out.strip().splitlines()[-1])

    return run


@pytest.mark.slow
def test_two_processes_fill_one_cache_also_after_a_kill_and_new_pictures(tmp_path, one_process):
    pictures = write_pictures(tmp_path / "pictures", [(256, 256)] * 5 + [(320, 192)] * 4)
    cache = tmp_path / "cache"
    words = encode_words(pictures, cache)
    killed = start(words, 2)
    for line in killed.stdout:
        if "looked at" in line:
            os.killpg(killed.pid, signal.SIGKILL)
            break
    killed.communicate()
    finished(words)
    assert {path.name.split("-")[0] for path in cache.rglob("*.safetensors") if path.parent.name != "sets"} == {
        "00000", "00001",
    }  # fmt: skip
    write_pictures(pictures, [(256, 256)] * 3, start=9)
    output = finished(words)
    encoded = [int(number) for number in re.findall(r"(\d+) pictures and \d+ captions encoded", output)]
    assert len(encoded) == 2 and sum(encoded) == 3

    together, alone = Index(output.strip().splitlines()[-1]), one_process(pictures)
    assert len(together) == len(alone) == 12
    for row in range(12):
        assert together.name(row) == alone.name(row)
        assert torch.allclose(together.latent(row), alone.latent(row), atol=1e-5)
        assert torch.allclose(together.caption(row).float(), alone.caption(row).float(), atol=1e-2)
    both = zip(islice(Batches(together, "alpha", 4), 4), islice(Batches(alone, "alpha", 4), 4), strict=True)
    assert all(a.rows == b.rows for a, b in both)


def test_check_lists_problems_and_says_so_with_its_exit_code(tmp_path, capsys):
    pictures = write_pictures(tmp_path, [(256, 256)] * 2)
    assert main(["check", "--source", str(pictures), "--size", "256"]) == 0
    (pictures / "p0.txt").unlink()
    assert main(["check", "--source", str(pictures), "--size", "256"]) == 1
    assert "p0.png: missing caption" in capsys.readouterr().out
    words = ["check", "--source", str(pictures), "--size", "256", "--trigger-word", "zkx", "--caption-from-trigger"]
    assert main(words) == 0


def test_verify_names_damaged_shards(tmp_path, pictures, capsys):
    build_cache(pictures, tmp_path / "cache")
    assert main(["verify", "--cache", str(tmp_path / "cache")]) == 0
    (shard,) = (tmp_path / "cache" / "captions").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", "--cache", str(tmp_path / "cache")]) == 1
    assert f"put aside: {shard.name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["check", "--source", "nowhere"], ["verify", "--cache", "nowhere"],
    ["import", "--source", "nowhere", "--cache", "cache"],
])  # fmt: skip
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(words, caplog):
    assert main(words) == 2
    assert "nowhere" in caplog.text and "Traceback" not in caplog.text


def test_a_mistyped_option_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["check", "--source", str(tmp_path), "--triger-word", "x"])
