"""How long one training step takes: ours, the original's formulas in plain torch, and diffusers with PEFT.

    python benchmarks/train.py [--recipes lora lcm-lora lcm] [--size 512] [--batch 1] [--depth 28] [--repeats 3]
                               [--dtype fp32] [--rank 16] [--keep-activations] [--device cpu] [--toy]

XL/2 with random weights, the same in all; captions of 20 to 120 tokens; the contestants take turns. Losses are compared
at the first step, where weights, noise and timesteps are the same. A step is loss, gradient, clipping and AdamW, with
gradient checkpointing unless activations are kept. Prints Markdown. `lcm` trains all weights: 15 GB each in fp32.
"""

import argparse
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.plain_pixart import PlainLora, PlainPixArt, consistency_loss, noise_loss  # noqa: E402
from pixart_nodes.data.dataset import Batch  # noqa: E402
from pixart_nodes.model import VARIANTS, PixArtTransformer  # noqa: E402
from pixart_nodes.training.config import BaseModel, RunConfig  # noqa: E402
from pixart_nodes.training.optimizers import run_optimizer  # noqa: E402
from pixart_nodes.training.recipes import RECIPES, Draws, Start  # noqa: E402
from pixart_nodes.training.recipes.lora import target_modules  # noqa: E402
from pixart_nodes.training.trainer import checkpoint_blocks  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOY = {"hidden_size": 48, "num_heads": 3, "caption_channels": 64}
DIFFUSERS_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TOKENS, GUIDANCE, RATE = 120, 5.5, 1e-4


class Problem:
    """Weights, a batch, and the random numbers of each step."""

    def __init__(self, options, recipe: str):
        self.recipe, self.device, self.dtype = recipe, options.device, DTYPES[options.dtype]
        self.checkpointing, self.rank, self.count = not options.keep_activations, options.rank, options.batch
        width = TOY if options.toy else {}
        self.params = replace(VARIANTS["alpha-512"], depth=options.depth, **width)
        generator = torch.Generator().manual_seed(0)
        shapes = {name: t.shape for name, t in PixArtTransformer(self.params, device="meta").state_dict().items()}
        self.weights = {
            name: (torch.randn(shape, generator=generator) * (0.02 if len(shape) == 1 else shape[-1] ** -0.5)).to(
                self.device, torch.float32 if self.trains_all else self.dtype
            )
            for name, shape in shapes.items()
        }
        side, lengths = options.size // 8, torch.randint(20, TOKENS + 1, (options.batch, 1), generator=generator)
        latent = torch.randn(options.batch, 4, side, side, generator=generator)
        context = torch.randn(options.batch, TOKENS, self.params.caption_channels, generator=generator).half()
        tensors = (latent, context, torch.arange(TOKENS) < lengths, torch.full((options.batch, 2), options.size),
                   torch.ones(options.batch))  # fmt: skip
        self.batch = Batch(*(tensor.to(self.device) for tensor in tensors), None, tuple(range(options.batch)))

    @property
    def trains_all(self) -> bool:
        return self.recipe == "lcm"

    def own_weights(self) -> dict[str, torch.Tensor]:
        """Frozen ones are shared by all contestants."""
        return {n: w.clone() for n, w in self.weights.items()} if self.trains_all else dict(self.weights)

    def draws(self, step: int) -> Draws:
        return Draws(0, list(range(step * self.count, (step + 1) * self.count)))

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else nullcontext()


