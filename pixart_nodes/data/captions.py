"""Dense captions from a vision language model on disk: the auto-labelling of PixArt-alpha (section 2.4 of the paper).

Any transformers model of the kind "image-text-to-text" works: LLaVA, SmolVLM, Idefics, Qwen-VL, InternVL, BLIP, ...
"""

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from ..checkpoints.files import replacing
from .manifest import Problem, Progress, problem_lines
from .pictures import DAMAGED, decode
from .sources import SHARED, VLM_CAPTION, Entry, entries, read_caption, twins

logger = logging.getLogger(__name__)

PROMPT = "Describe this image and its style in a very detailed manner."  # the paper's question to LLaVA
KINDS = {"caption": ".txt", "VLM caption": VLM_CAPTION}  # what is written, beside the picture
EXISTING = ("keep", "replace")
HARMLESS = ("missing caption", "control")  # problems of a list that keep no picture from being described
LONGEST_SIDE = 1024  # pixels a model is shown; all of them scale down further themselves


class Captioned(NamedTuple):
    written: list[tuple[str, str]]  # (picture, caption)
    kept: int
    problems: list[Problem]

    def summary(self) -> str:
        lines = [f"{len(self.written)} captions written, {self.kept} kept as they were, {len(self.problems)} problems"]
        return "\n".join(
            [*lines, *problem_lines(self.problems), *(f"{name}: {text}" for name, text in self.written[:20])]
        )


def caption_pictures(
    source, write: Callable[[Image.Image], str], *, kind: str = "caption", existing: str = "keep",
    progress: Progress | None = None,
) -> Captioned:  # fmt: skip
    """Writes a caption beside each picture of a data set that has none of this kind.

    Each is on the disk before the next is made, so a stopped run goes on where it was. With existing "replace" those
    that are there are overwritten. Pictures that cannot be read, and empty answers, are listed.
    """
    listed = list(entries(source))
    shared = twins(entry.path for entry in listed)
    result = Captioned([], 0, [])
    for done, entry in enumerate(listed, 1):
        if entry.problem and entry.problem[0] not in HARMLESS:
            result.problems.append(Problem(entry.name, *entry.problem))
        elif existing == "keep" and has_caption(entry, kind):
            result = result._replace(kept=result.kept + 1)
        elif entry.path.with_suffix("") in shared:
            result.problems.append(Problem(entry.name, *SHARED))
        else:
            caption_one(entry, write, entry.path.with_suffix(KINDS[kind]), result)
        if progress:
            progress(done, len(listed))
    return result


def has_caption(entry: Entry, kind: str) -> bool:
    """Also where the list has one, or a file is there that cannot be read: neither is ours to replace unasked."""
    listed = entry.caption if kind == "caption" else entry.vlm_caption
    return bool(listed) or any(map(holds_text, sidecars(entry.path, kind)))


def holds_text(path: Path) -> bool:
    try:
        return bool(read_caption(path))
    except (OSError, UnicodeDecodeError):
        return True


def sidecars(path: Path, kind: str) -> list[Path]:
    return [path.with_suffix(KINDS[kind]), *([path.with_suffix(".caption")] if kind == "caption" else [])]


def caption_one(entry: Entry, write, path: Path, result: Captioned):
    try:
        image = decode(entry.path.read_bytes())
    except DAMAGED as error:
        kind = "damaged" if entry.path.exists() else "missing file"
        result.problems.append(Problem(entry.name, kind, " ".join(str(error).split())[:200]))
        return
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    caption = " ".join(write(image).split())
    if not caption:
        result.problems.append(Problem(entry.name, "missing caption", "the model had nothing to say about it"))
        return
    with replacing(path) as temporary:
        temporary.write_text(caption + "\n", encoding="utf-8")
    result.written.append((entry.name, caption))


def list_models(roots: Iterable[str]) -> list[str]:
    """Folders below `roots`, as relative paths, with the config.json of a model that sees pictures and its weights."""
    found = []
    for root in map(Path, roots):
        for config in sorted((*root.glob("*/config.json"), *root.glob("*/*/config.json"))):
            if sees_pictures(config):
                found.append(config.parent.relative_to(root).as_posix())
    return sorted(set(found))


def sees_pictures(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # unreadable, so not something to offer
        return False
    return isinstance(content, dict) and "vision_config" in content


@contextmanager
def vision_language_model(folder, device="cpu", *, prompt: str = PROMPT, max_new_tokens: int = 200):
    """Yields a function from a picture to its caption. The model is loaded when that is first called, and released
    afterwards.
    """
    loaded = []

    def describe(image: Image.Image) -> str:
        if not loaded:
            loaded.extend(load_model(Path(folder), device))
        return answer(*loaded, image, prompt, max_new_tokens)

    try:
        yield describe
    finally:
        loaded.clear()


def load_model(folder: Path, device):
    """(model, processor) from the disk alone. Raises ValueError for no complete image-text-to-text model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"{folder} is no complete image-text-to-text model ({error!r:.300}). Put a whole Hugging Face folder "
            "there: config, weights, processor and tokenizer."
        ) from error
    return model.eval().to(device), processor


def answer(model, processor, image: Image.Image, prompt: str, max_new_tokens: int) -> str:
    """What the model says about a picture, without the question. Greedy, so the same each time."""
    inputs = questions(processor, image, prompt).to(model.device)
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    asked = inputs["input_ids"]
    if output.shape[1] >= asked.shape[1] and torch.equal(output[:, : asked.shape[1]], asked):
        output = output[:, asked.shape[1] :]  # decoders repeat the question, encoder-decoders do not
    text = processor.batch_decode(output, skip_special_tokens=True)[0].strip()
    return text[len(prompt) :].lstrip(" :.") if text.lower().startswith(prompt.lower()) else text


def questions(processor, image: Image.Image, prompt: str):
    """The model's inputs: by its chat template, or picture and text as they are for models that do not chat."""
    if getattr(processor, "chat_template", None) is None:
        return processor(images=image, text=prompt, return_tensors="pt")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
