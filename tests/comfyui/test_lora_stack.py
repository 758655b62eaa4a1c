"""Several LoRAs on one model: PEFT's result, in whichever order they were put on."""

import pytest
import torch
from safetensors.torch import save_file

from .tiny import SIGMA, random_weights
from .tiny_lora import Reference, inputs, lora_config, off, run


def stacked(load_lora, model, *names):
    for name in names:
        model, _ = load_lora(model, name)
    return model


def test_two_loras_stack_as_in_peft_and_leave_no_trace(tmp_path, loras, load_lora, load_model):
    first, second = lora_config(1), lora_config(2, ["to_q", "ff.net.0.proj", "proj_out"])
    reference = Reference(tmp_path, first, 1)
    reference.model.save_pretrained(loras / "first")
    other = Reference(tmp_path, second, 2)
    other.model.save_pretrained(loras / "second")
    reference.model.load_adapter(loras / "second", "second")
    reference.model.base_model.set_adapter(["default", "second"])
    base = load_model()
    before = {name: tensor.clone() for name, tensor in base.model.diffusion_model.state_dict().items()}
    plain = run(base)
    one, _ = load_lora(base, "first")
    both, _ = load_lora(one, "second")
    assert off(run(both), reference(*inputs(SIGMA))) < 1e-5
    assert off(run(one), run(both)) > 0.01
    assert torch.equal(run(base), plain)
    base.detach()
    after = base.model.diffusion_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not base.patches


@pytest.mark.parametrize("doras", [(False, True), (True, False), (True, True)])
def test_stacked_doras_equal_peft(tmp_path, loras, load_lora, load_model, doras):
    """Whichever comes first: its length is that of the model's own weights with its own update."""
    first, second = (lora_config(i, ["to_q", "to_k", "to_v", "ff.net.2", "proj"], use_dora=doras[i]) for i in (0, 1))
    reference = Reference(tmp_path, first, 1)
    reference.model.save_pretrained(loras / "first")
    Reference(tmp_path, second, 2).model.save_pretrained(loras / "second")
    reference.model.load_adapter(loras / "second", "second")
    reference.model.base_model.set_adapter(["default", "second"])
    model = stacked(load_lora, load_model(), "first", "second")
    assert off(run(model), reference(*inputs(SIGMA))) < 1e-5
    model.detach()
    assert off(run(model), reference(*inputs(SIGMA))) < 1e-5


def test_a_replaced_bias_keeps_what_an_earlier_lora_adds_to_it(loras, load_lora, load_model):
    name = "transformer.blocks.0.attn.proj"
    save_file({f"{name}.diff_b": torch.ones(48)}, loras / "adds.safetensors")
    save_file({f"{name}.diff": torch.zeros(48, 48), f"{name}.bias": torch.full((48,), 5.0)}, loras / "sets.safetensors")
    model = stacked(load_lora, load_model(), "adds.safetensors", "sets.safetensors")
    run(model)
    assert (model.model.diffusion_model.blocks[0].attn.proj.bias == 6).all()
    model.detach()


def test_a_lora_on_a_merged_model_changes_the_merged_weight(comfy, loras, load_lora, load_model):
    """Half of one model and half of another, then a replaced bias at half strength."""
    name = "transformer.blocks.0.attn.proj"
    save_file({f"{name}.diff": torch.zeros(48, 48), f"{name}.bias": torch.full((48,), 5.0)}, loras / "sets.safetensors")
    (merged,) = comfy.call("ModelMergeSimple", model1=load_model(), model2=load_model(), ratio=0.5)
    model, _ = load_lora(merged, "sets.safetensors", 0.5)
    run(model)
    bias = random_weights(SIGMA)["blocks.0.attn.proj.bias"]
    assert (model.model.diffusion_model.blocks[0].attn.proj.bias - (bias + 5) / 2).abs().max() < 1e-6
    model.detach()
