"""What the trainer writes, ComfyUI's own LoRA loader takes whole."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from pixart_nodes.training.__main__ import make_accelerator
from pixart_nodes.training.config import Output, RunConfig
from pixart_nodes.training.run_dir import RunFolder
from pixart_nodes.training.trainer import Trainer

from ..training.conftest import QUICK, random, write_base, write_cache
from .tiny_lora import off


@pytest.fixture(scope="module")
def trained(comfy, tmp_path_factory):
    """A LoRA of every layer, a few steps old, still in the trainer."""
    base = write_base(comfy.folder("diffusion_models") / "to_train.safetensors")
    cache = write_cache(tmp_path_factory.mktemp("trained") / "cache")
    config = RunConfig.from_dict({
        **QUICK, "recipe": "lcm-lora", "base": {"path": str(base)}, "cache": str(cache.path), "steps": 3, "rank": 4,
        "alpha": 2.0, "output": {"name": "trained", "folder": str(comfy.folder("loras"))},
    })  # fmt: skip
    trainer = Trainer(config, RunFolder(tmp_path_factory.mktemp("run")), make_accelerator("fp32"))
    with torch.inference_mode(False), torch.enable_grad():
        assert trainer.run() == "done"
    yield trainer
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("export", ["native", "diffusers", "kohya"])
def test_a_trained_lora_has_no_unmatched_key_in_comfyui_and_computes_the_same(
    comfy, load_model, trained, caplog, export
):
    from comfy import model_management

    folder = str(comfy.folder("loras"))
    trained.config = trained.recipe.config = replace(trained.config, output=Output(f"trained_{export}", folder, export))
    name = trained.export().name
    model = load_model("to_train.safetensors")
    caplog.clear()
    (patched,) = comfy.call("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
    assert "not loaded" not in caplog.text.lower(), caplog.text
    x, t, context = random(2, 4, 8, 8, seed=1), torch.tensor([600.0, 30.0]), random(2, 5, 16, seed=2)
    with torch.inference_mode():
        expected = trained.recipe.network(x, t, context)
        with trained.recipe.network.disable_adapter():
            base = trained.recipe.network(x, t, context)
        model_management.load_models_gpu([patched])
        found = patched.model.diffusion_model(x, t, context)
    assert off(found, expected) < 1e-5 < off(base, expected)
