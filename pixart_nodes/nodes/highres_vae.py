"""PixArt Tiled Decode and PixArt Tiled Encode."""

from comfy_api.latest import io

from ..comfy_bridge.compat import build
from ..comfy_bridge.vae import MIN_TILE, MODES, OTHER_VAES, STORES, tiled_decode, tiled_encode

VAE_TOOLTIP = "The SD 1.5 VAE for PixArt-alpha, the SDXL VAE for PixArt-Sigma."


def tile_inputs(what: str):
    """The widgets that both nodes have."""
    return [
        io.Int.Input(
            "tile_size",
            default=512,
            min=MIN_TILE,
            max=8192,
            step=16,
            tooltip=f"Side in pixels of what is {what} at one time. It sets memory and speed, never the result. A CPU "
            "takes 128 at most, which is fastest there.",
        ),
        io.Float.Input(
            "memory_gb",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.25,
            tooltip="Above 0: the memory beside the VAE's weights that may be used on its device, from which the tile "
            "size follows; tile_size is then ignored. On a CPU it includes intermediate results.",
        ),
        io.Combo.Input(
            "store",
            options=list(STORES),
            default="full",
            tooltip="Precision of intermediate results in memory. full: that of the VAE. half: 16 bits, half the "
            "memory for an fp32 VAE, an error below what a picture file keeps.",
        ),
    ]


def other_vaes_input():
    return io.Combo.Input(
        "other_vaes",
        options=list(OTHER_VAES),
        default=OTHER_VAES[0],
        tooltip="What to do with VAEs of other kinds, such as TAESD or video VAEs, that exact tiles do not know: stop "
        "and say so, or tile them as ComfyUI does.",
    )


class PixArtTiledDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtTiledDecode",
            display_name="PixArt Tiled Decode",
            category="PixArt/latent",
            description="Decodes large latents tile by tile, with the same picture as a decode in one piece: no seams, "
            "no shifts of tone.",
            search_aliases=["vae decode tiled", "4k", "low memory vae", "seamless tiles"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode, of any size."),
                io.Vae.Input("vae", tooltip=VAE_TOOLTIP),
                *tile_inputs("decoded"),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="exact",
                    tooltip="exact: as in one piece. fast: beyond 1024 pixels, statistics of a small picture: a third "
                    "of the intermediate results and less work above 2048 pixels, but tones shift a little.",
                ),
                other_vaes_input(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The decoded pictures.")],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size, memory_gb, store, mode, other_vaes) -> io.NodeOutput:
        return io.NodeOutput(tiled_decode(vae, samples["samples"], tile_size, memory_gb, store, mode, other_vaes))


class PixArtTiledEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtTiledEncode",
            display_name="PixArt Tiled Encode",
            category="PixArt/latent",
            description="Encodes large pictures tile by tile, with the same latent as an encode in one piece.",
            search_aliases=["vae encode tiled", "4k", "low memory vae", "img2img"],
            inputs=[
                io.Image.Input("pixels", tooltip="The pictures to encode. Sides are cropped to multiples of 8."),
                io.Vae.Input("vae", tooltip=VAE_TOOLTIP),
                *tile_inputs("encoded"),
                other_vaes_input(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="For a sampler, with denoise below 1.")],
        )

    @classmethod
    def execute(cls, pixels, vae, tile_size, memory_gb, store, other_vaes) -> io.NodeOutput:
        latent = tiled_encode(vae, pixels, tile_size, memory_gb, store, other_vaes)
        return io.NodeOutput({"samples": latent})


NODES = [PixArtTiledDecode, PixArtTiledEncode]
