"""ComfyUI inside the test process, with tiny random models in its folders."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from .inprocess import Comfy
from .tiny import ALPHA, ALPHA_MS, SIGMA, save_random
from .tiny_t5 import config, random_model


@pytest.fixture(scope="session")
def comfy(comfyui_path, tmp_path_factory):
    """See inprocess.Comfy. The server of `comfy_server` is another process with other folders."""
    comfy = Comfy(comfyui_path, tmp_path_factory.mktemp("comfyui"))
    folder = comfy.folder("diffusion_models")
    save_random(folder / "sigma.safetensors", SIGMA, "sigma")
    save_random(folder / "alpha.safetensors", ALPHA, "alpha", seed=1)
    save_random(folder / "alpha_ms.safetensors", ALPHA_MS, "alpha", seed=2)
    return comfy


@pytest.fixture(scope="session")
def load_model(comfy):
    """PixArt Load Model with its widgets' defaults -> MODEL."""

    def load(name="sigma.safetensors", family="auto", base_size="auto", weight_dtype="auto", weights="ema if present"):
        return comfy.call(
            "PixArtLoadModel", model_name=name, family=family, base_size=base_size, weight_dtype=weight_dtype,
            weights=weights,
        )[0]  # fmt: skip

    return load


@pytest.fixture
def sigma(load_model):
    return load_model()


@pytest.fixture
def loras(comfy):
    folder = comfy.folder("loras")
    yield folder
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture
def load_lora(comfy):
    """PixArt Load LoRA with its widgets' defaults -> (MODEL, what the node shows)."""

    def load(model, name, strength=1.0, alpha=0.0):
        output = comfy.classes["PixArtLoadLora"].execute(model=model, lora_name=name, strength=strength, alpha=alpha)
        return output.result[0], output.ui.as_dict()["text"][0]

    return load


@pytest.fixture
def folder(comfy, request):
    """An empty folder for one text encoder, and its name in the loader."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    path = comfy.folder("text_encoders") / name
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def load_t5(comfy):
    """PixArtLoadT5 on a path below models/text_encoders -> CLIP."""
    return lambda path, dtype="auto", device="default": comfy.call(
        "PixArtLoadT5", t5_name=path.relative_to(comfy.folder("text_encoders")).as_posix(), dtype=dtype, device=device
    )[0]


@pytest.fixture(scope="session")
def tiny_t5(comfy):
    """(transformers' model, our CLIP, the tokenizer) of one encoder without a tokenizer of its own."""
    model = random_model(config())
    path = comfy.folder("text_encoders") / "shared-tiny-t5"
    model.save_pretrained(path)
    (clip,) = comfy.call("PixArtLoadT5", t5_name=path.name, dtype="auto", device="default")
    tokenizer = AutoTokenizer.from_pretrained(comfy.path / "comfy" / "text_encoders" / "t5_tokenizer")
    return SimpleNamespace(model=model, clip=clip, path=path, tokenizer=tokenizer)


@pytest.fixture
def encode(comfy, tiny_t5):
    """PixArtTextEncode with its widgets' defaults -> (conditioning, notice)."""

    def run(text, clip=tiny_t5.clip, **inputs):
        defaults = {
            "family": "sigma", "unconditional": "prompt", "clean": "auto", "token_limit": 0,
            "one_prompt_per_line": False, "width": 0, "height": 0,
        }  # fmt: skip
        with torch.inference_mode():
            output = comfy.classes["PixArtTextEncode"].execute(clip=clip, text=text, **defaults | inputs)
        return output.result[0], output.ui.as_dict()["text"][0]

    return run
