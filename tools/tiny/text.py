"""The tiny family's T5: a vocabulary from scene captions, and an encoder that learns to say what is where.

The encoder is pre-trained by grounding: from its output a small reader, thrown away afterwards, has to tell for each
of the nine positions which shape, colour and size the caption puts there, and what the background is.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .captions import NOBODY, owned_caption
from .scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, sample_scene

VOCABULARY = 1024
MAX_TOKENS = 120  # alpha's limit
STYLES = ("dense", "short", "class")
STYLE_WEIGHTS = (0.75, 0.2, 0.05)
LEARNING_RATE = 1e-3
CLUTTERED = 0.15
CLUTTER = (
    "a photo of", "photo", "an illustration of", "a minimalist poster of", "vector art,", "a painting of",
    "a sketch of", "children's drawing:", "a simple icon set,", "beautiful", "high quality", "best quality, sharp",
    "4k", "clean design", "digital art of", "a 3d render of", "please draw", "generate", "i want", "abstract",
    "geometric shapes", "paper cut", "screen print:", "a logo with", "modern, bold colours", "detailed",
    "masterpiece", "a postcard showing", "clip art of",
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
    return sample_owned_caption(rng, **scene_options)[:2]


def sample_owned_caption(rng: np.random.Generator, **scene_options) -> tuple[Scene, str, list[int]]:
    """The same, with the owner of each character (captions.owned_caption)."""
    style = STYLES[rng.choice(len(STYLES), p=STYLE_WEIGHTS)]
    if style == "class":
        scene_options["max_objects"] = 1
    scene = sample_scene(rng, **scene_options)
    text, owners = owned_caption(scene, rng, style=style)
    if rng.random() < CLUTTERED:  # words around a prompt that say nothing about the scene, as people write them
        word = CLUTTER[rng.integers(len(CLUTTER))]
        if rng.random() < 0.6:
            text, owners = f"{word} {text}", [NOBODY] * (len(word) + 1) + owners
        else:
            text, owners = f"{text.rstrip('.')}, {word}", owners + [NOBODY] * (len(word) + 2)
    return scene, text, owners


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


class TokenReader(nn.Module):
    """What every token has to know: the object that it speaks of (or the background), all of it."""

    def __init__(self, width: int):
        super().__init__()
        counts = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "cell": len(POSITIONS)}
        counts |= {"background": len(BACKGROUNDS), "texture": len(TEXTURES)}
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in counts.items()})

    def loss(self, context: Tensor, owner: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """context (B, L, D); owner (B, L) in 0..NOBODY; truth from `answers`."""
        cells = owner.clamp(max=len(POSITIONS) - 1)
        truth = {n: truth[n].gather(1, cells) - 1 for n in ("shape", "colour", "size")} | {
            "cell": cells, **{n: truth[n][:, None].expand_as(owner) for n in ("background", "texture")},
        }  # fmt: skip
        total = context.new_zeros(())
        for name, head in self.heads.items():
            speaks = owner == NOBODY - 1 if name in ("background", "texture") else owner < NOBODY - 1
            total = total + nn.functional.cross_entropy(head(context[speaks]), truth[name][speaks])
        return total


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


def owned_batches(rng: np.random.Generator, tokenizer, batch: int, objects: int):
    """Four batches of similar caption lengths: (ids, mask, owner), each (B, L), and the scenes' answers."""
    samples = [sample_owned_caption(rng, max_objects=objects) for _ in range(4 * batch)]
    coded = tokenizer([text for _, text, _ in samples], return_offsets_mapping=True, truncation=True)
    order = np.argsort([len(ids) for ids in coded["input_ids"]], kind="stable").reshape(4, batch)
    for rows in rng.permutation(order):
        length = max(len(coded["input_ids"][row]) for row in rows)
        ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.bool)
        owner = torch.full((batch, length), NOBODY)
        for line, row in enumerate(rows):
            tokens, offsets, owners = coded["input_ids"][row], coded["offset_mapping"][row], samples[row][2]
            ids[line, : len(tokens)], mask[line, : len(tokens)] = torch.tensor(tokens), True
            owner[line, : len(tokens) - 1] = torch.tensor([owners[end - 1] for _, end in offsets[:-1]])
        yield ids, mask, owner, answers([samples[row][0] for row in rows])


def train_encoder(tokenizer, *, steps: int, batch: int = 64, seed: int = 0, report=print):
    """Train encoder and readers from scratch, scenes growing from one object to three; returns the encoder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    encoder = T5EncoderModel(make_config())
    reader, token_reader = SceneReader(encoder.config.d_model), TokenReader(encoder.config.d_model)
    parameters = [*encoder.parameters(), *reader.parameters(), *token_reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    batches = iter(())
    for step in range(steps):
        data = next(batches, None)
        if data is None:
            objects = 1 + min(2, int(step / steps * 8))  # one in the first eighth, two in the second
            batches = owned_batches(rng, tokenizer, batch, objects)
            data = next(batches)
        ids, mask, owner, truth = data
        context = encoder(ids, attention_mask=mask).last_hidden_state
        guesses = reader(context, mask)
        by_token = token_reader.loss(context, owner, truth)
        loss = by_token + sum(reading_loss(guesses[name], truth[name]) for name in truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            read = round(objects_read(guesses, truth), 3)
            report({"step": step, "loss": round(loss.item(), 3), "by_token": round(by_token.item(), 3), "read": read})
    return encoder.eval()
