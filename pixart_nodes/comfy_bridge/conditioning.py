"""Prompts to CONDITIONING as PixArt was trained on them: cleaned, cut to the token limit, or the null caption.

Letters: B batch, L caption tokens, D caption width.
"""

import logging
import re

import torch
from comfy import sd1_clip

from ..checkpoints.load import null_caption as placeholder
from ..text.captions import TOKEN_LIMITS, clean_caption
from .text_cache import attention_masks
from .text_encoder import NAME

log = logging.getLogger(__name__)

SHOWN = 400  # characters of a prompt's lost end
EDGES = re.compile(r"([\s,.;:]*)(.*?)([\s,.;:]*)", re.DOTALL)


def encode_prompt(clip, text, family, *, clean="auto", token_limit=0, one_prompt_per_line=False, extra=None):
    """Prompt -> (CONDITIONING, notice for the user).

    clean "auto" (alpha yes, Sigma no), "on" or "off"; token_limit 0 = the family's own. With one_prompt_per_line every
    line that is not blank is an item of the batch, padded to the longest, with `attention_mask` (B, L). `extra` goes
    into every entry. Raises ValueError when `clip` is no T5.
    """
    require(clip)
    limit = token_limit or TOKEN_LIMITS[family]
    text = text.encode("utf-8", "ignore").decode()  # half an emoji, as browsers can cut it, has no tokens
    prompts = [line for line in text.splitlines() if line.strip()] or [""] if one_prompt_per_line else [text]
    if clean == "on" or clean == "auto" and family == "alpha":
        prompts = [clean_weighted(prompt) for prompt in prompts]
    conditionings, notices = [], []
    for prompt in prompts:
        kept, cut = truncate(tokenize(clip, prompt), limit)
        conditionings.append(clip.encode_from_tokens_scheduled({NAME: [kept]}, add_dict=dict(extra or {})))
        notices.append(notice(clip, len(kept), limit, cut))
    return (batch(conditionings) if one_prompt_per_line else conditionings[0]), "\n".join(notices)


def require(clip):
    """Raises ValueError for the empty CLIP that Load Checkpoint gives of a file without a text encoder."""
    if clip is None:
        raise ValueError("PixArt Text Encode got no text encoder: the checkpoint that `clip` comes from holds none. "
                         "Connect PixArt Load T5.")  # fmt: skip


def null_caption(clip, family, *, model=None, positive=None, token_limit=0, extra=None):
    """The caption of the original's unconditional branch -> (CONDITIONING, notice for the user).

    alpha: rows of the checkpoint's `y_embedder.y_embedding` (needs `model`). Sigma: T5("") padded to the token limit,
    pads included. Of these the original attends to as many as the positive prompt has tokens, because it masks both
    branches with the positive's mask (PixArt-sigma scripts/inference.py:84,106-111); without `positive`: to all.
    """
    require(clip)
    if family == "alpha":
        table = null_table(model)
        entries = [[table[None], clip.add_hooks_to_dict({"pooled_output": None, **(extra or {})})]]
    else:
        entries = encode_empty(clip, token_limit or TOKEN_LIMITS[family], dict(extra or {}))
    entries = [[*like_positive(cond, positive, rest)] for cond, rest in entries]
    return entries, f"null caption: {entries[0][0].shape[1]} rows"


def null_table(model):
    """y_embedding (L, D) of a PixArt MODEL. Raises ValueError when there is none."""
    if model is None:
        raise ValueError("The null caption of PixArt-alpha lies in the checkpoint: connect `model` (PixArtLoadModel).")
    embedder = getattr(model.get_model_object("diffusion_model"), "y_embedder", None)
    table = getattr(embedder, "y_embedding", None)
    if table is None or table.ndim != 2:
        raise ValueError("The connected model is no PixArt model, so it has no null caption. Use PixArtLoadModel.")
    table = table.detach().cpu()
    params = getattr(model.model, "params", None)  # ours; ComfyUI's own PixArt loads only files that have the table
    if params and torch.equal(table, placeholder(params).to(table.dtype)):
        raise ValueError(
            "This checkpoint carries no null caption (diffusers files drop it). Set `unconditional` to prompt and "
            "leave the text empty, or load the original .pth."
        )
    return table.float()


