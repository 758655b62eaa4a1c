"""What a training run is told. Standard library only: ComfyUI's process reads it too."""

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. Steps count optimizer updates; learning rates are AdamW's, for Muon too."""

    steps: int
    batch_size: int
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4  # reached by a cosine at the last step
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    min_snr_gamma: float | None = None  # None: the original's unweighted noise MSE
    caption_dropout: float = 0.1  # PixArt's class_dropout_prob
    save_every: int = 200
    log_every: int = 20
    compile: bool = False
    seed: int = 0

    def check(self) -> list[str]:
        """Everything that is wrong with the numbers, one sentence each; empty if nothing is."""
        problems = []
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            problems.append(f"min_snr_gamma is {self.min_snr_gamma}; it must be above 0, or None for no weighting.")
        if self.optimizer not in OPTIMIZERS:
            problems.append(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}.")
        for name in ("caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}; it must lie in 0..1, 1 excluded.")
        if not 0 < self.final_learning_rate <= self.learning_rate:
            problems.append(
                f"final_learning_rate {self.final_learning_rate} must be above 0 and at most learning_rate "
                f"{self.learning_rate}."
            )
        return problems


RECIPES = ("lora", "dreambooth", "lcm-lora", "lcm", "controlnet", "full", "weak-to-strong")
ADAPTERS = ("lora", "dreambooth", "lcm-lora")  # train a LoRA beside frozen weights
RUN_OPTIMIZERS = ("auto", "adamw", "adamw8bit", "came", "prodigy")
CHOICES = {
    "recipe": RECIPES, "optimizer": RUN_OPTIMIZERS, "lr_schedule": ("constant", "cosine", "linear"),
    "precision": ("auto", "fp32", "bf16", "fp16"), "base_quantization": ("none", "int8", "nf4"),
    "targets": ("attn", "attn-mlp", "all"), "base.family": ("auto", "alpha", "sigma"),
    "base.weights": ("auto", "ema", "raw"), "output.export": ("native", "diffusers", "kohya", "peft"),
}  # fmt: skip
POSITIVE = (
    "steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm", "save_every", "keep",
    "rank", "alpha", "lcm.num_ddim_timesteps", "lcm.huber_c", "lcm.guidance", "controlnet.blocks",
    "weak_to_strong.caption_tokens",
)  # fmt: skip
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "prior_loss_weight", "sample_every", "validate_every")
OPTIONAL = ("min_snr_gamma", "weak_to_strong.pe_interpolation")
OPTIONAL_SIZES = ("base.base_size", "weak_to_strong.base_size")
PRODIGY_LOWEST = 0.01
SMALLEST_SIZE = 16  # pixels of a token
# Windows refuses these, and workflows are shared.
NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
LONGEST_NAME = 200  # bytes; file systems allow 255, with all that is put around a name
LARGEST_SEED = 2**63 - 1
SHARES = ("caption_dropout", "ema_decay", "lcm.ema_decay")


@dataclass(frozen=True)
class BaseModel:
    """The model that a run starts from: a file or diffusers folder, and what to take it for where it does not say."""

    path: str = ""
    family: str = "auto"
    base_size: int | None = None  # training size in pixels
    weights: str = "auto"  # of a training checkpoint: "ema", "raw", or the averaged ones where there are any


@dataclass(frozen=True)
class Output:
    """The file that a run ends with: folder/name, in a layout."""

    name: str = ""
    folder: str = ""
    export: str = "native"  # native names load in ComfyUI; "kohya" and "peft" are for LoRA


@dataclass(frozen=True)
class Lcm:
    """Consistency distillation; guidance is ComfyUI's form, 1 = off (the original's w is guidance - 1)."""

    guidance: float = 5.5
    num_ddim_timesteps: int = 50
    huber_c: float = 0.001
    ema_decay: float = 0.95  # of the target network; a LoRA is its own target


@dataclass(frozen=True)
class ControlNet:
    blocks: int = 13


@dataclass(frozen=True)
class WeakToStrong:
    """What the stronger model has; None keeps the base's. Sizes in pixels."""

    base_size: int | None = None
    pe_interpolation: float | None = None  # None: grows with base_size, so positions keep their span
    caption_tokens: int = 300
    kv_sampling: str | None = None  # "conv" or "uniform"; None: no compression
    kv_scale_factor: int = 2
    kv_layers: tuple[int, ...] = tuple(range(14, 28))


