"""The settings of a form, in which 0, -1 or a phrase stand for the recipe's own choice -> run.json's fields."""

from ..training.config import RunConfig, defaults

RECIPES_CHOICE = "recipe's default"
IF_POSITIVE = ("steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "rank", "alpha", "save_every")
IF_NOT_NEGATIVE = ("warmup_steps", "sample_every", "caption_dropout", "ema_decay")
AS_GIVEN = ("seed", "precision", "base_quantization", "gradient_checkpointing", "optimizer", "lr_schedule", "dora",
            "prior_loss_weight", "trigger_word")  # fmt: skip
CONTROL_BLOCKS = 13  # PixArt-delta's, of 28


def run_config(form: dict, depth: int) -> RunConfig:
    """form: fields of RunConfig, `lcm_guidance`, `controlnet_blocks`, `stronger_size`, `kv_...`; depth: blocks of the
    base. Raises ValueError for names that RunConfig does not have."""
    recipe = form["recipe"]
    fields = {"recipe": recipe, **{name: form[name] for name in ("base", "cache", "output", "vae", *AS_GIVEN)}}
    fields |= {name: form[name] for name in IF_POSITIVE if form[name] > 0}
    fields |= {name: form[name] for name in IF_NOT_NEGATIVE if form[name] >= 0}
    if form["targets"] != RECIPES_CHOICE:
        fields["targets"] = form["targets"]
    if form["min_snr_gamma"] > 0:
        fields["min_snr_gamma"] = form["min_snr_gamma"]
    if "rank" in fields and "alpha" not in fields:
        fields["alpha"] = float(fields["rank"])
    fields["lcm"] = {"guidance": form["lcm_guidance"]}
    fields["controlnet"] = {"blocks": form["controlnet_blocks"] or max(1, min(CONTROL_BLOCKS, depth // 2))}
    fields["weak_to_strong"] = {
        "base_size": form["stronger_size"] or None,
        "kv_sampling": None if form["kv_sampling"] == "none" else form["kv_sampling"],
        "kv_scale_factor": form["kv_scale_factor"],
        "kv_layers": form["kv_layers"] or tuple(range(depth // 2, depth)),
    }
    if "steps" in fields and "warmup_steps" not in fields:
        usual = defaults(recipe).get("warmup_steps", RunConfig.warmup_steps)
        fields["warmup_steps"] = min(usual, fields["steps"] // 10)
    if form["optimizer"] == "prodigy":  # it finds the rate and multiplies it with this
        fields.setdefault("learning_rate", 1.0)
    return RunConfig.from_dict(fields)
