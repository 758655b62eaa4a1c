"""LoRAs that the pack writes are read by ComfyUI's own loader, by PEFT and by PixArt Load LoRA."""

import pytest
from diffusers import PixArtTransformer2DModel
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from pixart_nodes.checkpoints import save_diffusers
from pixart_nodes.checkpoints.lora_export import save_lora
from pixart_nodes.checkpoints.lora_files import read_lora

from .tiny import SIGMA, random_weights
from .tiny_lora import NATIVE_TARGETS, TARGETS, Reference, check, inputs, lora_config, off, run


@pytest.fixture
def core_loader(comfy, caplog):
    """ComfyUI's own LoRA loader; it must match every key."""

    def load(model, name):
        caplog.clear()
        (patched,) = comfy.call("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
        assert not [line for line in caplog.messages if "not loaded" in line.lower()], caplog.text
        return patched

    return load


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("native", [True, False])
def test_exports_load_in_comfyuis_own_loader_and_equal_peft(
    tmp_path, loras, core_loader, load_lora, load_model, layout, native
):
    config = lora_config(7, NATIVE_TARGETS if native else TARGETS, use_rslora=True, rank_pattern={"to_q": 5, "qkv": 3},
                         alpha_pattern={"to_k": 2.0, "fc1": 9.0})  # fmt: skip
    reference = Reference(tmp_path, config, 7, native)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "export.safetensors", layout, {"pixart.trigger_word": "blorb"})
    expected = reference(*inputs(SIGMA))
    core = core_loader(load_model(), "export.safetensors")
    assert off(run(core), expected) < 1e-5
    core.detach()
    model, said = load_lora(load_model(), "export.safetensors")
    check(reference, model, said)
    assert "stored in the file" in said
    with safe_open(loras / "export.safetensors", "pt") as file:
        assert file.metadata()["pixart.trigger_word"] == "blorb"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_exports_load_into_peft(tmp_path, loras, load_lora, load_model, native, use_dora):
    config = lora_config(8, NATIVE_TARGETS if native else TARGETS, use_dora=use_dora, alpha_pattern={"to_v": 3.5},
                         rank_pattern={"ff.net.2": 2, "fc2": 2})  # fmt: skip
    reference = Reference(tmp_path, config, 8, native)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "export", "peft")
    save_diffusers(random_weights(SIGMA), SIGMA, tmp_path / "plain", "sigma", "random weights for a test")
    model = PeftModel.from_pretrained(PixArtTransformer2DModel.from_pretrained(tmp_path / "plain"), loras / "export")
    copy = Reference.__new__(Reference)
    copy.model, copy.native, copy.params = model.eval(), False, SIGMA
    expected = reference(*inputs(SIGMA))
    assert off(copy(*inputs(SIGMA)), expected) < 1e-5
    ours, said = load_lora(load_model(), "export")
    check(reference, ours, said)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_exported_dora_matches_every_key_and_equals_peft(tmp_path, loras, core_loader, load_lora, load_model, layout):
    config = lora_config(9, use_dora=True)
    reference = Reference(tmp_path, config, 9)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "dora.safetensors", layout)
    core_loader(load_model(), "dora.safetensors")  # its formula for rows is another one
    model, said = load_lora(load_model(), "dora.safetensors")
    check(reference, model, said)