@dataclass(frozen=True)
class RunConfig:
    """run.json. Steps count optimizer updates; the learning rate is the one that is used, nothing scales it."""

    version: int = 1
    recipe: str = "lora"
    base: BaseModel = field(default_factory=BaseModel)
    cache: str = ""  # a file in `sets` of a feature cache, or the cache's folder when it has one set
    output: Output = field(default_factory=Output)
    steps: int = 1500
    batch_size: int = 1  # of each process
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: str = "constant"
    optimizer: str = "auto"  # see optimizers.chosen
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42
    precision: str = "auto"  # bf16 where the device has it, else fp32
    base_quantization: str = "none"
    gradient_checkpointing: bool = True
    caption_dropout: float = 0.1
    ema_decay: float = 0.0  # 0: no average
    min_snr_gamma: float | None = None
    rank: int = 16
    alpha: float = 16.0
    targets: str = "attn-mlp"
    dora: bool = False
    prior_loss_weight: float = 1.0
    trigger_word: str = ""
    lcm: Lcm = field(default_factory=Lcm)
    controlnet: ControlNet = field(default_factory=ControlNet)
    weak_to_strong: WeakToStrong = field(default_factory=WeakToStrong)
    save_every: int = 500
    keep: int = 3
    sample_every: int = 250  # 0: no samples
    validate_every: int = 250  # 0: the loss on the set's validation pictures is not measured
    vae: str = ""  # a file or diffusers folder that samples are decoded with; empty: rough colours

    @classmethod
    def from_dict(cls, given: dict) -> "RunConfig":
        """A config from JSON; what is not said is the recipe's default. Raises ValueError with all wrong keys."""
        if problems := wrong_keys(cls, given):
            raise ValueError(" ".join(problems))
        given = with_whole_numbers(cls, given)
        chosen = defaults(str(given.get("recipe", cls.recipe)))
        if given.get("optimizer") == "prodigy":
            chosen["learning_rate"] = 1.0  # a factor of the rate that it finds
        chosen |= given
        for name, kind in GROUPS.items():
            if name in chosen:
                chosen[name] = kind(**chosen[name])
        if "weak_to_strong" in chosen:
            layers = chosen["weak_to_strong"].kv_layers
            layers = tuple(layers) if isinstance(layers, list) else layers
            chosen["weak_to_strong"] = replace(chosen["weak_to_strong"], kv_layers=layers)
        return cls(**chosen)

    def to_dict(self) -> dict:
        return asdict(self)

    def value(self, name: str):
        """A field by its dotted name."""
        found = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def check(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each; empty if nothing is."""
        problems = list(self.wrong_values().values())
        for name in ("base.path", "cache", "output.name", "output.folder"):
            if not self.value(name):
                problems.append(f"{name} is empty; it must be given.")
        if len(str(self.output.name).encode()) > LONGEST_NAME:
            problems.append(f"output.name is longer than {LONGEST_NAME} bytes, too long for a file name: shorten it.")
        if not is_file_name(str(self.output.name)):
            problems.append(f"output.name {self.output.name!r} is no file name; use letters, digits, - and _.")
        adapter = self.recipe in ADAPTERS
        if self.base_quantization != "none" and not (adapter or self.recipe == "controlnet"):
            problems.append(f"base_quantization {self.base_quantization} needs frozen weights, but {self.recipe} "
                            "trains all of them: set it to none.")  # fmt: skip
        if self.dora and self.base_quantization == "int8" and adapter:
            problems.append("dora does not work with base_quantization int8: set it to nf4 or none.")
        if self.optimizer == "prodigy" and self.learning_rate < PRODIGY_LOWEST:
            problems.append(f"learning_rate is {self.learning_rate!r}, but prodigy finds the rate and multiplies it "
                            "with this: set it to 1.")  # fmt: skip
        if self.output.export in ("kohya", "peft") and not adapter:
            problems.append(f"output.export {self.output.export} is for LoRA; {self.recipe} writes native.")
        if self.output.export == "diffusers" and self.weak_to_strong.kv_sampling and self.recipe == "weak-to-strong":
            problems.append("output.export diffusers cannot hold KV compression: set it to native.")
        return problems

    def wrong_values(self) -> dict[str, str]:
        """A sentence for each field that cannot have its value, whatever the others are."""
        choices = {
            name: f"{name} is {self.value(name)!r}; it must be one of {', '.join(choices)}."
            for name, choices in CHOICES.items() if self.value(name) not in choices
        }  # fmt: skip
        return choices | self.wrong_numbers() | wrong_types(self, DEFAULT)

    def wrong_numbers(self) -> dict[str, str]:
        problems = {}
        limits = [(POSITIVE, "above 0", lambda x: x > 0), (NOT_NEGATIVE, "at least 0", lambda x: x >= 0),
                  (("seed",), "within 0..2^63 - 1", lambda x: 0 <= x <= LARGEST_SEED),
                  (("weak_to_strong.kv_scale_factor",), "at least 2", lambda x: x >= 2),
                  (SHARES, "within 0..1, 1 excluded", lambda x: 0 <= x < 1),
                  (OPTIONAL, "above 0, or null", lambda x: x is None or x > 0),
                  (OPTIONAL_SIZES, f"at least {SMALLEST_SIZE}, or null", lambda x: x is None or x >= SMALLEST_SIZE),
                  ]  # fmt: skip
        for names, what, good in limits:
            for name in names:
                value, expected = self.value(name), DEFAULT.value(name)
                whole = isinstance(expected, int) or name in OPTIONAL_SIZES
                number = type(value) is int or not whole and type(value) is float and math.isfinite(value)
                if not (number or value is None is expected) or not good(value):
                    problems[name] = f"{name} is {value!r}; it must be {'a whole number ' if whole else ''}{what}."
        return problems


def is_file_name(name: str) -> bool:
    """Whether every system takes this as the beginning of a file's name."""
    bad_end = name.startswith(".") or name.endswith((".", " "))
    return not (bad_end or NOT_IN_NAMES.search(name) or DEVICES.fullmatch(name))


GROUPS = {"base": BaseModel, "output": Output, "lcm": Lcm, "controlnet": ControlNet, "weak_to_strong": WeakToStrong}
DEFAULT = RunConfig()

# Learning rates as used, clip and warm-up of PixArt's configs, the rest of diffusers' examples.
_ALL_WEIGHTS = {
    "steps": 4000, "learning_rate": 1e-5, "warmup_steps": 1000, "max_grad_norm": 0.01, "weight_decay": 0.0,
    "ema_decay": 0.9999, "batch_size": 4, "gradient_accumulation_steps": 16,
}  # fmt: skip
_DEFAULTS = {
    "lora": {},
    "dreambooth": {"steps": 800, "warmup_steps": 0, "gradient_accumulation_steps": 1, "caption_dropout": 0.0},
    "lcm-lora": {"steps": 1000, "weight_decay": 0.0, "rank": 64, "alpha": 64.0, "targets": "all",
                 "gradient_accumulation_steps": 12, "caption_dropout": 0.0},
    "lcm": {"steps": 4000, "learning_rate": 5e-6, "weight_decay": 0.0, "max_grad_norm": 0.01,
            "batch_size": 4, "gradient_accumulation_steps": 4, "caption_dropout": 0.0},
    "controlnet": {"steps": 10_000, "learning_rate": 1e-5, "max_grad_norm": 0.01, "batch_size": 4,
                   "gradient_accumulation_steps": 4, "caption_dropout": 0.5},
    "full": _ALL_WEIGHTS,
    "weak-to-strong": {**_ALL_WEIGHTS, "batch_size": 2},
}  # fmt: skip


def defaults(recipe: str) -> dict:
    """The fields of a recipe that differ from RunConfig's; none for an unknown recipe, which check() reports."""
    return dict(_DEFAULTS.get(recipe, {}))


def wrong_types(given, expected, where: str = "") -> dict[str, str]:
    """A sentence for each text or switch that is something else; choices and numbers are looked at elsewhere."""
    problems = {}
    for entry in fields(expected):
        name, value, like = where + entry.name, getattr(given, entry.name), getattr(expected, entry.name)
        if is_dataclass(like):
            problems |= wrong_types(value, like, f"{name}.")
        elif isinstance(like, bool) and not isinstance(value, bool):
            problems[name] = f"{name} is {value!r}; it must be true or false."
        elif isinstance(like, str) and name not in CHOICES and not isinstance(value, str):
            problems[name] = f"{name} is {value!r}; it must be text."
        elif isinstance(like, tuple) and not (isinstance(value, tuple) and all(type(i) is int for i in value)):
            problems[name] = f"{name} is {value!r}; it must be a list of whole numbers."
    return problems


def with_whole_numbers(kind, given: dict) -> dict:
    """`given` with 2 for 2.0 where a dataclass has whole numbers: some programs write every number like that."""
    types = {entry.name: entry.type for entry in fields(kind)}

    def tidy(name, value):
        if kind is RunConfig and name in GROUPS:
            return with_whole_numbers(GROUPS[name], value)
        is_whole = types[name] in (int, int | None) and isinstance(value, float) and value.is_integer()
        return int(value) if is_whole else value

    return {name: tidy(name, value) for name, value in given.items()}


def wrong_keys(kind, given, where: str = "") -> list[str]:
    """A sentence for each key that a dataclass does not have, naming the nearest one that it has."""
    if not isinstance(given, dict):
        return [f"{where.rstrip('.') or 'run.json'} is {given!r}; it must be an object."]
    known, problems = [f.name for f in fields(kind)], []
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            problems.append(f"There is no {where}{name}" + (f"; did you mean {where}{near[0]}?" if near else "."))
        elif kind is RunConfig and name in GROUPS:
            problems += wrong_keys(GROUPS[name], value, f"{name}.")
        elif kind is RunConfig and name == "version" and value != RunConfig.version:
            problems.append(f"version is {value!r}; this pack reads version {RunConfig.version}.")
    return problems
