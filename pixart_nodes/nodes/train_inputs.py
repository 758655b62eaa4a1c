"""The widgets of PixArtTrain: a beginner's first, the others in the order of what they are about."""

import folder_paths
from comfy_api.latest import io

from ..comfy_bridge.compat import build
from ..comfy_bridge.kv_compress import LAYER_NAMES
from ..jobs.request import RECIPES_CHOICE
from ..training.config import CHOICES, RECIPES, RunConfig
from .cache_features import Cache

MODES = ("wait", "background", "detached")
RESUMES = ("auto", "new")
NO_VAE = "rough colours"
DEFAULT = RunConfig()


def whole(name, default, low, high, tooltip, advanced=False):
    return build(io.Int.Input, name, default=default, min=low, max=high, tooltip=tooltip, advanced=advanced)


def number(name, default, low, high, step, tooltip, advanced=False):
    return build(
        io.Float.Input, name, default=default, min=low, max=high, step=step, round=False, tooltip=tooltip,
        advanced=advanced,
    )  # fmt: skip


def choice(name, options, tooltip, advanced=False):
    """The first option is the default."""
    return build(
        io.Combo.Input, name, options=list(options), default=options[0], tooltip=tooltip, advanced=advanced
    )  # fmt: skip


def switch(name, default, tooltip, advanced=False):
    return build(io.Boolean.Input, name, default=default, tooltip=tooltip, advanced=advanced)


def text(name, default, tooltip, advanced=False):
    return build(io.String.Input, name, default=default, tooltip=tooltip, advanced=advanced)


def train_inputs():
    return [*first_inputs(), *loop_inputs(), *recipe_inputs()]


def first_inputs():
    return [
        Cache.Input("cache", tooltip="What is learnt: from PixArt Cache Features, made for this model's family."),
        io.Model.Input(
            "model",
            tooltip="What training starts from: PixArt Load Model, without LoRAs. Its file is trained from, in the "
            "trainer's own precision; the result comes out on this MODEL.",
        ),
        choice("recipe", RECIPES, "lora: a style or thing, as a small file beside the model. dreambooth: a LoRA for "
               "one subject, with pictures of its class that must not change. lcm-lora, lcm: pictures in 4 steps. "
               "controlnet: pictures that follow hints. full: all weights. weak-to-strong: alpha to Sigma, larger "
               "pictures, KV compression."),
        text("output_name", "my_pixart", "Name of the file. It is written to the folder pixart in models/loras, "
             "models/diffusion_models or models/controlnet, over an earlier one of this name."),
        whole("steps", 0, 0, 10_000_000, "Updates of the weights. 0: the recipe's default, such as 1500 for lora. With "
              "more steps than before and resume on auto, a finished run is trained further."),
        number("learning_rate", 0.0, 0.0, 1.0, 1e-6, "How far each update goes. 0: the recipe's default, such as "
               "0.0001 for lora. Nothing scales it."),
        whole("rank", 0, 0, 1024, "Size of a LoRA. 0: the recipe's default, 16, and 64 for lcm-lora. Other recipes "
              "have none."),
        whole("batch_size", 0, 0, 1024, "Pictures at a time. 0: the recipe's default. Too many for the memory? Use 1, "
              "and more gradient accumulation."),
        choice("mode", MODES, "wait: this queue goes on when the training is done; Cancel stops it. background: the "
               "queue goes on at once, but what needs the result is blocked; queue again for it. detached: the same, "
               "and training survives the end of ComfyUI."),
        choice("resume", RESUMES, "auto: goes on with a run of the same settings that was stopped, and takes the "
               "result of one that is done. new: trains from the beginning."),
        switch("check_only", False, "Trains nothing: lists all problems, or tells how much memory and work it will "
               "take."),
    ]  # fmt: skip


