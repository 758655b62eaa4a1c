"""PixArt Sampling: the original's solvers and their settings, for SamplerCustom."""

from comfy_api.latest import io

from ..comfy_bridge.compat import build
from ..comfy_bridge.sampling import PRESETS, family_of, original_sampler, original_sigmas, schedule_of

FINAL_SIGMAS = ("zero", "original (0.01)")


class PixArtSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtSampling",
            display_name="PixArt Sampling",
            category="PixArt/sampling",
            description="Sampler and noise levels as the PixArt authors set them. Connect both to SamplerCustom.",
            search_aliases=["pixart scheduler", "dpm-solver++", "sa-solver", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="The PixArt model that will be sampled: it knows the noise schedule."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip="DPM-Solver++ 2M: 14 to 20 steps at cfg 4.5. SA-Solver adds noise on the way: 25 steps at "
                    "cfg 3. Both on the original's grid of timesteps.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=1000, tooltip="Model evaluations. 14 to 25 are usual for PixArt."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise. Below 1 a given picture is changed less: image to image.",
                ),
                io.Combo.Input(
                    "final_sigma",
                    options=list(FINAL_SIGMAS),
                    tooltip="Where the last step ends. zero removes all noise, as ComfyUI does; the original stops at "
                    "0.01, which differs by less than one grey level.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="The solver. Connect to SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels. Connect to SamplerCustom."),
            ],
        )

    @classmethod
    def execute(cls, model, preset, steps, denoise, final_sigma) -> io.NodeOutput:
        schedule = schedule_of(model)
        sigmas = original_sigmas(schedule, steps, denoise, to_zero=final_sigma == "zero")
        return io.NodeOutput(original_sampler(preset, schedule, family_of(model), steps), sigmas)


NODES = [PixArtSampling]
