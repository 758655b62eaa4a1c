"""Transformers, ControlNets, embeddings, names of weights, and the VAE."""

import re

import torch
from torch import Tensor, nn

from pixart_nodes.checkpoints import load_controlnet, load_transformer
from pixart_nodes.checkpoints.controlnet import base_of
from pixart_nodes.checkpoints.keys import POS_EMBED, Y_EMBEDDING, to_diffusers, to_native
from pixart_nodes.model.embedders import ScalarEmbedder, timestep_embedding
from pixart_nodes.model.position import position_table
from pixart_nodes.vae import exact_tiles as vae_tiles

from .case import Case, read_cases


def transformer(case: Case):
    weights, inputs = case.tensors("weights"), case.tensors("in")
    for name, golden in case.tensors("out").items():
        with torch.no_grad():
            ours = _transformer_output(case, name, weights, inputs)
        if name == "forward_with_cfg":
            # uncond + s (cond - uncond) adds the rounding of two passes up to 2 s - 1 times: in float64, too, this
            # network is 1.4e-5 from the shared fixture. Channels 3: are those of a single pass.
            yield f"{name} (guided)", ours[:, :3], golden[:, :3], 2 * _cfg_scale(case) - 1
            name, ours, golden = f"{name} (unguided)", ours[:, 3:], golden[:, 3:]
        yield name, ours, golden


def _cfg_scale(case: Case) -> float:
    return float(re.search(r"cfg_scale[= ]([\d.]*\d)", case.entry["outputs"]["out.forward_with_cfg"])[1])


def _transformer_output(case: Case, name: str, weights, inputs) -> Tensor:
    config = dict(case.config)
    if config["kv_compress_config"] is not None:  # one output per way of sampling, all from the same weights
        kv = {**config["kv_compress_config"], "sampling": name}
        config["kv_compress_config"] = None if name == "none" else kv
        name = "forward"
    if name == "diffusers_forward":
        family = config["family"].split()[0]
        weights, config = case.tensors("diffusers"), case.entry["diffusers_config"]
        model, _ = load_transformer(weights, config=config, family=family)
        return call(model, inputs)
    model, _ = load_transformer(weights, config=config)
    return OUTPUTS[name](model, inputs, case)


def call(model, inputs, **changes) -> Tensor:
    """The network on the inputs of a fixture, all its output channels."""
    i = {**inputs, **changes}
    return model(
        i["x"], i["timestep"], i["y"].squeeze(1), i["mask"], i.get("img_hw"), i.get("aspect_ratio"),
        i.get("control"), learned_variance=True,
    )  # fmt: skip


def controlnet(case: Case):
    """The original's file with both halves, with a control latent and without."""
    weights, inputs = case.tensors("weights"), case.tensors("in")
    model, _ = load_transformer(base_of(weights), config=case.config)
    net, _ = load_controlnet(weights, config=case.config)
    branch = {"branches": [net.branch(inputs["c"])]}
    controls = {"with_c": branch, "forward_with_dpmsolver": branch, "c_none": None}
    for name, golden in case.tensors("out").items():
        with torch.no_grad():
            ours = call(model, inputs, control=controls[name])
        yield name, ours[:, : model.params.in_channels] if "dpmsolver" in name else ours, golden


def _with_cfg(model, inputs, case: Case) -> Tensor:
    """The original's forward_with_cfg: caption and null caption in one batch under the caption's mask (alpha's
    multi-scale class forgets it), guidance on three of the four noise channels, the rest unguided."""
    twice = {name: torch.cat([inputs[name]] * 2) for name in inputs}
    null = model.y_embedder.y_embedding.expand_as(inputs["y"])
    if case.config["micro_condition"]:
        twice["mask"] = None
    out = call(model, {**twice, "y": torch.cat([inputs["y"], null])})
    cond, uncond = out[:, :3].chunk(2)
    guided = uncond + _cfg_scale(case) * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


