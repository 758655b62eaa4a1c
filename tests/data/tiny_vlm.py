"""Random vision language models of a few thousand weights, saved as they are found on a hub."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

WORDS = "describe this image and its style in a very detailed manner red blue fox cat snow roof USER ASSISTANT".split()
SIDE, PATCH = 32, 8
CHAT = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT{% endif %}"
)


def vocabulary(*special):
    return {word: number for number, word in enumerate([*special, *WORDS, ".", ","])}


def randomise(model):
    """Weights that are large enough for the picture to matter."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.6)


def save_llava(folder):
    """A decoder that is asked in a chat and repeats the question."""
    torch.manual_seed(0)
    vocab = vocabulary("<pad>", "</s>", "<unk>", "<image>")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab["<image>"])
    model = LlavaForConditionalGeneration(config)
    randomise(model)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def save_blip(folder):
    """A captioner without a chat: it goes on where the text ends."""
    torch.manual_seed(1)
    vocab = vocabulary("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
    text = {"vocab_size": len(vocab), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": vocab["[DEC]"], "pad_token_id": 0,
            "eos_token_id": vocab["[SEP]"], "sep_token_id": vocab["[SEP]"], "projection_dim": 16}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text, projection_dim=16))
    randomise(model)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        additional_special_tokens=["[DEC]", "[MASK]"],
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    BlipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
