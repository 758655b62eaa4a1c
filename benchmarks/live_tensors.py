"""How many bytes of tensors live at once: exact, on any device, meta tensors included."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tree):
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class LiveTensors(TorchDispatchMode):
    """with LiveTensors() as live: ...; live.peak is the most bytes that tensors made inside held at one time.

    Counts storages, so views are free. What a kernel allocates for itself while it runs is not seen.
    """

    def __enter__(self):
        self.sizes, self.bytes, self.peak = {}, 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self._count(storage)
        return out

    def _count(self, storage):
        self.sizes[storage._cdata] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key):
        self.bytes -= self.sizes.pop(key, 0)