def encode_empty(clip, rows, extra):
    """T5("") padded to `rows` tokens, the pads masked out inside T5 as the original has it.

    Under that mask a pad sees only `</s>`, so all pads come out alike, and two tokens say everything.
    """
    end = tokenize(clip, "")[-1]  # complains about a CLIP that is no T5
    pad = (getattr(clip.tokenizer, clip.tokenizer.clip).pad_token, 1.0)
    with masking_pads(clip):
        entries = clip.encode_from_tokens_scheduled({NAME: [[end, pad]]}, add_dict=extra)
    for entry in entries:
        entry[1].pop("attention_mask", None)
        pads = entry[0][:, 1:].expand(-1, rows - 1, -1)
        entry[0] = torch.cat([entry[0][:, :1], pads], dim=1)  # (1, rows, D)
    return entries


def masking_pads(clip):
    """A context in which T5 masks its pads. Our own CLIP keeps its encodings apart by that; it may not be loaded."""
    if getattr(clip, "identity", None) is None:
        return attention_masks(clip.cond_stage_model)
    return clip.masking_pads()


def like_positive(cond, positive, rest):
    """`cond` (1, L, D) cut to the tokens of `positive`'s first entry, with its batch and mask -> (cond, rest)."""
    if not positive:
        return cond, rest
    prompt, settings = positive[0]
    length = min(prompt.shape[1], cond.shape[1])
    mask = settings.get("attention_mask")
    if mask is None:
        return cond[:, :length], rest
    return cond[:, :length].repeat(prompt.shape[0], 1, 1), {**rest, "attention_mask": mask[:, :length]}


def clean_weighted(text):
    """`clean_caption` on text with ComfyUI's prompt weights: every weighted part alone, so that weights survive."""
    parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
    parts = [(sd1_clip.unescape_important(part), weight) for part, weight in parts]
    if all(weight == 1.0 for _, weight in parts):
        return escape(clean_caption("".join(part for part, _ in parts)))
    result = ""
    for part, weight in parts:
        before, core, after = EDGES.fullmatch(part).groups()
        core = escape(clean_caption(core))
        result += before + (f"({core}:{weight})" if core and weight != 1.0 else core) + after
    return result.strip()


def escape(text):
    return text.replace("(", "\\(").replace(")", "\\)")


def tokenize(clip, text):
    """[(id or embedding, weight), ...] that ends with `</s>`, without padding. Raises ValueError for other encoders."""
    tokens = clip.tokenize(text)
    if set(tokens) != {NAME}:
        raise ValueError(
            f"PixArt reads prompts with T5 alone, but this CLIP makes tokens for {', '.join(sorted(tokens))}. "
            "Connect PixArtLoadT5, or CLIPLoader with type pixart."
        )
    tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip)
    row = [pair for chunk in tokens[NAME] for pair in chunk]
    while row and row[-1][0] == tokenizer.pad_token:
        row.pop()
    return row or [(tokenizer.end_token, 1.0)]


def truncate(row, limit):
    """(what T5 gets, what was cut): the first limit - 1 tokens and the closing `</s>`, as Hugging Face truncates."""
    if len(row) <= limit:
        return row, []
    return row[: limit - 1] + row[-1:], row[limit - 1 : -1]


def notice(clip, kept, limit, cut):
    """"37 of 120 tokens", and what did not fit."""
    if not cut:
        return f"{kept} of {limit} tokens"
    tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip).tokenizer
    lost = tokenizer.decode([token for token, _ in cut if isinstance(token, int)]).strip()
    lost = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
    message = f"{kept} of {limit} tokens; {len(cut)} more were cut off: {lost}"
    log.warning("PixArt prompt: %s", message)
    return message


def batch(conditionings):
    """One CONDITIONING of B prompts out of B, entry by entry (entries are steps of a schedule)."""
    result = []
    for entries in zip(*conditionings, strict=True):
        conds = [cond for cond, _ in entries]  # each (1, l, D)
        lengths = torch.tensor([cond.shape[1] for cond in conds])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)
        cond = torch.nn.utils.rnn.pad_sequence([cond[0] for cond in conds], batch_first=True)  # (B, L, D)
        result.append([cond, {**entries[0][1], "attention_mask": mask.long()}])
    return result
