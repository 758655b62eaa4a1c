"""ControlNet: loading, applying, and the HED edges that PixArt's was trained on."""

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..comfy_bridge import hints
from ..comfy_bridge.compat import build, executing_node, show_text
from ..comfy_bridge.control import CONTROL_DTYPES, apply_control, load_control
from ..comfy_bridge.model import load_pixart
from ..comfy_bridge.model_files import control_names, control_path

OWN_BASE, BUNDLED_BASE = "load it elsewhere", "from this file"
MODE, SAMPLE = "mode", "sample"
NO_MODEL = (
    "PixArt Load ControlNet hands out a model only with `base` set to 'from this file'. Connect the model from "
    "PixArt Load Model instead, or set `base`."
)


class PixArtLoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtLoadControlNet",
            display_name="PixArt Load ControlNet",
            category="PixArt/loaders",
            description="Loads a ControlNet for PixArt (PixArt-delta): original .pth, diffusers or SimpleTuner, own "
            "safetensors.",
            search_aliases=["pixart controlnet", "pixart delta", "control net loader", "hed"],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=control_names(),
                    tooltip="A file or diffusers folder in models/controlnet.",
                ),
                io.Combo.Input(
                    "base",
                    options=[OWN_BASE, BUNDLED_BASE],
                    default=OWN_BASE,
                    tooltip="The published .pth files hold the PixArt model as well, unchanged. Load your own with "
                    "PixArt Load Model, or take that one: it comes out as `model`.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(CONTROL_DTYPES),
                    default="auto",
                    tooltip="How the weights are kept in memory. auto: what suits the hardware. fp8_e4m3fn takes half "
                    "the memory of fp16, at a small loss of quality.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="control_net", tooltip="For Apply ControlNet or PixArt Apply ControlNet."
                ),
                io.Model.Output(display_name="model", tooltip="The model in the same file, if `base` asks for it."),
            ],
        )

    @classmethod
    def execute(cls, control_net_name, base, weight_dtype) -> io.NodeOutput:
        path = control_path(control_net_name)
        control_net, model = load_control(path, weight_dtype), ExecutionBlocker(NO_MODEL)
        if base == BUNDLED_BASE:
            model = load_pixart(path, weight_dtype=weight_dtype, beside_control=True)
        notes = "\n".join(control_net.detection.notes)
        show_text(executing_node(), notes)
        return io.NodeOutput(control_net, model, ui=ui.PreviewText(notes) if notes else None)


class PixArtApplyControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtApplyControlNet",
            display_name="PixArt Apply ControlNet",
            category="PixArt/conditioning",
            description="Makes the picture follow an edge map: fitted, encoded and weighted as PixArt wants it. "
            "ComfyUI's Apply ControlNet works as well.",
            search_aliases=["controlnet", "pixart delta", "hed", "canny", "edges"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt. Both follow the same image."),
                io.ControlNet.Input("control_net", tooltip="From PixArt Load ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip="White edges on black: from PixArt HED Edges, or any edge map. One for all pictures of "
                    "the batch, or one for each.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the PixArt model: the image is read through it."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.01, tooltip="How much to follow. 0: not at all."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="From which part of the run on. 0 is the beginning, where the composition is decided.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Up to which part of the run. Below 1 the model finishes freely.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(hints.FITS),
                    default="crop",
                    tooltip="Where the image has another shape than the picture. crop: fill it, cut what sticks out. "
                    "pad: fit in, the rest without edges. original: as the PixArt authors' app, between the two.",
                ),
                io.Combo.Input(
                    "posterior",
                    options=[MODE, SAMPLE],
                    default=MODE,
                    tooltip="The VAE gives a distribution. mode: its centre. sample: one random latent of it, as the "
                    "original does.",
                ),
                io.Int.Input(
                    "posterior_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="For posterior sample: the same seed gives the same latent on every machine.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    tooltip="Soft weights: a factor for each of the ControlNet's blocks, such as 1, 0.9, 0.8. The last "
                    "one goes for all that follow. Empty: 1 for all.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler, or the next ControlNet."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler, or the next ControlNet."),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, control_net, image, vae, strength, start_percent, end_percent, fit, posterior,
        posterior_seed, block_weights,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(*apply_control(
            (positive, negative), control_net, image, vae, strength, (start_percent, end_percent), fit,
            posterior_seed if posterior == SAMPLE else None, block_weights,
        ))  # fmt: skip


class PixArtHEDEdges(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtHEDEdges",
            display_name="PixArt HED Edges",
            category="PixArt/image",
            description="Soft edges of a picture with the HED detector, as PixArt's ControlNet was trained on.",
            search_aliases=["hed", "edge detection", "preprocessor", "soft edge", "controlnet"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures of any size. Scale them to the size that you draw first."),
                io.Combo.Input(
                    "hed_name",
                    options=sorted(control_names(), key=lambda name: "hed" not in name.lower()),
                    tooltip="ControlNetHED.pth in models/controlnet.",
                ),
            ],
            outputs=[io.Image.Output(display_name="edges", tooltip="White edges on black. For Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, image, hed_name) -> io.NodeOutput:
        edges, remark = hints.hed_edges(control_path(hed_name), image.movedim(-1, 1), "PixArt HED Edges")
        show_text(executing_node(), remark)
        return io.NodeOutput(edges.movedim(1, -1), ui=ui.PreviewText(remark) if remark else None)


NODES = [PixArtLoadControlNet, PixArtApplyControlNet, PixArtHEDEdges]
