"""A golden case, and how its numbers are compared."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    entry: dict      # of the index
    folder: Path

    @property
    def config(self) -> dict:
        return self.entry["config"]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Those named `group.*`, without the group."""
        everything = load_file(self.folder / self.entry["file"])
        return {name[len(group) + 1 :]: t for name, t in everything.items() if name.startswith(group + ".")}

    def json(self):
        return json.loads((self.folder / self.entry["file"]).read_text(encoding="utf-8"))


def read_cases(folder: Path) -> list[Case]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [Case(name, entry, folder) for name, entry in index["cases"].items()]


def compare(tolerance, name: str, ours, golden, gain: float = 1.0) -> tuple[float, float]:
    """(error, what is allowed) by the index's tolerance: a number is absolute, words say "rel x [of max(1,max|out|)]".

    Without a tolerance, and for anything but tensors, only equality will do. gain: by how much the result multiplies
    the rounding of what the tolerance is about.
    """
    if tolerance is None or not isinstance(golden, Tensor):
        return (0.0 if ours == golden else math.inf), 0.0
    if ours.shape != golden.shape or not ours.isfinite().all():
        return math.inf, 0.0
    error, golden = (ours.double() - golden.double()).abs(), golden.double().abs()
    if not isinstance(tolerance, str):
        return error.max().item(), tolerance * gain
    limits = [float(number) for number in re.findall(r"rel (\d[\d.e-]*)", tolerance)]
    other = ("gradients" in tolerance and "grad" in name) or ("for fp32" in tolerance and ours.dtype == torch.float32)
    limit = limits[1] if other else limits[0]
    if "max(1" in tolerance:
        return error.max().item(), limit * max(1.0, golden.max().item()) * gain
    return (error / golden.clamp(min=1e-300)).where(error > 0, 0).max().item(), limit
