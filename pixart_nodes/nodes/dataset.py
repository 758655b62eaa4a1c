"""PixArtDataset and PixArtCaption: pictures and captions on the way to a trainer."""

import hashlib
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..comfy_bridge import features
from ..comfy_bridge.compat import build, check_interrupt, executing_node, show_text
from ..data import captions
from ..data.buckets import TRAINING_SIZES
from ..data.manifest import ScanOptions, scan
from ..data.memory import Memory
from ..data.pictures import contact_sheet, digest
from ..data.sources import entries

Dataset = io.Custom("PIXART_DATASET")

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"  # data sets of the pack, named pixart-examples/<set>
VLM_FOLDERS = ("vlm", "LLM")  # below ComfyUI's models; LLM is where other packs put such models
DEFAULTS = ScanOptions()


def input_path(text: str) -> Path:
    """A folder or list that the user named: absolute, below ComfyUI's input folder, or one of the pack's examples.

    Raises ValueError for nothing.
    """
    if not text.strip():
        raise ValueError("No data set is named: give a folder of pictures, a .jsonl or a .json list.")
    named = Path(text.strip()).expanduser()
    own = Path(folder_paths.get_input_directory(), named)
    return EXAMPLES / named.name if named.parent == Path("pixart-examples") and not own.exists() else own


def scan_memory(source: Path) -> Memory:
    """What earlier scans of this place saw of its files, kept with ComfyUI's user data."""
    name = f"{digest(str(source).encode())}.json"
    return Memory(Path(folder_paths.get_user_directory()) / "pixart_scans" / name)


def vlm_roots() -> list[str]:
    known = folder_paths.folder_names_and_paths
    places = [os.path.join(folder_paths.models_dir, name) for name in VLM_FOLDERS]
    places += [root for name in VLM_FOLDERS if name in known for root in folder_paths.get_folder_paths(name)]
    return list(dict.fromkeys(places))


def vlm_path(name: str) -> Path:
    """Raises FileNotFoundError for a name that is not in the list."""
    for root in vlm_roots():
        if name in captions.list_models([root]):
            return Path(root, name)
    raise FileNotFoundError(f"There is no model {name!r} in {' or '.join(vlm_roots())}. Put its whole folder there.")


def files_fingerprint(source) -> str:
    """Changes when a picture or caption of a data set does; nothing is opened but the lists."""
    fingerprint = hashlib.blake2b(digest_size=16)
    for entry in entries(source):
        paths = [path for path in (entry.path, entry.control) if path and os.path.exists(path)]
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        fingerprint.update(repr((entry.name, entry.caption, entry.vlm_caption, stamps)).encode())
    return fingerprint.hexdigest()


class Progress:
    """ComfyUI's progress bar, which also notices Cancel."""

    bar = None

    def __call__(self, done: int, total: int):
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)
        check_interrupt()


def shown(node, text: str, picture=None):
    """`text`, and a picture above it, for the node."""
    show_text(executing_node(), text)
    preview = {} if picture is None else ui.PreviewImage(picture[None], cls=node).as_dict()
    return {**preview, **ui.PreviewText(text).as_dict()}


class PixArtDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtDataset",
            display_name="PixArt Dataset",
            category="PixArt/training",
            description="Pictures with captions for training, sorted into PixArt's aspect buckets. The node shows a "
            "contact sheet and everything that is wrong.",
            search_aliases=["training data", "load images", "fine-tune", "buckets", "captions"],
            is_output_node=True,
            inputs=dataset_inputs(),
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="For PixArt Cache Features, or for another dataset.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **inputs):
        return files_fingerprint(input_path(folder)) if folder else None  # None: linked, or empty

    @classmethod
    def execute(cls, folder, exclude_problems, dataset=None, **settings) -> io.NodeOutput:
        source = input_path(folder)
        manifest = scan(source, ScanOptions(**settings), scan_memory(source), Progress())
        manifest = manifest if dataset is None else manifest.without(dataset)
        text = f"{source}\n{manifest.summary()}"
        sheet = contact_sheet(
            (f"{bucket.width} x {bucket.height}: {len(samples)}", [(s.path, *s.bucket[1:]) for s in samples])
            for bucket, samples in manifest.buckets().items()
        )
        blocked = None
        if manifest.problems and not exclude_problems:
            blocked = f"{len(manifest.problems)} of {len(manifest.problems) + len(manifest.samples)} pictures have "
            blocked += "problems: see PixArt Dataset. Repair them, or switch exclude_problems on to use the others."
        joined = manifest if dataset is None else manifest.joined(dataset)
        return io.NodeOutput(joined, ui=shown(cls, text, sheet), block_execution=blocked)


