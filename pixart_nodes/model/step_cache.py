"""Steps that reuse the last one's blocks: a lossy saving, told by the first block when it is due.

The first block always runs. Where it changes its input by nearly what it did at the last whole step, the others are
taken to do what they did then (first-block caching, as in ParaAttention; Liu et al., TeaCache, arXiv 2411.19108).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEY = "pixart_step_cache"
STRIDE = 4  # every fourth token tells enough about the first block


@dataclass
class WholeStep:
    first: Tensor  # what the first block added to its input, (B, N / STRIDE, C)
    rest: Tensor  # what the others added to that, (B, N, C); while they run, the state that they started from


class StepCache:
    """For one sampling run, in transformer_options[KEY].

    threshold: the greatest relative change of the first block's effect that still counts as none, in the mean over
    the tokens and in every row of the batch. Steps are reused at noise levels from start down to end. Prompts, sizes
    and control nets each have a memory of their own, so has every tile of a picture that is sampled in tiles.
    """

    def __init__(self, threshold: float, start: float = float("inf"), end: float = 0.0):
        self.threshold, self.start, self.end = threshold, start, end
        self.steps: dict[tuple, WholeStep] = {}
        self.level, self.turns = None, {}  # the noise level, and how many calls of each kind it has had
        self.calls = self.skipped = 0

    def skip(self, before: Tensor, after: Tensor, control, transformer_options) -> Tensor | None:
        """The state behind the last block, from those around the first one (B, N, C); None if it must be computed."""
        level = transformer_options["sigmas"].max().item()
        key = self.kind(level, after, control, transformer_options)
        first, last = after[:, ::STRIDE] - before[:, ::STRIDE], self.steps.get(key)
        self.calls += 1
        if last is not None and self.end <= level <= self.start and change(first, last.first) < self.threshold:
            self.skipped += 1
            return after + last.rest
        self.steps[key] = self.running = WholeStep(first, after)
        return None

    def keep(self, x: Tensor) -> Tensor:
        """Notes the state behind the last block of a step that was computed."""
        self.running.rest = x - self.running.rest
        return x

    def kind(self, level: float, x: Tensor, control, transformer_options) -> tuple:
        """Calls of the same kind follow each other from step to step."""
        control = control or {}
        sources = len(control.get("output", ())), control.get("who", len(control.get("branches", ())))
        kind = (tuple(transformer_options["uuids"]), x.shape, sources)
        if level != self.level:
            self.level, self.turns = level, {}
        self.turns[kind] = self.turns.get(kind, 0) + 1
        return *kind, self.turns[kind]


def change(now: Tensor, then: Tensor) -> float:
    """By how much two tensors (B, N, C) differ, relative to the second, in the row where it is most."""
    difference, size = ((x.abs().mean((1, 2), dtype=torch.float32)) for x in (now - then, then))
    return (difference / size.clamp(min=1e-12)).max().item()
