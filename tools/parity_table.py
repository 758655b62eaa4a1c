"""Prints the table of docs/parity.md: the largest error of every golden case, and what is allowed.

    python tools/parity_table.py [FOLDER] > docs/parity.md

FOLDER is a set of golden fixtures (default: tests/goldens).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from goldens_cases import CHECKS, compare, lookup, read_cases  # noqa: E402

INTRODUCTION = """# Parity with the original code

Recomputed with this pack on the CPU in float32, torch {torch}, on fixtures made with PixArt-alpha `cac2fd3`,
PixArt-sigma `1ce521a` and diffusers 0.42.1 (`tests/goldens/README.md`). Made by `tools/parity_table.py`; the test is
`tests/test_goldens.py`. Errors are maxima over all stored values of a case: absolute, or relative where the
tolerance says so; the one nearest to its tolerance is shown. Texts, names and sizes have to be equal.

Guidance `uncond + s (cond - uncond)` adds the rounding of two passes up to `2 s - 1` times, so its guided channels
are allowed that much more than a single pass: evaluated in float64 they are 1.4e-5 away from the fixture as well.
The same holds where x0 is computed from eps, which divides by 0.0064 at t = 999: there math libraries round
`sqrt(1 - a)` up or down (with AVX2 code the fixtures are met to 6e-6 and 0).

| case | compared | largest error | at | tolerance |
|---|---|---|---|---|"""


def rows(case):
    """One line per case; one more for results that multiply rounding and are allowed so much more."""
    check = lookup(CHECKS, case.name)
    tolerance, results = case.entry.get("tolerance"), {}
    for name, ours, golden, *gain in check(case):
        results.setdefault(tuple(gain), []).append((*compare(tolerance, name, ours, golden, *gain), name))
    for group in results.values():
        if tolerance is None:
            yield f"| {case.name} | {len(group)} | {max(group)[0]:.2g} | - | equal |"
            continue
        error, allowed, worst = max(group, key=lambda result: result[0] / result[1])
        yield f"| {case.name} | {len(group)} | {error:.2g} | `{worst}` | {allowed:.2g} |"


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "goldens"
    print(INTRODUCTION.format(torch=torch.__version__.split("+")[0]))
    for case in read_cases(folder):
        print("\n".join(rows(case)))


if __name__ == "__main__":
    main()
