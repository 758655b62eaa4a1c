"""From ControlNetHED.pth to the edge detector."""

from pathlib import Path

from torch import nn

from ..model.hed import HED
from . import files
from .foreign import LOOKALIKES, OTHERS, describe
from .keys import find_layout, shortened


def load_hed(path, *, operations=nn, device=None) -> HED:
    """The detector from `ControlNetHED.pth` (huggingface.co/PixArt-alpha/PixArt-alpha) or a safetensors copy, in fp32.

    Raises ValueError and FileNotFoundError that say what the file is instead, or what is wrong with it.
    """
    path = Path(path)
    tensors, _ = files.load_file_tensors(path)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    expected = HED(device="meta").state_dict()
    if not expected.keys() & tensors.keys():
        foreign = "a PixArt transformer: load it with PixArtLoadModel" if find_layout(tensors) else None
        foreign = foreign or describe(tensors, LOOKALIKES + OTHERS) or f"tensors named {shortened(tensors)}"
        raise ValueError(f"{path.name} is no HED edge detector but {foreign}. Choose ControlNetHED.pth.")
    missing = expected.keys() - tensors.keys()
    unknown = tensors.keys() - expected.keys()
    if missing or unknown:
        what = f"lacks {shortened(sorted(missing))}" if missing else f"also holds {shortened(sorted(unknown))}"
        raise ValueError(f"{path.name} is not the HED detector of ControlNet: it {what}. Choose ControlNetHED.pth.")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"{path.name} is not the HED detector of ControlNet: {name} is {shapes}.")
    model = HED(operations=operations, device="meta")
    model.load_state_dict({name: tensor.float().to(device) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
