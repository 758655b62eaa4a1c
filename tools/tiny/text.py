"""The tiny family's T5: a vocabulary from scene captions, and an encoder that learns to say what is where.

The encoder is pre-trained by grounding: from its output a small reader, thrown away afterwards, has to tell for each
of the nine positions which shape, colour and size the caption puts there, and what the background is.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .captions import caption
from .scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, sample_scene

VOCABULARY = 1024
MAX_TOKENS = 120  # alpha's limit
STYLES = ("dense", "short", "class")
STYLE_WEIGHTS = (0.75, 0.2, 0.05)
LEARNING_RATE = 1e-3
CLUTTERED = 0.15
CLUTTER = (
    "a photo of", "photo", "an illustration of", "a minimalist poster of", "vector art,", "a painting of", "a sketch of",
    "children's drawing:", "a simple icon set,", "beautiful", "high quality", "best quality, sharp", "4k", "clean design",
    "digital art of", "a 3d render of", "please draw", "generate", "i want", "abstract", "geometric shapes", "paper cut",
    "screen print:", "a logo with", "modern, bold colours", "detailed", "masterpiece", "a postcard showing", "clip art of",
)  # fmt: skip


def make_config() -> T5Config:
    """T5 v1.1 (gated GELU), small enough for two CPU cores."""
    return T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, num_heads=4, num_layers=4, d_ff=256, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_gated_act=True, tie_word_embeddings=False, is_encoder_decoder=False,
        use_cache=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def sample_caption(rng: np.random.Generator, **scene_options) -> tuple[Scene, str]:
    """A scene and one of the ways to say it; class captions name a single object."""
    style = STYLES[rng.choice(len(STYLES), p=STYLE_WEIGHTS)]
    if style == "class":
        scene_options["max_objects"] = 1
    scene = sample_scene(rng, **scene_options)
    return scene, clutter(rng, caption(scene, rng, style=style))


def clutter(rng: np.random.Generator, text: str) -> str:
    """Sometimes the words around a prompt that say nothing about the scene, as people write them."""
    if rng.random() < CLUTTERED:
        word = CLUTTER[rng.integers(len(CLUTTER))]
        text = f"{word} {text}" if rng.random() < 0.6 else f"{text.rstrip('.')}, {word}"
    return text


def train_tokenizer(seed: int = 0, captions: int = 60_000) -> PreTrainedTokenizerFast:
    """A byte-pair vocabulary, lower-cased, with T5's special tokens: <pad> 0, </s> 1, <unk> 2.

    Byte pairs and not T5's unigrams: on a few hundred different words a unigram trainer finds letters only.
    """
    rng = np.random.default_rng(seed)
    alphabet = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((sample_caption(rng)[1] for _ in range(captions)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


class SceneReader(nn.Module):
    """Ten questions (nine positions, the background) that attend to the caption and are answered by classifiers."""

    def __init__(self, width: int):
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(POSITIONS) + 1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        answers = {"shape": 1 + len(SHAPES), "colour": 1 + len(COLOURS), "size": 1 + len(SIZES)}
        self.cell = nn.ModuleDict({name: nn.Linear(width, count) for name, count in answers.items()})
        scenery = {"background": len(BACKGROUNDS), "texture": len(TEXTURES)}
        self.scenery = nn.ModuleDict({name: nn.Linear(width, count) for name, count in scenery.items()})

    def forward(self, context: Tensor, mask: Tensor) -> dict[str, Tensor]:     # context (B, L, D)
        questions = self.questions.expand(context.shape[0], -1, -1)
        x, _ = self.attention(questions, context, context, key_padding_mask=~mask, need_weights=False)
        x = x + self.mlp(self.norm(x))
        answers = {name: head(x[:, :-1]).transpose(1, 2) for name, head in self.cell.items()}
        return answers | {name: head(x[:, -1]) for name, head in self.scenery.items()}


def answers(scenes: list[Scene]) -> dict[str, Tensor]:
    """The right answers: per position 0 (nothing) or 1 + index, (B, 9); per scene an index, (B,)."""
    table = {name: torch.zeros(len(scenes), len(POSITIONS), dtype=torch.long) for name in ("shape", "colour", "size")}
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            cell = POSITIONS.index(item.position)
            table["shape"][row, cell] = 1 + SHAPES.index(item.shape)
            table["colour"][row, cell] = 1 + list(COLOURS).index(item.colour)
            table["size"][row, cell] = 1 + list(SIZES).index(item.size)
    table["background"] = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
    table["texture"] = torch.tensor([TEXTURES.index(scene.texture) for scene in scenes])
    return table


def tokenize(tokenizer, captions: list[str], length: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, length)."""
    out = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return out["input_ids"], out["attention_mask"].bool()


def reading_loss(guess: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy; most positions are empty, and would drown the objects if they counted as much."""
    weight = torch.ones(guess.shape[1])
    if guess.ndim == 3:
        weight[0] = 0.2
    return nn.functional.cross_entropy(guess, truth, weight)


def objects_read(guesses: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Share of the scenes' objects whose shape and colour are both read at the right position."""
    here = truth["shape"] > 0
    right = (guesses["shape"].argmax(1) == truth["shape"]) & (guesses["colour"].argmax(1) == truth["colour"])
    return (right & here).sum().item() / here.sum().item()


def train_encoder(tokenizer, *, steps: int, batch: int = 64, length: int = 64, seed: int = 0, report=print):
    """Train encoder and reader from scratch, scenes growing from one object to three; returns the encoder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    encoder = T5EncoderModel(make_config())
    reader = SceneReader(encoder.config.d_model)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)

    @torch.compile
    def read(ids, mask):
        return reader(encoder(ids, attention_mask=mask).last_hidden_state, mask)

    for step in range(steps):
        objects = 1 + min(2, int(step / steps * 8))  # one in the first eighth, two in the second
        pairs = [sample_caption(rng, max_objects=objects) for _ in range(batch)]
        ids, mask = tokenize(tokenizer, [text for _, text in pairs], length)
        guesses = read(ids, mask)
        truth = answers([scene for scene, _ in pairs])
        loss = sum(reading_loss(guesses[name], truth[name]) for name in truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            report({"step": step, "loss": round(loss.item(), 4), "objects_read": round(objects_read(guesses, truth), 3)})
    return encoder.eval()
