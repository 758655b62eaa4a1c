"""T5 tokenizers: tokenizer.json or spiece.model, behind the few methods that ComfyUI's SDTokenizer calls."""

import os


class T5Pieces:
    """Text -> ids that end with `</s>`. No truncation and no padding, whatever the file asks for."""

    def __init__(self, path: str):
        self.path = path
        if path.endswith(".json"):
            from tokenizers import Tokenizer

            try:
                self.backend = Tokenizer.from_file(path)
            except Exception as error:  # what the library raises has no class of its own
                raise ValueError(f"{path} is damaged ({error}). Download it again, or remove it.") from error
            self.backend.no_truncation()
            self.backend.no_padding()
            self.vocab = self.backend.get_vocab()
        else:
            from sentencepiece import SentencePieceProcessor

            try:
                self.backend = SentencePieceProcessor(model_file=path)
            except (RuntimeError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}). Download it again, or remove it.") from error
            self.vocab = {self.backend.id_to_piece(n): n for n in range(self.backend.get_piece_size())}
        self.eos = self.vocab.get("</s>", 1)

    def from_pretrained(self, path):
        """SDTokenizer is given a class that reads `path`; given us, it gets what has been read already."""
        return self

    def __call__(self, text):
        ids = self.backend.encode(text)
        ids = list(getattr(ids, "ids", ids))
        return {"input_ids": ids if ids[-1:] == [self.eos] else [*ids, self.eos]}

    def decode(self, ids, skip_special_tokens=True):
        return self.backend.decode([n for n in ids if n != self.eos] if skip_special_tokens else list(ids))

    def get_vocab(self):
        return self.vocab


def choose_tokenizer(candidates, default: str, vocab_size: int, eos: int, where: str) -> T5Pieces:
    """The tokenizer of the first of `candidates` (paths) whose ids fit an encoder of `vocab_size` rows, else `default`.

    Raises ValueError when not even `default`, the tokenizer of the released T5 models, fits.
    """
    for path in [*candidates, default]:
        pieces = T5Pieces(path)
        if max(pieces.vocab.values()) < vocab_size and pieces.vocab.get("</s>") == eos:
            return pieces
    found = os.path.basename(candidates[0]) if candidates else "no tokenizer"
    raise ValueError(
        f"{where} has a vocabulary of {vocab_size} tokens, but {found} lies beside it, and the tokenizer of the "
        "released T5 models does not fit. Put its own tokenizer.json or spiece.model into the same folder."
    )
