"""What quantised weights cost in fidelity: the bundled tiny model, scored by its oracle, against itself in fp32.

    python benchmarks/quantized_fidelity.py --comfyui PATH [--count 300] [--kinds int8 nf4 fp4] [other options]

Other options are those of tools/evaluate_tiny.py, which draws and scores: the same captions and noises for every row.
T5 and the transformer are both quantised. Ends with 1 when int8 loses more than two points.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from tools import evaluate_tiny  # noqa: E402

KINDS = ("int8", "nf4", "fp4")
ALLOWED = 0.02  # of object_accuracy, for int8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    chosen, words = parser.parse_known_args()
    options = evaluate_tiny.parse(words)
    if options.captions:
        samples = evaluate_tiny.read_samples(options.captions)
    else:
        samples = evaluate_tiny.held_out_samples(options.count, options.seed)
    rates = {}
    with tempfile.TemporaryDirectory(prefix="pixart-fidelity-") as base:
        with contextlib.redirect_stdout(sys.stderr):
            comfy = evaluate_tiny.connect(options, Path(base))
        for kind in ("fp32", *chosen.kinds):
            options.weight_dtype = options.t5_dtype = kind
            with contextlib.redirect_stdout(sys.stderr):
                rates[kind], _ = evaluate_tiny.evaluate(comfy, samples, options)
    print(f"{len(samples)} captions, {options.steps} steps\n")
    print("| weights | objects right | points to fp32 |\n|---|---|---|")
    for kind, rate in rates.items():
        lost = 100 * (rate["object_accuracy"] - rates["fp32"]["object_accuracy"])
        print(f"| {kind} | {rate['object_accuracy']:.3f} | {lost:+.1f} |")
    int8 = rates.get("int8", rates["fp32"])
    return int(int8["object_accuracy"] < rates["fp32"]["object_accuracy"] - ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
