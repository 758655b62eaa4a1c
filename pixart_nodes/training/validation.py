"""The loss on pictures that are kept out of training: the same pictures, noise and noise levels at every step."""

import torch
from torch import Tensor

from ..data.dataset import Batches, rows_by_bucket, seeded
from ..data.index import Index
from .recipes.base import Draws, Recipe, on_device

MEASUREMENTS = 64  # one picture at one noise level each
NOISE = 4  # what a random stream decides; 0 to 3 are taken


class EvenDraws(Draws):
    """Measurement `number` of MEASUREMENTS: its own noise, the timestep at its place in the range, its own caption."""

    def __init__(self, seed: int, number: int):
        self.generators, self.place = [seeded(NOISE, seed, number)], (number + 0.5) / MEASUREMENTS

    def integers(self, high: int, device) -> Tensor:
        return torch.tensor([int(high * self.place)], device=device)

    def chances(self, probability: float, device) -> Tensor:
        return torch.zeros(1, dtype=torch.bool, device=device)


class Validation:
    """Measures one picture at a time, so it needs less memory than training; processes share the measurements.

    More than MEASUREMENTS pictures: a fixed sample of them; fewer: they come again at other noise levels.
    """

    def __init__(self, recipe: Recipe, index: Index, rank: int = 0, world: int = 1):
        # as many for every process, so that they can wait for each other; those behind MEASUREMENTS do not count
        self.recipe, self.numbers = recipe, range(rank, -(-MEASUREMENTS // world) * world, world)
        self.batches = Batches(
            index, recipe.start.family, 1, seed=recipe.config.seed, role="validation", sample_latents=False
        )

    @torch.no_grad()
    def share(self) -> Tensor:
        """This process's part of the mean loss: the parts of all processes are to be added."""
        recipe, total = self.recipe, torch.zeros((), device=self.recipe.start.device)
        for number in self.numbers:
            place = number % MEASUREMENTS
            batch = on_device(self.batches.batch(place), total.device)
            parts = recipe.picture_losses(recipe.network, batch, EvenDraws(recipe.config.seed, place))
            total += sum(parts.values()).float() * (number < MEASUREMENTS)
        return total / MEASUREMENTS


def has_validation(index: Index) -> bool:
    return bool(rows_by_bucket(index, "validation"))
