"""PixArt-Sigma's weak-to-strong training: a trained model gets another VAE, longer captions, a larger size or KV
compression, and goes on learning with all its weights (arXiv 2403.04692, section 3.4)."""

from dataclasses import replace

from torch import nn
from torch.nn.functional import pad

from ...checkpoints.keys import Y_EMBEDDING
from ...data.index import LATENT_FACTOR
from ...model import KVCompress, PixArtParams, PixArtTransformer
from ...model.kv_compress import untrained_tensors
from ..config import WeakToStrong
from .finetune import FullFineTune


class WeakToStrongRecipe(FullFineTune):
    @classmethod
    def problems(cls, config, index, start_params) -> list[str]:
        wanted = config.weak_to_strong
        problems = []
        if index.family != "sigma":
            problems.append(f"{index.path} has {index.family}'s features: weak-to-strong ends at Sigma, so its cache "
                            "is made with family sigma and the SDXL VAE.")  # fmt: skip
        if wanted.kv_sampling not in (None, "conv", "uniform"):
            problems.append(f"weak_to_strong.kv_sampling is {wanted.kv_sampling!r}; it must be conv, uniform or null.")
        beyond = [i for i in wanted.kv_layers if not 0 <= i < start_params.depth]
        if wanted.kv_sampling and beyond:
            problems.append(f"weak_to_strong.kv_layers has {beyond[0]}, but the model's blocks are 0 to "
                            f"{start_params.depth - 1}.")  # fmt: skip
        return problems

    def build(self) -> nn.Module:
        self.start.model = strengthen(self.start.model, self.config.weak_to_strong)
        self.start.family = "sigma"
        return super().build()


def strengthen(model: PixArtTransformer, wanted: WeakToStrong) -> PixArtTransformer:
    """The model with other numbers. What changes nothing at first is exact: new positions keep their span,
    compression starts as the plain average of a cell; micro-conditioning goes, as in Sigma."""
    params = stronger(model.params, wanted)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(("csize_embedder", "ar_embedder"))}
    missing = params.caption_tokens - len(tensors[Y_EMBEDDING])
    tensors[Y_EMBEDDING] = pad(tensors[Y_EMBEDDING], (0, 0, 0, missing))  # cuts where it is negative
    if params.kv_compress and params.kv_compress != model.params.kv_compress:
        tensors |= untrained_tensors(params, params.kv_compress)
    strong = PixArtTransformer(params, device="meta")
    strong.load_state_dict(tensors, assign=True)
    return strong


def stronger(params: PixArtParams, wanted: WeakToStrong) -> PixArtParams:
    # base_size counts patches
    size = params.base_size if wanted.base_size is None else wanted.base_size // (LATENT_FACTOR * params.patch_size)
    span = wanted.pe_interpolation or params.pe_interpolation * size / params.base_size
    kv = params.kv_compress
    if wanted.kv_sampling is not None:
        kv = KVCompress(wanted.kv_sampling, wanted.kv_scale_factor, tuple(wanted.kv_layers))
    return replace(
        params, base_size=size, pe_interpolation=span, caption_tokens=wanted.caption_tokens, micro_condition=False,
        kv_compress=kv,
    )  # fmt: skip
