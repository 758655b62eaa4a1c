"""Beyond the training size: KV compression, positions, larger latents, and the model saved for fine-tuning."""

from comfy_api.latest import io, ui

from ..comfy_bridge.compat import build, executing_node, show_text
from ..comfy_bridge.highres import SPANS, UPSCALE_METHODS, add_kv_compression, set_position_span, upscale_latent
from ..comfy_bridge.kv_compress import LAYER_NAMES, PATCH_SAMPLINGS
from ..comfy_bridge.save_model import DTYPES, FOLDERS, save_model
from ..data.buckets import TABLES, nearest

MODEL_OUTPUT = "For KSampler, LoRA loaders and every other node that takes a model."


class PixArtKVCompress(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtKVCompress",
            display_name="PixArt KV Compress",
            category="PixArt/model",
            description="Thins out keys and values in self-attention, as PixArt-Sigma does for 4K: large pictures take "
            "a fraction of the time. The connected model stays as it is.",
            search_aliases=["kv token compression", "4k", "pixart sigma", "faster attention", "token merging"],
            inputs=[
                io.Model.Input("model", tooltip="A model from PixArt Load Model, with or without LoRAs."),
                io.String.Input(
                    "layers",
                    default=LAYER_NAMES[0],
                    tooltip="Which blocks: deep half (PixArt-Sigma's choice, 14-27 of 28), shallow half, all, or "
                    "numbers such as 14-27 or 0, 2, 5.",
                ),
                io.Combo.Input(
                    "ratio",
                    options=["2", "4"],
                    tooltip="By how much the rows and the columns of keys are divided: 2 keeps a quarter of them, 4 a "
                    "sixteenth.",
                ),
                io.Combo.Input(
                    "sampling",
                    options=list(PATCH_SAMPLINGS),
                    default="uniform",
                    tooltip="uniform keeps every second (fourth) key as it is: use it on models that were trained "
                    "without compression. conv starts as PixArt-Sigma's averaging convolution and is made to be "
                    "fine-tuned; before that it spoils the picture.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_OUTPUT)],
        )

    @classmethod
    def execute(cls, model, layers, ratio, sampling) -> io.NodeOutput:
        clone, note = add_kv_compression(model, layers, int(ratio), sampling)
        show_text(executing_node(), note)
        return io.NodeOutput(clone, ui=ui.PreviewText(note))


class PixArtPositionSpan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtPositionSpan",
            display_name="PixArt Position Span",
            category="PixArt/model",
            description="Which range of positions the tokens of a picture span, for pictures of another size than the "
            "model was trained on.",
            search_aliases=["pe interpolation", "position embedding", "weak to strong", "base size"],
            inputs=[
                io.Model.Input("model", tooltip="A model from PixArt Load Model."),
                io.Combo.Input(
                    "span",
                    options=list(SPANS),
                    tooltip="trained: that of the model's training, whatever the size of the picture. auto: that of "
                    "PixArt's own model of the picture's size, as weak-to-strong training interpolates. For released "
                    "models they differ only where alpha-256 draws larger pictures.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_OUTPUT)],
        )

    @classmethod
    def execute(cls, model, span) -> io.NodeOutput:
        return io.NodeOutput(set_position_span(model, span))


class PixArtUpscaleLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtUpscaleLatent",
            display_name="PixArt Upscale Latent",
            category="PixArt/latent",
            description="Scales a latent to the PixArt size of the same shape in a larger table, for a second pass at "
            "2K or 4K.",
            search_aliases=["hires fix", "latent upscale", "two stage", "2k", "4k"],
            inputs=[
                io.Latent.Input("samples", tooltip="What a sampler made at a smaller size."),
                io.Combo.Input(
                    "table",
                    options=list(TABLES),
                    default="2048",
                    tooltip="Side in pixels of a square picture. The size with the nearest aspect ratio is taken, and "
                    "what sticks out is cut off.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(UPSCALE_METHODS),
                    tooltip="bicubic suits a second pass with denoise 0.3 to 0.6. nearest-exact leaves more for the "
                    "second pass to invent.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For a KSampler with denoise below 1."),
                io.Int.Output(display_name="width", tooltip="Pixels from left to right."),
                io.Int.Output(display_name="height", tooltip="Pixels from top to bottom."),
            ],
        )

    @classmethod
    def execute(cls, samples, table, method) -> io.NodeOutput:
        _, height, width = nearest(TABLES[table], *samples["samples"].shape[-2:])
        return io.NodeOutput(upscale_latent(samples, height, width, method), width, height)


class PixArtSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtSaveModel",
            display_name="PixArt Save Model",
            category="PixArt/model",
            description="Saves a PixArt model with its LoRAs and its KV compression as one safetensors file, for "
            "PixArt Load Model and for fine-tuning. Never overwrites a file.",
            search_aliases=["save checkpoint", "merge lora", "export model"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from PixArt Load Model, with whatever was added to it."),
                io.String.Input(
                    "name",
                    default="pixart",
                    tooltip="File name without ending, folders allowed. A name that is taken gets a number.",
                ),
                io.Combo.Input(
                    "folder",
                    options=list(FOLDERS),
                    tooltip="output: output/diffusion_models. models: the first folder of diffusion models. "
                    "PixArt Load Model finds the file in both.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    tooltip="In which numbers the weights are written. as loaded keeps them.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
        )

    @classmethod
    def execute(cls, model, name, folder, dtype) -> io.NodeOutput:
        path = str(save_model(model, name, folder, dtype))
        show_text(executing_node(), path)
        return io.NodeOutput(path, ui=ui.PreviewText(path))


NODES = [PixArtKVCompress, PixArtPositionSpan, PixArtUpscaleLatent, PixArtSaveModel]
