"""T5 that encodes and leaves: a CLIP that reads its weights from disk when a prompt needs them, and encodings kept.

Encodings are keyed by a hash of what they depend on (the encoder's files, dtype, tokens and weights), so they outlive
the node that made them: a prompt that was encoded before never loads T5 again. They stay in system memory, bounded.
"""

import contextlib
import functools
import hashlib
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable

import comfy.sampler_helpers
import comfy.sd
import torch

from .quantize import plain_state_dict

CACHE_BYTES = 256 * 2**20  # about 50 prompts of 300 tokens, or 400 of 40, of T5-XXL


class TextCache:
    """key -> {"cond": (1, L, D), ...} in system memory; beyond `limit` bytes the longest unused go first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.entries: OrderedDict[str, dict] = OrderedDict()

    def get(self, key: str) -> dict | None:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return {name: copied(value) for name, value in self.entries[key].items()}

    def put(self, key: str, encoding: dict):
        self.entries[key] = {name: copied(value) for name, value in encoding.items()}
        while self.entries and self.nbytes > self.limit:
            self.entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        tensors = (value for entry in self.entries.values() for value in entry.values())
        return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


ENCODINGS = TextCache(CACHE_BYTES)
LEAVING: weakref.WeakSet = weakref.WeakSet()  # loaded encoders that leave when sampling starts


def copied(value):
    """Tensors in system memory, apart from those of others: nodes may change what they are given."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def digest(*values) -> str:
    """A hash of nested lists, dicts, tensors and plain values by content."""
    hasher = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            add((str(value.dtype), tuple(value.shape)))
            hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            add(sorted(value.items()))
        elif isinstance(value, (list, tuple)):
            hasher.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            hasher.update(f"{type(value).__name__}:{value!r};".encode())

    add(values)
    return hasher.hexdigest()


def file_state(paths) -> list:
    """What tells that a file is still the same one: path, size and time of change."""
    return [(path, status.st_size, status.st_mtime_ns) for path in paths for status in [os.stat(path)]]


class T5Clip(comfy.sd.CLIP):
    """ComfyUI's CLIP around a T5 that `load` reads from disk, as often as needed, but no earlier when `leave` is set.

    `identity` is what its weights depend on; `identify` says it anew whenever they are read, for files change. Clones,
    which is what nodes patch, have no identity: they are loaded, stay loaded in ComfyUI's memory management, and do not
    use the cache.
    """

    masks_pads = False

    def __init__(self, load: Callable[[], comfy.sd.CLIP], tokenizer, identify: Callable[[], str], leave: bool):
        super().__init__(no_init=True)
        self.tokenizer, self.tokenizer_options = tokenizer, {}
        self.layer_idx = self.apply_hooks_to_conds = None
        self.use_clip_schedule = False
        self.load, self.identify, self.identity, self.leave = load, identify, identify(), leave
        if not leave:
            self.materialize()

    @property
    def is_loaded(self) -> bool:
        return "cond_stage_model" in vars(self)

    def __getattr__(self, name):
        # Not `patcher`: ComfyUI asks all outputs for it, to count what is loaded.
        if name == "cond_stage_model":
            self.materialize()
            return self.cond_stage_model
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r} (T5 may not be loaded)")

    def materialize(self):
        if not self.is_loaded:
            self.identity = self.identify()
            clip = self.load()
            self.cond_stage_model, self.patcher = clip.cond_stage_model, clip.patcher
            if self.leave:
                LEAVING.add(self)
                make_room_before_sampling()

    def drop(self):
        """Gives the weights back, on every device. The next new prompt reads them again."""
        if self.is_loaded:
            del self.cond_stage_model, self.patcher

    @contextlib.contextmanager
    def masking_pads(self):
        self.masks_pads = True
        try:
            yield
        finally:
            self.masks_pads = False

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        if self.identity is None:
            return super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        asked = self.layer_idx, self.masks_pads, return_pooled, tokens
        found = ENCODINGS.get(digest(self.identity, *asked))
        if found is None:
            with attention_masks(self.cond_stage_model, self.masks_pads):
                found = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=True)
            ENCODINGS.put(digest(self.identity, *asked), found)  # reading the weights may have changed the identity
        if return_dict:
            return found
        return (found["cond"], found["pooled_output"]) if return_pooled else found["cond"]

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
        if self.identity is None:
            return super().encode_from_tokens_scheduled(tokens, unprojected, add_dict or {}, show_pbar)
        encoding = self.encode_from_tokens(tokens, "unprojected" if unprojected else True, return_dict=True)
        return [[encoding.pop("cond"), encoding | (add_dict or {})]]

    def clone(self, *args, **options):
        self.materialize()
        clone = super().clone(*args, **options)  # ComfyUI makes a plain CLIP
        clone.__class__ = T5Clip
        clone.load, clone.identify, clone.identity, clone.leave = None, None, None, False
        return clone

    def load_model(self, *args, **options):
        self.materialize()
        return super().load_model(*args, **options)

    def get_key_patches(self):
        self.materialize()
        return super().get_key_patches()

    def get_sd(self):
        """What ComfyUI's save nodes write: quantised weights as plain ones, so that every loader reads the file."""
        return plain_state_dict(super().get_sd(), self.cond_stage_model)

    def state_dict_for_saving(self):
        """The same in later versions of ComfyUI, which patch weights as they are written."""
        self.materialize()
        return plain_state_dict(super().state_dict_for_saving(), self.cond_stage_model)

    def is_dynamic(self) -> bool:
        """What later versions of ComfyUI ask of every output when memory is short; a T5 that has left is not."""
        return self.is_loaded and hasattr(self.patcher, "is_dynamic") and self.patcher.is_dynamic()

    def get_ram_usage(self) -> int:
        return self.patcher.model_size() if self.is_loaded else 0


@contextlib.contextmanager
def attention_masks(model, enabled: bool = True):
    """Lets T5 mask pads; ComfyUI's PixArt encoder does not, because its prompts have none."""
    encoder = getattr(model, model.clip)
    before, encoder.enable_attention_masks = encoder.enable_attention_masks, enabled
    try:
        yield
    finally:
        encoder.enable_attention_masks = before


def make_room():
    """Encoders that were told to leave do so now."""
    for clip in list(LEAVING):
        clip.drop()
    LEAVING.clear()


@functools.cache  # once in a process
def make_room_before_sampling():
    """Wraps ComfyUI's preparation of sampling, which loads the model. ComfyUI's own wrappers belong to one MODEL each,
    and which one comes next, of which loader, is not known here.
    """
    prepare = comfy.sampler_helpers.prepare_sampling

    @functools.wraps(prepare)
    def make_room_and_prepare(*args, **kwargs):
        make_room()
        return prepare(*args, **kwargs)

    comfy.sampler_helpers.prepare_sampling = make_room_and_prepare
