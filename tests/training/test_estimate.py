"""The estimate grows with what makes a run larger."""

from dataclasses import replace

from pixart_nodes.model import VARIANTS
from pixart_nodes.training.config import RunConfig
from pixart_nodes.training.estimate import GB, count_weights, memory_bytes, operations

XL = VARIANTS["alpha-1024"]
LORA = RunConfig(recipe="lora", precision="bf16", optimizer="adamw")


def test_wide_weights_take_twice_the_memory_of_half_ones_and_quantised_ones_less():
    wide, half, int8, nf4 = (memory_bytes(config, XL, 1024**2) for config in (
        replace(LORA, precision="fp32"), LORA, replace(LORA, base_quantization="int8"),
        replace(LORA, base_quantization="nf4")))  # fmt: skip
    assert wide - half > 2 * count_weights(XL) and half > int8 > nf4
    assert 1.2 < half / GB < 4


def test_pictures_of_the_class_cost_what_is_done_with_them():
    dreambooth = replace(LORA, recipe="dreambooth", gradient_checkpointing=False)
    without = replace(dreambooth, prior_loss_weight=0.0)
    assert operations(dreambooth, XL, 1024**2) == 7 / 3 * operations(without, XL, 1024**2)
