"""Small random T5 encoders, written as they are found in the wild, and what transformers makes of them."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

WORDS = "a the red blue fox cat dog in on snow roof and with of two three small large".split()


def config(**changes):
    sizes = {"vocab_size": 32128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return T5Config(**sizes | {"feed_forward_proj": "gated-gelu"} | changes)


def random_model(config, seed=0, cls=T5EncoderModel):
    torch.manual_seed(seed)
    model = cls(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def small_tokenizer():
    """A Unigram tokenizer as T5 has it, over a few words and all ASCII letters."""
    letters = [chr(n) for n in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -5.0)]
    vocab += [(letter, -8.0) for letter in letters] + [(f"▁{word}", -2.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_bin_shards(model, folder):
    """As the official t5-v1_1-xxl folder: two .bin shards and their index."""
    state = model.state_dict()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    halves = [dict(list(state.items())[n::2]) for n in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, folder / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@torch.inference_mode()
def expected(model, tokenizer, text, limit=300):
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit).input_ids
    return model(ids).last_hidden_state


def same(a, b, tolerance=1e-4):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance
