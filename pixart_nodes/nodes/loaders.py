"""PixArt Load Model."""

from comfy_api.latest import io, ui

from ..comfy_bridge.compat import build, executing_node, show_text
from ..comfy_bridge.model import WEIGHT_DTYPES, WEIGHTS, load_pixart
from ..comfy_bridge.model_files import model_names, model_path


class PixArtLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtLoadModel",
            display_name="PixArt Load Model",
            category="PixArt/loaders",
            description="Loads any PixArt-alpha or PixArt-Sigma transformer: original .pth, safetensors, diffusers.",
            search_aliases=["pixart checkpoint", "pixart alpha", "pixart sigma", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A file or diffusers folder in models/diffusion_models or models/checkpoints.",
                ),
                io.Combo.Input(
                    "family",
                    options=["auto", "alpha", "sigma"],
                    default="auto",
                    tooltip="Which PixArt it is: alpha goes with the SD 1.5 VAE, Sigma with the SDXL VAE. "
                    "Choose by hand only when auto says that the file does not tell.",
                ),
                io.Combo.Input(
                    "base_size",
                    options=["auto", "256", "512", "1024", "2048"],
                    default="auto",
                    tooltip="The picture size in pixels that the model was trained on, where the file does not tell. "
                    "It sets the scale of the positions, not the size of your pictures.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="auto",
                    tooltip="How the weights are kept in memory. auto: what suits the hardware. fp8_e4m3fn takes half "
                    "the memory of fp16, at a small loss of quality. int8 takes as little and is closer, nf4 and fp4 a "
                    "quarter, at a visible loss: these need bitsandbytes.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default="ema if present",
                    tooltip="Original .pth files may hold two sets of weights: the trained ones and their moving "
                    "average (EMA), which usually gives better pictures.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For KSampler, LoRA loaders and every other node that takes a model."
                )
            ],
        )

    @classmethod
    def execute(cls, model_name, family, base_size, weight_dtype, weights) -> io.NodeOutput:
        model = load_pixart(
            model_path(model_name),
            family=None if family == "auto" else family,
            base_size=None if base_size == "auto" else int(base_size),
            weight_dtype=weight_dtype,
            weights=weights,
        )
        notes = "\n".join(model.model.detection.notes)
        show_text(executing_node(), notes)
        return io.NodeOutput(model, ui=ui.PreviewText(notes) if notes else None)


NODES = [PixArtLoadModel]
