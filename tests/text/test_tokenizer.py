"""Tokenizer files: tokenizer.json and spiece.model."""

import io

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pixart_nodes.text.tokenizer import T5Pieces, choose_tokenizer


@pytest.fixture
def unigram(tmp_path):
    """Writes a T5-like tokenizer.json and gives its path."""

    def write(name="tokenizer.json", end=True, words=("▁a", "▁red", "▁fox")):
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), *((word, -2.0) for word in words)]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
        if end:
            tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.enable_truncation(max_length=4)
        tokenizer.enable_padding(length=4)
        tokenizer.save(str(tmp_path / name))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("end", [True, False])
def test_ids_end_with_one_end_token_and_are_neither_cut_nor_padded(unigram, end):
    pieces = T5Pieces(unigram(end=end))
    assert pieces("a red fox a red fox")["input_ids"] == [4, 5, 6, 4, 5, 6, 1]
    assert pieces("")["input_ids"] == [1]


def test_a_sentencepiece_model_gives_the_same_kind_of_ids(tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    text = ["a red fox in the snow", "a blue cat on the roof", "the fox and the cat"] * 20
    trainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    pieces = T5Pieces(str(tmp_path / "spiece.model"))
    ids = pieces("the red cat")["input_ids"]
    assert ids[-1] == 1 and ids.count(1) == 1
    assert pieces.decode(ids) == "the red cat"
    assert pieces("")["input_ids"] == [1]


def test_the_first_tokenizer_that_fits_the_vocabulary_is_chosen(unigram):
    large = unigram("large.json", words=[f"▁w{n}" for n in range(50)])
    small = unigram("small.json")
    assert choose_tokenizer([large, small], large, 7, 1, "tiny").path == small
    assert choose_tokenizer([], large, 100, 1, "tiny").path == large


def test_a_tokenizer_without_an_end_token_is_another_models(unigram, tmp_path):
    bert = Tokenizer(models.WordPiece({"[PAD]": 0, "[unused0]": 1, "[UNK]": 2, "fox": 3}, unk_token="[UNK]"))
    bert.save(str(tmp_path / "bert.json"))
    small = unigram("small.json")
    assert choose_tokenizer([str(tmp_path / "bert.json")], small, 7, 1, "tiny").path == small


def test_no_fitting_tokenizer_is_an_error_that_says_what_to_do(unigram):
    large = unigram("large.json", words=[f"▁w{n}" for n in range(50)])
    with pytest.raises(ValueError, match="tiny has a vocabulary of 7 tokens.*own tokenizer.json"):
        choose_tokenizer([], large, 7, 1, "tiny")


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        T5Pieces(str(tmp_path / "tokenizer.json"))
