"""PixArt Load LoRA."""

from comfy_api.latest import io, ui

from ..comfy_bridge.compat import build, executing_node, show_text
from ..comfy_bridge.lora import apply_lora, lora_names, lora_path


class PixArtLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtLoadLora",
            display_name="PixArt Load LoRA",
            category="PixArt/loaders",
            description="Puts a LoRA on a PixArt model, in the layout of any trainer. The node shows how many keys "
            "matched and how strong the LoRA is.",
            search_aliases=["pixart lora", "lora loader", "lcm-lora", "peft", "dora", "lokr", "loha"],
            inputs=[
                io.Model.Input("model", tooltip="The PixArt model, with or without other LoRAs."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_names(),
                    tooltip="A file in models/loras, or a folder there that holds a PEFT adapter_config.json.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="1 is the LoRA as trained, 0 the model without it, negative values its opposite.",
                ),
                build(
                    io.Float.Input,
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=100000.0,
                    step=0.01,
                    advanced=True,
                    tooltip="The alpha of the training; the LoRA is multiplied by alpha / rank. It only counts where "
                    "the file does not say it. 0: auto, which is 8 there, the default of the PEFT library that "
                    "PixArt's own scripts use.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the LoRA on it. Chain these nodes to stack LoRAs."
                )
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, strength, alpha) -> io.NodeOutput:
        patched, said = apply_lora(model, lora_path(lora_name), strength, alpha or None)
        show_text(executing_node(), said)
        return io.NodeOutput(patched, ui=ui.PreviewText(said))


NODES = [PixArtLoadLora]
