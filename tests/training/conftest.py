"""A tiny base model, and a feature cache of two pictures under two captions, with control images and a prior one."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from pixart_nodes.checkpoints import save_native
from pixart_nodes.data.cache import Store
from pixart_nodes.data.index import Row, build
from pixart_nodes.data.manifest import Bucket
from pixart_nodes.model import PixArtParams, PixArtTransformer
from pixart_nodes.training.config import RunConfig
from pixart_nodes.training.initialise import initialise
from pixart_nodes.training.run_dir import RunFolder

PARAMS = PixArtParams(
    depth=2, hidden_size=48, num_heads=2, in_channels=4, patch_size=2, mlp_ratio=2.0, caption_channels=16,
    caption_tokens=120, base_size=4, pe_interpolation=1.0, micro_condition=False, qk_norm=False, kv_compress=None,
    learned_variance=True,
)  # fmt: skip
BUCKET = Bucket(1.0, 64, 64)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_base(path, params=PARAMS, family="alpha"):
    torch.manual_seed(0)
    model = PixArtTransformer(params)
    initialise(model, embedder_std=None)
    for block in model.blocks:  # a trained model looks at its caption
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.05)
    save_native(model, params, path, family, "test")
    return path


def write_cache(root, family="alpha", roles=("train", "train", "prior"), control=True, null=False):
    """root/sets/<one file>; pictures 0, 1, ... of the given roles; Sigma's always with a null caption."""
    latents, captions = Store(root / "latents" / "vae"), Store(root / "captions" / "t5")
    with latents, captions:
        for i in range(len(roles)):
            latents.put(f"picture {i}", random(4, 8, 8, seed=i) * 5)
            latents.put(f"control {i}", random(4, 8, 8, seed=100 + i) * 5)
            captions.put(f"caption {i}", random(3 + i, 16, seed=200 + i).half())
        captions.put("null", random(300, 16, seed=300).half())
    latents.refresh()
    captions.refresh()
    rows = [
        Row(f"p{i}.png", BUCKET, 64, 64, role, 1, latents.places[f"picture {i}"], captions.places[f"caption {i}"], None,
            latents.places[f"control {i}"] if control else None)
        for i, role in enumerate(roles)
    ]  # fmt: skip
    return build(
        root, rows, family=family, size="64", vae_id="vae", t5_id="t5", source="pictures",
        token_limit={"alpha": 120, "sigma": 300}[family],
        null_caption=captions.places["null"] if null or family == "sigma" else None,
        prompts=[("a picture", captions.places["caption 0"])],
    )  # fmt: skip


QUICK = {
    "steps": 50, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0,
    "max_grad_norm": 1.0, "precision": "fp32", "caption_dropout": 0.0, "ema_decay": 0.0, "save_every": 1000,
    "sample_every": 0, "gradient_checkpointing": False, "weight_decay": 0.0, "optimizer": "adamw",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate allows one precision for the life of a process, which for a real run is one run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_run(tmp_path):
    """make_run(recipe, **fields) -> a RunFolder with its run.json, on the tiny base and the tiny cache."""

    def make(recipe, name="run", family="alpha", **fields):
        base = tmp_path / "base.safetensors"
        cache = tmp_path / f"cache-{family}"
        if not base.exists():
            write_base(base)
        if not cache.exists():
            write_cache(cache, family)
        folder = RunFolder(tmp_path / name)
        small = {"rank": 8, "alpha": 8.0} if "lora" in recipe or recipe == "dreambooth" else {}
        config = RunConfig.from_dict({
            "recipe": recipe, "base": {"path": str(base)}, "cache": str(cache),
            "output": {"name": name, "folder": str(tmp_path / "models")}, **QUICK, **small, **fields,
        })  # fmt: skip
        folder.write_config(config)
        return folder

    return make


def losses(folder):
    return [event["loss"] for event in folder.read_events() if event["type"] == "step"]


def events_of(folder, kind):
    return [event for event in folder.read_events() if event["type"] == kind]


def read_status(folder):
    return json.loads((folder.path / "status.json").read_text())
