"""What a training run is told. Standard library only: ComfyUI's process reads it too."""

from dataclasses import dataclass

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