OUTPUTS = {
    "forward": lambda model, i, case: call(model, i),
    "forward_nomask": lambda model, i, case: call(model, i, mask=None),
    "forward_mask_holes": lambda model, i, case: call(model, i, mask=i["mask"].flip(1)),
    "forward_mask_bcast": lambda model, i, case: call(model, i, mask=i["mask"][:1]),
    "forward_data_bcast": lambda model, i, case: call(
        model, i, img_hw=i["img_hw"][:1], aspect_ratio=i["aspect_ratio"][:1]
    ),
    "forward_with_dpmsolver": lambda model, i, case: call(model, i)[:, : model.params.in_channels],
    "forward_with_cfg": _with_cfg,
}


def key_map(case: Case):
    """The map, value by value, on every fixture that holds both spellings of the same weights."""
    golden = case.json()
    dropped = set(golden["dropped_original_keys"])
    yield "dropped", {POS_EMBED, Y_EMBEDDING}, dropped
    for other in read_cases(case.folder):
        if "diffusers_config" not in other.entry:
            continue
        native, theirs = other.tensors("weights"), other.tensors("diffusers")
        ours = to_diffusers(native)
        yield f"{other.name}.names", set(ours), set(theirs)
        yield f"{other.name}.native_names", set(to_native(theirs)), set(native) - dropped
        for row in golden["map"]:
            name, (part, parts) = row["diffusers"], row.get("chunk_dim0", (0, 1))
            if row["original"] in native:
                expected = native[row["original"]].chunk(parts)[part]
                yield f"{other.name}.{name}", ours[name].tolist(), expected.tolist()
                yield f"{other.name}.{name} (diffusers)", theirs[name].tolist(), expected.tolist()
        for name, tensor in to_native(theirs).items():
            yield f"{other.name}.{name}", tensor.tolist(), native[name].tolist()


def pos_embed_tables(case: Case):
    for name, golden in case.tensors("out").items():
        c = case.entry["combos"][name.split(".")[0]]
        rows, cols = c["grid_size"] if isinstance(c["grid_size"], list) else [c["grid_size"]] * 2
        yield name, position_table(rows, cols, c["embed_dim"], c["base_size"], c["scale"])[0], golden


def timestep_size_embeddings(case: Case):
    weights, inputs, c = case.tensors("weights"), case.tensors("in"), case.config

    def embed(name, width, values):                                           # values (B, n)
        embedder = ScalarEmbedder(width, operations=nn)
        embedder.load_state_dict({k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name)})
        with torch.no_grad():
            return embedder(values.reshape(-1), torch.float32).reshape(values.shape[0], -1)

    t, hw, ar = inputs["t"], inputs["hw"], inputs["ar"]
    for name, golden in case.tensors("out").items():
        if name == "t_embedder":
            ours = embed("t_embedder", c["hidden"], t[:, None])
        elif name.startswith("size_embedder"):
            values = ar if name == "size_embedder_ar" else hw
            if "bcast" in name:
                values = hw[:1].repeat(int(name.split("bcast")[1]), 1)
            ours = embed("size_embedder", c["size_hidden"], values)
        else:
            kind, width = re.fullmatch(r"timestep_embedding_(?:(hw|ar)_)?(\d+)", name).groups()
            ours = timestep_embedding({None: t, "hw": hw, "ar": ar}[kind].reshape(-1), int(width))
        yield name, ours, golden


def autoencoder_kl(case: Case):
    """Decode and encode in tiles, against diffusers' in one piece; tiles of several sizes, none of which divides."""
    from diffusers import AutoencoderKL

    levels = len(case.config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = AutoencoderKL.from_config({**case.config, **blocks}).eval()
    vae.load_state_dict(case.tensors("weights"))
    inputs, golden = case.tensors("in"), case.tensors("out")
    for tile in (40, 72, 512):
        mean, log_variance = vae_tiles.encode(vae, inputs["image"], tile=tile).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        ours = {
            "decode": vae_tiles.decode(vae, inputs["z"], tile=tile), "encode_mean": mean,
            "encode_logvar": log_variance,
            "encode_sample": mean + (0.5 * log_variance).exp() * inputs["posterior_eps"],
        }  # fmt: skip
        for name in golden:
            yield f"{name}, tile {tile}", ours[name], golden[name]