class Contestant:
    """loss(step) -> scalar; parameters: what is trained; after: behind each update."""

    def __init__(self, problem: Problem, parameters, loss, after=lambda: None):
        self.problem, self.loss, self.after = problem, loss, after
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = run_optimizer("adamw", self.parameters, RATE, 0.01)

    def step(self, number: int) -> float:
        with self.problem.autocast():
            loss = self.loss(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()
        return loss.item()


def ours(problem: Problem) -> Contestant:
    config = RunConfig.from_dict({
        "recipe": problem.recipe, "rank": problem.rank, "alpha": float(problem.rank), "targets": "attn-mlp",
        "caption_dropout": 0.0, "base": vars(BaseModel()),
    })  # fmt: skip
    model = PixArtTransformer(problem.params, device="meta")
    model.load_state_dict(problem.own_weights(), assign=True)
    recipe = RECIPES[problem.recipe](config, Start(model, "alpha", problem.dtype, problem.device))
    if problem.checkpointing:
        checkpoint_blocks(recipe.network)
    longest = int(problem.batch.mask.sum(1).max())  # a batch of ours is as long as its longest caption
    batch = problem.batch._replace(context=problem.batch.context[:, :longest], mask=problem.batch.mask[:, :longest])

    def loss(step):
        return sum(recipe.losses(recipe.network, batch, problem.draws(step), step).values())

    return Contestant(problem, recipe.trained().values(), loss, recipe.after_update)


def in_the_same_loop(problem: Problem, make_network) -> Contestant:
    """make_network(problem) -> (module, predict(x, t, caption, mask), context in which the LoRA is off)."""
    network, predict, without = make_network(problem)
    null = problem.weights["y_embedder.y_embedding"][None]
    batch, parameters, after, teacher, target = problem.batch, list(network.parameters()), lambda: None, None, predict
    if problem.trains_all:
        network.requires_grad_(True)
        (_, teacher, _), (average, target, _) = make_network(problem), make_network(problem)

        @torch.no_grad()
        def after():
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.mul_(0.95).add_(now, alpha=0.05)

    def adapter_off(*arguments):
        with without():
            return predict(*arguments)

    def loss(step):
        draws = problem.draws(step)
        if problem.recipe == "lora":
            noise, t = draws.normal(batch.latent), draws.integers(1000, problem.device)
            return noise_loss(predict, batch, noise, t)
        index = draws.integers(50, problem.device)
        noise = draws.normal(batch.latent)
        return consistency_loss(predict, teacher or adapter_off, target, batch, null, noise, index, GUIDANCE - 1)

    return Contestant(problem, parameters, loss, after)


@contextmanager
def plain_lora_off():
    PlainLora.on = False
    try:
        yield
    finally:
        PlainLora.on = True


def plain(problem: Problem):
    with torch.device("meta"):
        network = PlainPixArt(problem.params, problem.checkpointing)
    network.load_state_dict(problem.own_weights(), assign=True)
    network.requires_grad_(False)
    if not problem.trains_all:
        for name in target_modules(network, "attn-mlp"):
            parent, _, leaf = name.rpartition(".")
            layer = PlainLora(network.get_submodule(name), problem.rank, 1.0)
            setattr(network.get_submodule(parent), leaf, layer)
            layer.to(problem.device)
    return network, network, plain_lora_off


def diffusers(problem: Problem):
    from peft import LoraConfig, get_peft_model

    from benchmarks.contestants import diffusers_transformer

    shown = argparse.Namespace(params=problem.params, weights=problem.own_weights(), device=problem.device)
    network = diffusers_transformer(shown)
    if problem.checkpointing:
        network.enable_gradient_checkpointing()
        network.train()  # diffusers saves activations only in this mode
    without = nullcontext
    if not problem.trains_all:
        network = get_peft_model(
            network, LoraConfig(r=problem.rank, lora_alpha=problem.rank, target_modules=DIFFUSERS_TARGETS)
        )
        without = network.disable_adapter
        for parameter in network.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data

    def predict(x, t, caption, mask):
        dtype = problem.weights["y_embedder.y_embedding"].dtype
        return network(
            x.to(dtype), encoder_hidden_states=caption.to(dtype), timestep=t, encoder_attention_mask=mask.to(dtype),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip

    return network, predict, without


CONTESTANTS = {
    "ours": ours,
    "the original's formulas, plain torch": lambda problem: in_the_same_loop(problem, plain),
    "diffusers and PEFT": lambda problem: in_the_same_loop(problem, diffusers),
}


def table(problem: Problem, title: str, repeats: int):
    running = {name: make(problem) for name, make in CONTESTANTS.items()}
    first = {name: contestant.step(0) for name, contestant in running.items()}  # warms up, too
    times = {name: [] for name in running}
    for number in range(1, repeats + 1):
        for name, contestant in running.items():
            if problem.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            contestant.step(number)  # reads the loss, so nothing is left running
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"\n### {title}\n\n| | median s | samples per second | ratio to ours | first loss | differs from ours |")
    print("|---|---|---|---|---|---|")
    for name, value in median.items():
        off = abs(first[name] - first["ours"]) / abs(first["ours"])
        print(f"| {name} | {value:.3f} | {problem.count / value:.3g} | {value / median['ours']:.2f} | "
              f"{first[name]:.6f} | {off:.1e} |")  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--recipes", nargs="+", choices=("lora", "lcm-lora", "lcm"), default=["lora", "lcm-lora"])
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep-activations", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--toy", action="store_true", help="48 channels instead of 1152: does it run at all?")
    return parser.parse_args()


def main():
    options = arguments()
    print(f"PyTorch {torch.__version__} on {options.device}, {torch.get_num_threads()} threads.")
    for recipe in options.recipes:
        title = f"{recipe}, {options.size} px, batch {options.batch}, {options.depth} blocks, {options.dtype}"
        table(Problem(options, recipe), title, options.repeats)


if __name__ == "__main__":
    main()
