"""Prompt conditioning as ComfyUI batches it: prompts of different length side by side, told apart by a mask.

Letters: B batch, L caption tokens, D caption width.
"""

import comfy.conds
import comfy.utils
import torch
from torch import Tensor
from torch.nn.functional import pad


class CONDCaption(comfy.conds.CONDRegular):
    """T5 features (B, L, D). Others of another length join the batch: all are padded with zeros to the longest."""

    def can_concat(self, other):
        return self.cond.shape[::2] == other.cond.shape[::2] and self.cond.device == other.cond.device

    def concat(self, others):
        conds = [self.cond] + [other.cond for other in others]
        longest = max(c.shape[1] for c in conds)
        return torch.cat([pad(c, (0, 0, 0, longest - c.shape[1])) for c in conds])


class CONDCaptionMask(comfy.conds.CONDRegular):
    """The mask (B, L) that goes with a CONDCaption, int64 because ComfyUI casts all else; non-zero = keep.

    Becomes None where nothing is masked, so that attention may take its fastest path.
    """

    def can_concat(self, other):
        return self.cond.shape[0] == other.cond.shape[0]

    def concat(self, others):
        masks = [self.cond] + [other.cond for other in others]
        longest = max(m.shape[1] for m in masks)
        mask = torch.cat([pad(m, (0, longest - m.shape[1])) for m in masks])
        return None if bool(mask.all()) else mask


def caption_and_mask(caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Caption (B, L, D) and mask (b, L) -> the same without the tokens that no sample keeps, mask int64 on the CPU.

    A sample that keeps nothing is told to attend to everything, as the original's dense mask does. A caption without
    tokens becomes one zero token.
    """
    if caption.shape[1] == 0:
        caption = caption.new_zeros(caption.shape[0], 1, caption.shape[2])
        mask = None
    if mask is None:
        return caption, torch.ones(caption.shape[:2], dtype=torch.int64)
    mask = mask.detach().cpu().reshape(-1, mask.shape[-1]) != 0
    mask = comfy.utils.repeat_to_batch_size(mask, caption.shape[0])
    length = caption.shape[1]
    mask = pad(mask, (0, length - mask.shape[1])) if mask.shape[1] < length else mask[:, :length]
    mask = mask | ~mask.any(dim=1, keepdim=True)
    last = int(mask.any(dim=0).nonzero().max()) + 1
    return caption[:, :last], mask[:, :last].long()
