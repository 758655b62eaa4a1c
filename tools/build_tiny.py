"""Build the bundled tiny PixArt family, stage by stage, in a folder that every stage can resume from.

    python tools/build_tiny.py text  --work build/tiny     vocabulary and T5 encoder            (minutes)
    python tools/build_tiny.py vae   --work build/tiny     decoder of the autoencoder           (minutes)
    python tools/build_tiny.py dit   --work build/tiny     the transformer, in three stages     (hours; resumes)
    python tools/build_tiny.py restore --work build/tiny   instead of the above: start from what is shipped
    python tools/build_tiny.py export --work build/tiny    half-precision files into pixart_nodes/assets/tiny
    python tools/build_tiny.py family --work build/tiny    what the base's own trainer makes of it: LCM, ControlNet,
                                                           LoRA, Sigma (--only NAME: one of them)

Needs the pack's `train` extra. Two CPU cores are enough.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

ASSETS = Path(__file__).resolve().parents[1] / "pixart_nodes" / "assets" / "tiny"


def report(record: dict) -> None:
    print(json.dumps(record), flush=True)


def build_text(work: Path, args) -> None:
    from tools.tiny import text

    tokenizer = text.train_tokenizer(args.seed)
    encoder = text.train_encoder(tokenizer, steps=args.steps or 1600, seed=args.seed, report=report)
    tokenizer.save_pretrained(work / "text")
    encoder.save_pretrained(work / "text")
    report({"stage": "text", "tokens": len(tokenizer)})


def build_vae(work: Path, args) -> None:
    from tools.tiny import train_vae

    train_vae.train(work / "vae.safetensors", steps=args.steps or 3000, seed=args.seed, report=report)


def build_dit(work: Path, args) -> None:
    from tools.tiny import train_dit

    train_dit.train(work, seed=args.seed, report=report)


def restore(work: Path, args) -> None:
    from tools.tiny import export

    export.restore(work, ASSETS, report=report)


def export(work: Path, args) -> None:
    from tools.tiny import export

    export.export(work, ASSETS, report=report)


def family(work: Path, args) -> None:
    from tools.tiny import family

    for name in [args.only] if args.only else family.MEMBERS:
        report({"member": name, "file": str(family.build(name, work, ASSETS, report=report))})
    family.ship(work, ASSETS, report=report)


STAGES = {"text": build_text, "vae": build_vae, "dit": build_dit, "restore": restore, "export": export,
          "family": family}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, checkpoints and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="overrides the stage's number of steps (text, vae)")
    parser.add_argument("--only", metavar="NAME", help="of the family: this member alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    STAGES[args.stage](args.work, args)


if __name__ == "__main__":
    main()
