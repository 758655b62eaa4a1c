"""What stays the same from step to step of a sampling run, computed once."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

KEY = "pixart_memo"


def call(function, *args):
    """The memo that remembers nothing."""
    return function(*args)


class Memo:
    """memo(function, x, ...) is function(x, ...), remembered for as long as the tensor x lives, or the memo itself.

    Made for one sampling run and handed down in transformer_options[KEY]. x is recognised by identity, and the
    results made of it go when it goes. Nothing is remembered while gradients are recorded, because weights are about
    to change then, nor in compiled code.
    """

    def __init__(self):
        self.of_tensors = WeakTensorKeyDictionary()
        self.of_values = {}

    def __call__(self, function, x, *args):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return function(x, *args)
        known, key = (self.of_values, (function, x, *args))
        if isinstance(x, Tensor):
            known, key = self.of_tensors.setdefault(x, {}), (function, *args)
        if key not in known:
            known[key] = function(x, *args)
        return known[key]


def memo_of(transformer_options):
    """The memo of this sampling run, `call` outside of one."""
    return transformer_options.get(KEY, call)
