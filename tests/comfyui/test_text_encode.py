"""PixArtTextEncode inside a real ComfyUI: tokens, cleaning, weights, batches and the null caption."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints import save_diffusers
from pixart_nodes.checkpoints.files import NULL_CAPTION_FILE

from .tiny import ALPHA, random_weights
from .tiny_t5 import config, expected, random_model, same

TEXTS = [
    "a red fox in the snow", "", "   ", "Two  cats,\nthree Dogs!", "中文 😀 fox", "\x00\x07\u200b",
    "/* only a comment */", "it's 50% of (nothing", "</s> <extra_id_0> <pad>", "ﬁne naïve Ⅷ ½",
]  # fmt: skip


def test_comfyuis_tokenizer_gives_the_ids_of_transformers(tiny_t5):
    for text in TEXTS:
        ids = [token for token, _ in tiny_t5.clip.tokenize(text, disable_weights=True)["t5xxl"][0]]
        assert ids == tiny_t5.tokenizer(text).input_ids, text


def test_prompt_weights_move_away_from_pads_in_both_encode_nodes(comfy, tiny_t5, encode):
    text = "a (red:1.5) fox"
    (cond, _), *_ = encode(text)[0]
    ((native, _),) = comfy.call("CLIPTextEncode", clip=tiny_t5.clip, text=text)[0]
    row = tiny_t5.clip.tokenize(text)["t5xxl"][0]
    with torch.inference_mode():
        plain = tiny_t5.model(torch.tensor([[token for token, _ in row]])).last_hidden_state
        pads = tiny_t5.model(torch.zeros(1, len(row), dtype=torch.long)).last_hidden_state
    weights = torch.tensor([weight for _, weight in row])[None, :, None]
    assert sorted({weight for _, weight in row}) == [1.0, 1.5]
    assert same(cond, pads + (plain - pads) * weights)
    assert same(cond, native, 0)


def test_prompts_come_out_as_from_comfyuis_own_pixart_encoder(tiny_t5, encode):
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}  # as in tiny_t5.config
    native = comfy.sd.CLIP(
        ClipTarget(PixArtTokenizer, pixart_te()),
        model_options={"dtype": torch.float32, "t5xxl_model_config": sizes},
    )
    native.load_sd(tiny_t5.model.state_dict())
    for text in ("a red fox", "", "a (red:1.3) ((fox)), [not] a (cat:0.2)"):
        assert same(encode(text)[0][0][0], native.encode_from_tokens(native.tokenize(text)), 1e-6)
        assert same(encode(text, native)[0][0][0], encode(text)[0][0][0], 1e-6)
    null = {"unconditional": "null caption"}
    assert same(encode("", native, **null)[0][0][0], encode("", **null)[0][0][0], 1e-6)


def test_the_notice_of_a_queued_graph_is_in_its_history(comfy, tiny_t5):
    encoder = {"t5_name": tiny_t5.path.name, "dtype": "auto", "device": "cpu"}
    graph = {
        "t5": {"class_type": "PixArtLoadT5", "inputs": encoder},
        "model": {
            "class_type": "PixArtLoadModel",
            "inputs": {
                "model_name": "alpha.safetensors", "family": "auto", "base_size": "auto", "weight_dtype": "auto",
                "weights": "ema if present",
            },
        },
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 2}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0],
                "latent_image": ["latent", 0], "seed": 0, "steps": 2, "cfg": 4.5, "sampler_name": "euler",
                "scheduler": "normal", "denoise": 1.0,
            },
        },
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "text"}},
    }  # fmt: skip
    widgets = {
        "clip": ["t5", 0], "text": "a red fox\n\ntwo cats", "family": "alpha", "clean": "auto", "token_limit": 5,
        "one_prompt_per_line": True, "width": 0, "height": 0, "aspect_ratio": 0.0,
    }  # fmt: skip
    links = {"model": ["model", 0], "positive": ["positive", 0]}
    graph["positive"] = {"class_type": "PixArtTextEncode", "inputs": {**widgets, "unconditional": "prompt"}}
    graph["negative"] = {
        "class_type": "PixArtTextEncode", "inputs": {**widgets, **links, "unconditional": "null caption"},
    }  # fmt: skip
    executor = comfy.run(graph)
    assert executor.success, executor.status_messages
    shown = executor.history_result["outputs"]
    assert shown["positive"]["text"][0].splitlines() == ["5 of 5 tokens; 1 more were cut off: fox", "3 of 5 tokens"]
    assert list(shown["negative"]["text"]) == ["null caption: 5 rows"]


def test_cleaning_keeps_prompt_weights_and_cleans_each_part(encode):
    assert encode("A (RED #1 Ball:1.3), on <b>the</b> roof", family="alpha")[0][0][0].equal(
        encode("a (red ball:1.3), on the roof")[0][0][0]
    )


def test_a_family_has_its_own_cleaning_unless_told_otherwise(encode):
    clean, raw = encode("a red cat")[0][0][0], encode("A Red Cat (4k)", clean="off")[0][0][0]
    assert encode("A RED <i>cat</i>", family="alpha")[0][0][0].equal(clean)
    assert encode("A Red Cat (4k)")[0][0][0].equal(raw)
    assert encode("A RED <i>cat</i>", clean="on")[0][0][0].equal(clean)
    assert not encode("A RED cat", family="alpha", clean="off")[0][0][0].equal(clean)


def test_escaped_brackets_stay_brackets(encode, tiny_t5):
    (cond, _), *_ = encode(r"a \(red\) fox")[0]
    assert same(cond, expected(tiny_t5.model, tiny_t5.tokenizer, "a (red) fox"))
    (cleaned, _), *_ = encode(r"a \(red\) fox", family="alpha")[0]
    assert same(cleaned, expected(tiny_t5.model, tiny_t5.tokenizer, "a red fox"))


@pytest.mark.parametrize(("family", "limit"), [("alpha", 120), ("sigma", 300)])
def test_a_long_prompt_is_cut_as_transformers_cuts_it_and_the_lost_end_is_shown(encode, tiny_t5, family, limit):
    text = "a red fox in the snow " * 60 + "with a golden crown"
    conditioning, notice = encode(text, family=family)
    assert same(conditioning[0][0], expected(tiny_t5.model, tiny_t5.tokenizer, text, limit))
    assert notice.startswith(f"{limit} of {limit} tokens; ") and "red fox" in notice
    assert encode("a red fox")[1] == "6 of 300 tokens"


def test_the_token_limit_cuts_weighted_prompts_and_keeps_the_end_token(encode, tiny_t5):
    text = "a (red:1.5) fox in the snow"
    row = tiny_t5.clip.tokenize(text)["t5xxl"][0]
    kept = row[:3] + row[-1:]
    conditioning, notice = encode(text, token_limit=4)
    assert same(conditioning[0][0], tiny_t5.clip.encode_from_tokens({"t5xxl": [kept]}), 0)
    assert notice == f"4 of 4 tokens; {len(row) - 4} more were cut off: {notice.split(': ')[1]}"
    assert encode(text, token_limit=1)[0][0][0].shape[1] == 1


@pytest.mark.parametrize("family", ["alpha", "sigma"])
@pytest.mark.parametrize("text", [*TEXTS, "\ud83d", "(((:", "<![", "(:1.2)", "()", ".hidden"])
def test_no_text_crashes_the_node(encode, family, text):
    conditioning, notice = encode(text, family=family)
    assert conditioning[0][0].isfinite().all() and conditioning[0][0].shape[1] >= 1
    assert "tokens" in notice


def test_an_empty_prompt_is_the_end_token_alone(encode, tiny_t5):
    assert same(encode("")[0][0][0], expected(tiny_t5.model, tiny_t5.tokenizer, ""))
    assert encode("")[0][0][0].shape == (1, 1, 32)


def test_textual_inversions_work_and_unknown_ones_are_ignored(comfy, folder, load_t5, encode):
    model = random_model(config())
    model.save_pretrained(folder)
    embeddings = comfy.folder("embeddings")
    save_file({"t5xxl": torch.randn(2, 32)}, embeddings / "mine.safetensors")
    clip = load_t5(folder)
    with_two = encode("a embedding:mine fox", clip, token_limit=5)[0][0][0]
    assert with_two.shape[1] == 5 and with_two.isfinite().all()
    assert encode("a embedding:absent fox", clip)[0][0][0].isfinite().all()


def test_every_line_is_an_item_of_the_batch_with_its_own_mask(encode):
    lines = ["a red fox", "two cats on a roof in the snow", "(dog:1.4)"]
    ((cond, extra),), notice = encode("\n".join([lines[0], "", *lines[1:], " "]), one_prompt_per_line=True)
    assert extra["pooled_output"] is None and extra["attention_mask"].shape == cond.shape[:2]
    for n, line in enumerate(lines):
        alone = encode(line)[0][0][0]
        assert same(cond[n : n + 1, : alone.shape[1]], alone, 1e-6)
        assert extra["attention_mask"][n].tolist() == [1] * alone.shape[1] + [0] * (cond.shape[1] - alone.shape[1])
    assert len(notice.splitlines()) == 3
    assert encode("", one_prompt_per_line=True)[0][0][0].shape[:2] == (1, 1)


def test_sizes_go_into_the_conditioning_only_when_set(encode):
    assert set(encode("a")[0][0][1]) == {"pooled_output"}
    extra = encode("a", width=512, height=768, aspect_ratio=1.5)[0][0][1]
    assert (extra["width"], extra["height"], extra["aspect_ratio"]) == (512, 768, 1.5)


@torch.inference_mode()
def test_the_null_caption_of_sigma_is_the_padded_empty_prompt_cut_to_the_positive(encode, tiny_t5):
    padded = tiny_t5.tokenizer("", return_tensors="pt", padding="max_length", max_length=300)
    rows = tiny_t5.model(**padded).last_hidden_state
    ((cond, extra),), notice = encode("ignored", unconditional="null caption", width=64)
    assert same(cond, rows) and notice == "null caption: 300 rows" and extra["width"] == 64
    positive, _ = encode("a red fox in the snow")
    cut = encode("", unconditional="null caption", positive=positive)[0][0][0]
    assert same(cut, rows[:, : positive[0][0].shape[1]])
    # Nothing stays masked.
    assert same(encode("a red fox")[0][0][0], expected(tiny_t5.model, tiny_t5.tokenizer, "a red fox"))


def test_the_null_caption_takes_the_mask_of_a_batch_of_positives(encode):
    positive, _ = encode("a fox\ntwo small cats on a roof", one_prompt_per_line=True)
    ((cond, extra),), _ = encode("", unconditional="null caption", positive=positive)
    assert cond.shape == positive[0][0].shape
    assert extra["attention_mask"].equal(positive[0][1]["attention_mask"])


def test_the_null_caption_of_alpha_is_the_checkpoints_table_cut_to_the_positive(encode, load_model):
    model, table = load_model("alpha.safetensors"), random_weights(ALPHA, seed=1)["y_embedder.y_embedding"]
    null = {"family": "alpha", "unconditional": "null caption"}
    assert encode("", **null, model=model)[0][0][0].equal(table[None])
    positive, _ = encode("a red fox")
    assert encode("", **null, model=model, positive=positive)[0][0][0].equal(table[None, :6])


def test_a_file_without_a_null_caption_is_not_given_another_one(comfy, encode, load_model):
    folder = comfy.folder("diffusion_models") / "no-null"
    save_diffusers(random_weights(ALPHA), ALPHA, folder, "alpha", "random weights for a test")
    (folder / NULL_CAPTION_FILE).unlink()
    model = load_model("no-null", family="alpha", base_size="256")
    with pytest.raises(ValueError, match="carries no null caption"):
        encode("", family="alpha", unconditional="null caption", model=model)


def test_the_null_caption_of_alpha_without_a_model_says_what_to_connect(encode):
    with pytest.raises(ValueError, match="connect `model`"):
        encode("", family="alpha", unconditional="null caption")


def test_another_kind_of_clip_is_refused_by_name(encode):
    stranger = SimpleNamespace(tokenize=lambda text: {"g": [[(1, 1.0)]], "l": [[(1, 1.0)]]})
    for unconditional in ("prompt", "null caption"):
        with pytest.raises(ValueError, match="makes tokens for g, l.*PixArtLoadT5"):
            encode("a", stranger, unconditional=unconditional)


def test_hooks_of_the_clip_reach_the_conditioning(encode, tiny_t5, load_model):
    clip = tiny_t5.clip.clone()
    clip.apply_hooks_to_conds = hooks = object()
    assert encode("a", clip)[0][0][1]["hooks"] is hooks
    null = {"family": "alpha", "unconditional": "null caption", "model": load_model("alpha.safetensors")}
    assert encode("a", clip, **null)[0][0][1]["hooks"] is hooks


@pytest.mark.parametrize("unconditional", ["prompt", "null caption"])
@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_an_empty_clip_says_where_it_comes_from(encode, sigma, family, unconditional):
    with pytest.raises(ValueError, match="got no text encoder: the checkpoint .* Connect PixArt Load T5"):
        encode("x", clip=None, family=family, unconditional=unconditional, model=sigma)
