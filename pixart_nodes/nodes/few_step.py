"""Pictures in one to eight steps: the samplers of PixArt-delta (LCM) and of PixArt's DMD model."""

from comfy_api.latest import io, ui

from ..comfy_bridge import few_step
from ..comfy_bridge.compat import build

MODEL_TOOLTIP = "A PixArt model distilled as an LCM: PixArt-LCM, or PixArt with an LCM-LoRA."
LATENT_TOOLTIP = "Where to start: an empty latent, or a picture with denoise below 1. Masks are kept to."


def lcm_inputs():
    return [
        io.Int.Input("steps", default=4, min=1, max=50, tooltip="Calls of the network. 4 is what PixArt-LCM is for."),
        io.Combo.Input(
            "grid",
            options=list(few_step.samplers.GRIDS),
            default="original",
            tooltip="The timesteps. original: the PixArt authors', for 4 steps 999, 759, 519, 279. diffusers: 999, "
            "759, 499, 259. For 1 and 2 steps they are the same.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 starts from pure noise. Below 1 a given picture is changed less: image to image. It has to "
            "leave enough of the 50 timesteps: 4 steps need 0.08.",
        ),
    ]


class PixArtLCMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtLCMSampler",
            display_name="PixArt LCM Sampler",
            category="PixArt/sampling",
            description="Model, sampler and noise levels of a PixArt LCM (PixArt-delta). Connect all three to "
            "SamplerCustom, with cfg 1.",
            search_aliases=["lcm", "pixart delta", "latent consistency", "few steps", "turbo"],
            inputs=[io.Model.Input("model", tooltip=MODEL_TOOLTIP), *lcm_inputs()],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LCM's schedule. For SamplerCustom."),
                io.Sampler.Output(display_name="sampler", tooltip="Fresh noise after each step. For SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of the grid. For SamplerCustom."),
            ],
        )

    @classmethod
    def execute(cls, model, steps, grid, denoise) -> io.NodeOutput:
        return io.NodeOutput(*few_step.lcm_sampling(model, steps, grid, denoise, "PixArt LCM Sampler"))


class PixArtLCMSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtLCMSample",
            display_name="PixArt LCM Sample",
            category="PixArt/sampling",
            description="Draws with a PixArt LCM (PixArt-delta) in a few steps, all in one node. cfg stays at 1.",
            search_aliases=["lcm", "ksampler", "pixart delta", "latent consistency", "few steps", "turbo"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input("latent_image", tooltip=LATENT_TOOLTIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the first noise and of the noise in each step. The same on every device.",
                ),
                *lcm_inputs(),
                build(
                    io.Float.Input,
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance is built into an LCM: leave this at 1. More takes twice the time, needs a "
                    "negative prompt, and was not trained.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Only for cfg above 1: what to avoid."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The picture, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, latent_image, seed, steps, grid, denoise, cfg, negative=None) -> io.NodeOutput:
        notice = few_step.guidance_notice(cfg)
        if notice and negative is None:
            raise ValueError(f"PixArt LCM Sample: {notice} Or connect a negative prompt.")
        lcm, sampler, sigmas = few_step.lcm_sampling(model, steps, grid, denoise, "PixArt LCM Sample")
        latent = few_step.sample(lcm, positive, negative or positive, latent_image, sampler, sigmas, seed, cfg)
        return io.NodeOutput(latent, ui=ui.PreviewText(notice) if notice else None)


class PixArtDMDSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtDMDSampler",
            display_name="PixArt DMD Sampler",
            category="PixArt/sampling",
            description="Sampler and noise level of PixArt's one-step model (DMD). Connect both to SamplerCustom, with "
            "cfg 1.",
            search_aliases=["dmd", "one step", "single step", "distribution matching"],
            inputs=[
                io.Model.Input("model", tooltip="PixArt-Alpha-DMD, or another one-step PixArt."),
                io.Int.Input(
                    "timestep",
                    default=400,
                    min=1,
                    max=999,
                    tooltip="The timestep that the model was distilled at: 400 for PixArt-Alpha-DMD.",
                ),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="One step from pure noise. For SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise level of the step. For SamplerCustom."),
            ],
        )

    @classmethod
    def execute(cls, model, timestep) -> io.NodeOutput:
        return io.NodeOutput(*few_step.dmd_sampling(model, timestep, "PixArt DMD Sampler"))


NODES = [PixArtLCMSampler, PixArtLCMSample, PixArtDMDSampler]
