"""The recipes by name: what is trained, on which loss, and what file comes out."""

from .base import Draws, Recipe, Start
from .controlnet import ControlNetRecipe
from .dreambooth import DreamBooth
from .finetune import FullFineTune
from .lcm import ConsistencyDistillation, ConsistencyLora
from .lora import Lora
from .weak_to_strong import WeakToStrongRecipe

RECIPES: dict[str, type[Recipe]] = {
    "lora": Lora, "dreambooth": DreamBooth, "lcm-lora": ConsistencyLora, "lcm": ConsistencyDistillation,
    "controlnet": ControlNetRecipe, "full": FullFineTune, "weak-to-strong": WeakToStrongRecipe,
}  # fmt: skip

__all__ = ["RECIPES", "Draws", "Recipe", "Start"]