def dataset_inputs():
    return [
        io.String.Input(
            "folder",
            default="",
            tooltip="A folder of pictures with a .txt caption beside each, a .jsonl list or PixArt's data_info.json. "
            "A full path, or one below ComfyUI's input folder.",
        ),
        io.Combo.Input(
            "size",
            options=list(TRAINING_SIZES),
            default=DEFAULTS.size,
            tooltip="Side in pixels of a square picture, as the model was trained. Each picture goes to the nearest "
            "shape in PixArt's table of this size.",
        ),
        io.String.Input(
            "trigger_word",
            default=DEFAULTS.trigger_word,
            tooltip="Put in front of every caption that does not have it. In prompts it calls what was learnt.",
        ),
        io.Int.Input(
            "repeats",
            default=DEFAULTS.repeats,
            min=1,
            max=32767,
            tooltip="How often each picture comes per epoch. Matters where data sets are joined.",
        ),
        io.Boolean.Input(
            "exclude_problems",
            default=False,
            tooltip="Off: stop when pictures have problems, so that they can be repaired. On: use the others.",
        ),
        io.Float.Input(
            "real_caption_ratio",
            default=DEFAULTS.real_caption_ratio,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="For pictures with two captions, their own and a vision model's: how often the own one is used.",
        ),
        io.Boolean.Input(
            "caption_from_trigger",
            default=DEFAULTS.caption_from_trigger,
            tooltip="Pictures without a caption get the trigger word as theirs, instead of being a problem.",
        ),
        build(
            io.Int.Input,
            "smallest_bucket",
            default=DEFAULTS.smallest_bucket,
            min=1,
            max=4096,
            advanced=True,
            tooltip="Buckets with fewer pictures join the nearest shape; set it to your batch size. One without a "
            "near neighbour stays, and its pictures are repeated.",
        ),
        build(
            io.Float.Input,
            "max_enlargement",
            default=DEFAULTS.max_enlargement,
            min=1.0,
            max=16.0,
            step=0.1,
            advanced=True,
            tooltip="A picture that must be enlarged more than this to fill its bucket is too small.",
        ),
        build(
            io.Float.Input,
            "validation_percent",
            default=DEFAULTS.validation_percent,
            min=-1.0,
            max=50.0,
            step=1.0,
            advanced=True,
            tooltip="Part of the pictures that is kept out of training to measure the loss on. The same ones each "
            "time. -1: 2 % where there are 50 pictures or more, else none.",
        ),
        build(
            io.Combo.Input,
            "role",
            options=["train", "validation", "prior"],
            default=DEFAULTS.role,
            advanced=True,
            tooltip="train: learnt. validation: only measured. prior: for DreamBooth, what must not change.",
        ),
        Dataset.Input("dataset", optional=True, tooltip="Another data set of the same size to join this one to."),
    ]


class PixArtCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtCaption",
            display_name="PixArt Caption",
            category="PixArt/training",
            description="Writes dense captions beside pictures with a vision language model from disk, as PixArt-alpha "
            "labelled its training data. Goes on where it was stopped.",
            search_aliases=["auto caption", "label images", "vlm", "llava", "blip", "smolvlm", "qwen vl"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of pictures, a .jsonl list or PixArt's data_info.json. A full path, or one below "
                    "ComfyUI's input folder.",
                ),
                io.Combo.Input(
                    "model_name",
                    options=captions.list_models(vlm_roots()),
                    tooltip="A Hugging Face folder of an image-text-to-text model in models/vlm or models/LLM.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default=captions.PROMPT,
                    tooltip="What the model is asked. This is the question that PixArt's authors asked.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=200,
                    min=1,
                    max=2048,
                    tooltip="Longest caption in the model's tokens. alpha reads 120 of T5's tokens, Sigma 300.",
                ),
                io.Combo.Input(
                    "write",
                    options=list(captions.KINDS),
                    default="caption",
                    tooltip="caption: a.txt beside a.png. VLM caption: a.vlm.txt, which takes turns with the picture's "
                    "own caption, in the ratio that PixArt Dataset sets.",
                ),
                io.Combo.Input(
                    "existing",
                    options=list(captions.EXISTING),
                    default="keep",
                    tooltip="keep: only pictures without a caption get one. replace: captions that are there are "
                    "overwritten, and cannot be brought back.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip="default: the GPU; ComfyUI's own models are unloaded before. cpu: slow, takes no GPU "
                    "memory.",
                ),
            ],
            outputs=[io.String.Output(display_name="folder", tooltip="The same place, for PixArt Dataset.")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **inputs):
        return files_fingerprint(input_path(folder)) if folder else None

    @classmethod
    def execute(cls, folder, model_name, prompt, max_new_tokens, write, existing, device) -> io.NodeOutput:
        source = input_path(folder)
        where = comfy.model_management.get_torch_device() if device == "default" else "cpu"
        features.free_memory()
        with captions.vision_language_model(
            vlm_path(model_name), where, prompt=prompt, max_new_tokens=max_new_tokens
        ) as say:
            done = captions.caption_pictures(source, say, kind=write, existing=existing, progress=Progress())
        features.free_memory()
        return io.NodeOutput(str(source), ui=shown(cls, done.summary()))


NODES = [PixArtDataset, PixArtCaption]
