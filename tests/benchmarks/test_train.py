"""The training benchmark runs, and its contestants compute one loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_contestants_have_the_same_first_loss_on_the_same_weights_and_noise():
    words = ["--toy", "--depth", "2", "--size", "64", "--batch", "2", "--repeats", "1", "--device", "cpu",
             "--recipes", "lora", "lcm-lora", "lcm"]  # fmt: skip
    done = subprocess.run([sys.executable, "benchmarks/train.py", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (ours|the original.*?|diffusers.*?) \|.*\| (\S+) \|$", done.stdout, re.M)
    assert [name for name, _ in rows].count("ours") == 3 and len(rows) == 9, done.stdout
    assert all(float(off) < 1e-5 for _, off in rows), done.stdout
