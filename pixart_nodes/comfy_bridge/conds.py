"""Prompt conditioning as ComfyUI batches it: prompts of different length side by side, told apart by a mask.

Letters: B batch, L caption tokens, D caption width.
"""

import comfy.conds
import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_BATCHES = 16  # that a condition remembers: more only where somebody makes new conditions at every step


class CONDSteady(comfy.conds.CONDRegular):
    """A condition that gives the network the same tensor at every step of a run, so that its memo recognises it.

    keep=False: a new tensor each time, for those who may change it in place, such as a MODEL's function wrapper.
    """

    def __init__(self, cond, keep: bool = True):
        super().__init__(cond)
        self.keep = keep
        self.repeated = {}  # batch size -> condition
        self.joined = {}  # ids of others -> (others, the batch made of this and them)

    def _copy_with(self, cond):
        return type(self)(cond, self.keep)

    def process_cond(self, batch_size, **kwargs):
        if batch_size not in self.repeated:
            self.repeated[batch_size] = super().process_cond(batch_size, **kwargs)
        return self.repeated[batch_size]

    def concat(self, others):
        tensors = [self.cond, *(other.cond for other in others)]
        if not self.keep:
            return self.join(tensors)
        key = tuple(map(id, others))  # regions meet the same negative prompt in several batches
        if key not in self.joined:
            if len(self.joined) == MOST_BATCHES:
                self.joined.clear()
            self.joined[key] = others, self.join(tensors)
        return self.joined[key][1]

    def join(self, tensors: list[Tensor]):
        return torch.cat(tensors)


class CONDCaption(CONDSteady):
    """T5 features (B, L, D). Others of another length join the batch, padded with zeros to `joint_length`."""

    def can_concat(self, other):
        return self.cond.shape[::2] == other.cond.shape[::2] and self.cond.device == other.cond.device

    def join(self, tensors):
        return super().join([to_length(t, joint_length(tensors)) for t in tensors])


class CONDCaptionMask(CONDSteady):
    """The mask (B, L) that goes with a CONDCaption, int64 because ComfyUI casts all else; non-zero = keep.

    Becomes None where nothing is masked, so that attention may take its fastest path.
    """

    def can_concat(self, other):
        return self.cond.shape[0] == other.cond.shape[0]

    def join(self, tensors):
        mask = super().join([to_length(t, joint_length(tensors)) for t in tensors])
        return None if bool(mask.all()) else mask


def joint_length(tensors: list[Tensor]) -> int:
    """The longest. Where lengths differ there will be a mask, so a `mask_length`."""
    lengths = {t.shape[1] for t in tensors}
    return lengths.pop() if len(lengths) == 1 else mask_length(max(lengths))


def mask_length(length: int) -> int:
    """The next multiple of 8: attention on GPUs copies a mask of another length, in every block."""
    return -(-length // 8) * 8


def to_length(x: Tensor, length: int) -> Tensor:
    """Cuts (B, L, ...) or fills it with zeros."""
    return pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))


def caption_and_mask(caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Caption (B, L, D) and mask (b, L) -> the same without the tokens that no sample keeps, mask int64.

    A sample that keeps nothing is told to attend to everything, as the original's dense mask does. Tokens behind the
    mask's end, which ConditioningConcat adds, are kept. A caption without tokens becomes one zero token. The result is
    on the caption's device.
    """
    if caption.shape[1] == 0:
        caption = caption.new_zeros(caption.shape[0], 1, caption.shape[2])
        mask = None
    if mask is None:
        return caption, torch.ones(caption.shape[:2], dtype=torch.int64, device=caption.device)
    mask = mask.detach().cpu().reshape(-1, mask.shape[-1]) != 0
    mask = pad(mask, (0, caption.shape[1] - mask.shape[1]), value=True)
    mask = comfy.utils.repeat_to_batch_size(mask, caption.shape[0])
    mask = mask | ~mask.any(dim=1, keepdim=True)
    length = int(mask.any(dim=0).nonzero().max()) + 1
    if not mask[:, :length].all():
        length = mask_length(length)
    return to_length(caption, length), to_length(mask.long(), length).to(caption.device)