def loop_inputs():
    return [
        build(
            io.Int.Input, "seed", default=DEFAULT.seed, min=0, max=2**31 - 1, control_after_generate=False,
            advanced=True, tooltip="Of all random numbers. The same seed and settings give the same weights.",
        ),
        whole("gradient_accumulation_steps", 0, 0, 4096, "Batches that are added up for one update: as a larger batch, "
              "in the memory of a small one. 0: the recipe's default.", True),
        whole("save_every", 0, 0, 1_000_000, "Steps between checkpoints: what a crash can cost. 0: 500.", True),
        whole("sample_every", -1, -1, 1_000_000, "Steps between pictures of the validation prompts. 0: none. -1: 250.",
              True),
        choice("sample_vae", (NO_VAE, *folder_paths.get_filename_list("vae")), "The VAE that those pictures are "
               "decoded with. rough colours: none, which needs no memory.", True),
        choice("precision", CHOICES["precision"], "Of the calculation. auto: bf16 where the GPU has it, else fp32. "
               "What is trained is kept in fp32.", True),
        choice("base_quantization", CHOICES["base_quantization"], "Keeps weights that are not trained in 8 or 4 bits, "
               "for LoRA and ControlNet: less memory. Needs bitsandbytes.", True),
        switch("gradient_checkpointing", True, "Computes blocks twice instead of keeping what they computed: a third "
               "slower, several times less memory.", True),
        choice("optimizer", CHOICES["optimizer"], "auto: adamw8bit for a LoRA on a GPU and came for all weights, where "
               "installed, else adamw. Those two take less memory. prodigy finds its own rate: leave learning_rate at "
               "0, or set it to 1.", True),
        choice("lr_schedule", CHOICES["lr_schedule"], "How the learning rate goes on after the warm-up: as it is, or "
               "down to 0 at the last step.", True),
        whole("warmup_steps", -1, -1, 1_000_000, "Steps in which the learning rate rises from 0. -1: the recipe's "
              "default, at most a tenth of the steps.", True),
        number("caption_dropout", -1.0, -1.0, 0.99, 0.01, "Share of captions that are left out, so that guidance "
               "works. -1: the recipe's default.", True),
        number("ema_decay", -1.0, -1.0, 0.99999, 1e-5, "The result is a moving average of the weights, this slow. "
               "0: no average. -1: the recipe's default.", True),
        number("min_snr_gamma", 0.0, 0.0, 100.0, 0.5, "Weighs noise levels against each other (min-SNR); 5 is usual. "
               "0: as PixArt was trained, without.", True),
        whole("processes", 1, 0, 64, "GPUs to train on, one process each. 0: as your `accelerate config` says.", True),
        choice("export", CHOICES["output.export"], "Layout of the file. native loads everywhere in ComfyUI; diffusers, "
               "kohya and peft are for other programs.", True),
    ]  # fmt: skip


def recipe_inputs():
    return [
        number("alpha", 0.0, 0.0, 4096.0, 1.0, "Strength of a LoRA while it is trained, in relation to its rank. 0: "
               "the same as the rank.", True),
        choice("targets", (RECIPES_CHOICE, *CHOICES["targets"]), "Which layers a LoRA changes: attention, also the MLP "
               "(lora), or all (lcm-lora).", True),
        switch("dora", False, "LoRA with separate magnitudes (DoRA): a little slower, often better at a low rank.",
               True),
        text("trigger_word", "", "Written into the file, for those who use it. PixArt Dataset puts it into captions.",
             True),
        number("prior_loss_weight", 1.0, 0.0, 100.0, 0.1, "dreambooth: how much the pictures with role prior count. 0: "
               "none are needed.", True),
        number("lcm_guidance", 5.5, 1.0, 30.0, 0.1, "lcm, lcm-lora: the cfg that gets built in.", True),
        whole("controlnet_blocks", 0, 0, 64, "controlnet: blocks that are copied. 0: 13, or half of a smaller model's.",
              True),
        whole("stronger_size", 0, 0, 8192, "weak-to-strong: size of pictures from now on, in pixels. 0: as before.",
              True),
        choice("kv_sampling", ("none", "conv", "uniform"), "weak-to-strong: KV compression that is learnt. conv is "
               "PixArt-Sigma's.", True),
        whole("kv_scale_factor", 2, 2, 8, "weak-to-strong: by how much rows and columns of keys are divided.", True),
        text("kv_layers", LAYER_NAMES[0], "weak-to-strong: which blocks: deep half, shallow half, all, or numbers such "
             "as 14-27.", True),
    ]  # fmt: skip
