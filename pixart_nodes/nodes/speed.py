"""PixArt Step Cache, PixArt Guidance Interval, PixArt Compile."""

from comfy_api.latest import io

from ..comfy_bridge.compat import build
from ..comfy_bridge.speed import COMPILE_MODES, with_compiled_blocks, with_guidance_interval, with_step_cache

CATEGORY = "PixArt/speed"


def percent(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class PixArtStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtStepCache",
            display_name="PixArt Step Cache",
            category=CATEGORY,
            description="Skips most of the network at steps that change little. Faster, at some loss of quality.",
            search_aliases=["first block cache", "teacache", "easycache", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="A model from PixArt Load Model."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="By how much the first block's effect may have changed since the last whole step. 0 skips "
                    "nothing; higher is faster and further from the picture without this node.",
                ),
                percent("start_percent", 0.1, "Steps before this part of the sampling time are never skipped."),
                percent("end_percent", 0.95, "Steps behind this part of the sampling time are never skipped."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, threshold, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(with_step_cache(model, threshold, start_percent, end_percent))


class PixArtGuidanceInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtGuidanceInterval",
            display_name="PixArt Guidance Interval",
            category=CATEGORY,
            description="Guidance (cfg) in a part of the steps only. The others follow the prompt alone, at half the "
            "cost.",
            search_aliases=["limited interval guidance", "cfg interval", "cfg override"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that is sampled with a cfg scale."),
                percent("start_percent", 0.0, "Guidance starts here; 0 is the first step, pure noise."),
                percent("end_percent", 0.7, "Guidance ends here; 1 is the last step."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For KSampler, SamplerCustom and guiders.")],
        )

    @classmethod
    def execute(cls, model, start_percent, end_percent) -> io.NodeOutput:
        return io.NodeOutput(with_guidance_interval(model, start_percent, end_percent))


class PixArtCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtCompile",
            display_name="PixArt Compile",
            category=CATEGORY,
            description="Compiles the network's blocks with torch.compile. The first run takes a minute or more, later "
            "ones are faster.",
            search_aliases=["torch compile", "cuda graphs", "inductor"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from PixArt Load Model, after all LoRA nodes."),
                io.Combo.Input(
                    "mode",
                    options=list(COMPILE_MODES),
                    tooltip="default: fused kernels. reduce-overhead: CUDA graphs too, for small pictures on fast "
                    "GPUs. max-autotune-no-cudagraphs: tries several kernels, and takes longest to compile.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, mode) -> io.NodeOutput:
        return io.NodeOutput(with_compiled_blocks(model, mode))


NODES = [PixArtStepCache, PixArtGuidanceInterval, PixArtCompile]
