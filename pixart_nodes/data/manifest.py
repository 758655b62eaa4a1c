"""A data set: its usable pictures, each in the bucket of its shape, and a list of what is wrong with the others."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

from .buckets import TRAINING_SIZES, merge_small, nearest, training_table
from .memory import Memory
from .sources import Entry, entries

ROLES = ("train", "validation", "prior")  # prior: the recipe holds the model to what it did before
SAME_SHAPE = 1.05  # a control image's sides may be rounded, but what is drawn in it must lie where the picture has it
SAVE_EVERY = 60  # seconds of a scan that a crash may cost
Progress = Callable[[int, int], None]  # (done, total); may raise to cancel


class Bucket(NamedTuple):
    ratio: float  # height / width as PixArt's table rounds it: what the model is told
    height: int
    width: int


class Problem(NamedTuple):
    name: str
    kind: str  # format, name, damaged, too small, missing file, missing caption, shared caption, duplicate, control
    detail: str


def problem_lines(problems: Sequence[Problem], limit: int = 200) -> list[str]:
    """One line for each problem; of very many, the first and how many there are of each kind."""
    lines = [f"{problem.name}: {problem.kind} ({problem.detail})" for problem in problems[:limit]]
    if len(problems) > limit:
        kinds = Counter(problem.kind for problem in problems)
        lines.append("... in all " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
    return lines


@dataclass(frozen=True)
class Sample:
    """One usable picture."""

    name: str
    path: str
    digest: str  # of the file's bytes
    height: int  # of the picture itself
    width: int
    bucket: Bucket
    caption: str
    vlm_caption: str
    control: str = ""  # path of the control image; empty: none
    control_digest: str = ""
    role: str = "train"
    repeats: int = 1


@dataclass(frozen=True)
class ScanOptions:
    size: str = "1024"  # one of buckets.TRAINING_SIZES
    trigger_word: str = ""
    repeats: int = 1
    role: str = "train"
    validation_percent: float = -1.0  # held out by content, so the same pictures stay out; -1: see held_out
    smallest_bucket: int = 4
    max_enlargement: float = 1.5
    real_caption_ratio: float = 0.5  # how often a picture with both captions is shown with its own, as PixArt-sigma
    caption_from_trigger: bool = False  # a picture without a caption gets the trigger word alone

    def check(self) -> list[str]:
        """Everything that is wrong, one sentence each."""
        problems = []
        if self.size not in TRAINING_SIZES:
            problems.append(f"size {self.size!r} is none of {', '.join(TRAINING_SIZES)}.")
        if self.role not in ROLES:
            problems.append(f"role {self.role!r} is none of {', '.join(ROLES)}.")
        if not 1 <= self.repeats < 2**15:
            problems.append(f"repeats is {self.repeats}; it must be at least 1 and below 32768.")
        if self.validation_percent != -1 and not 0 <= self.validation_percent <= 50:
            problems.append(f"validation_percent is {self.validation_percent}; it must lie in 0..50, or be -1.")
        if self.smallest_bucket < 1:
            problems.append(f"smallest_bucket is {self.smallest_bucket}; it must be at least 1.")
        if self.max_enlargement < 1:
            problems.append(f"max_enlargement is {self.max_enlargement}; it must be at least 1.")
        if not 0 <= self.real_caption_ratio <= 1:
            problems.append(f"real_caption_ratio is {self.real_caption_ratio}; it must lie in 0..1.")
        if self.caption_from_trigger and not self.trigger_word.strip():
            problems.append("Pictures without a caption shall get the trigger word, but there is none: write one.")
        return problems


@dataclass(frozen=True)
class Manifest:
    """What PIXART_DATASET carries."""

    source: str
    size: str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]  # what was merged or will be repeated
    real_caption_ratio: float = 0.5

    def buckets(self) -> dict[Bucket, list[Sample]]:
        """The samples of each bucket, widest first."""
        groups = {}
        for sample in self.samples:
            groups.setdefault(sample.bucket, []).append(sample)
        return dict(sorted(groups.items()))

    def joined(self, other: "Manifest") -> "Manifest":
        """Both data sets as one, each picture once. Raises ValueError when they are for different picture sizes."""
        if self.size != other.size:
            raise ValueError(
                f"{other.source} was scanned for size {other.size} and {self.source} for size {self.size}: "
                "give both data sets the same size."
            )
        own = self.without(other)
        return Manifest(
            f"{other.source} + {self.source}", self.size, other.samples + own.samples,
            other.problems + own.problems, other.notes + own.notes, self.real_caption_ratio,
        )  # fmt: skip

    def without(self, other: "Manifest") -> "Manifest":
        """This data set; pictures that are in the other one too are problems (to show one more often: repeats)."""
        there = {sample.digest: f"{sample.name} for {sample.role} in {other.source}" for sample in other.samples}
        samples = tuple(sample for sample in self.samples if sample.digest not in there)
        problems = tuple(
            Problem(sample.name, "duplicate", f"the same file as {there[sample.digest]}")
            for sample in self.samples
            if sample.digest in there
        )
        return replace(self, samples=samples, problems=self.problems + problems)

    def summary(self) -> str:
        """For a person: how many are usable, in which buckets, and every problem."""
        lines = [f"{len(self.samples)} usable, {len(self.problems)} excluded"]
        for bucket, samples in self.buckets().items():
            lines.append(f"  {bucket.width} x {bucket.height}: {len(samples)}")
        for role, count in sorted(Counter(sample.role for sample in self.samples).items()):
            lines += [f"  of these for {role}: {count}"] if role != "train" else []
        lines += self.notes
        return "\n".join([*lines, *problem_lines(self.problems)])


def scan(
    source, options: ScanOptions, memory: Memory | None = None, progress: Progress | None = None, *,
    rank: int = 0, world: int = 1, gather: Callable[[list], list[list]] = lambda found: [found],
) -> Manifest:  # fmt: skip
    """Looks at every picture of a data set; `rank` of `world` processes takes every world-th, `gather` shares them.

    What cannot be used is in Manifest.problems. Raises ValueError for wrong options, an unreadable list or a place
    without pictures, FileNotFoundError for no place at all.
    """
    if problems := options.check():
        raise ValueError(" ".join(problems))
    memory = memory or Memory()
    listed = list(entries(source))
    if not listed:
        raise ValueError(f"{source} holds no pictures (.png, .jpg, .webp, .bmp, .tif), not even in folders below it.")
    found, saved, share = [], time.monotonic(), listed[rank::world]
    try:
        for done, result in enumerate(looked_at(share, options, memory), 1):
            found.append(result)
            if time.monotonic() - saved > SAVE_EVERY:
                memory.save()
                saved = time.monotonic()
            if progress:
                progress(done, len(share))
    finally:
        memory.save()
    everything = [item for turn in zip_longest(*gather(found)) for item in turn if item is not None]
    return arrange(str(source), everything, options)


def looked_at(listed: list[Entry], options: ScanOptions, memory: Memory) -> Iterator[Sample | Problem]:
    """A Sample or a Problem for every entry, in order; decoding runs in threads, a bounded number ahead."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for at in range(0, len(listed), 16 * workers):
            part = listed[at : at + 16 * workers]
            yield from pool.map(lambda entry: inspect(entry, options, memory), part)


def inspect(entry: Entry, options: ScanOptions, memory: Memory) -> Sample | Problem:
    """Everything that can be said of one picture without the others."""
    if entry.problem:
        return Problem(entry.name, *entry.problem)
    try:
        seen = memory.look(entry.path)
        control = memory.look(entry.control) if entry.control else None
    except OSError as error:
        return Problem(entry.name, "missing file", f"{error.filename or entry.path}: {error.strerror or error}")
    if seen.damage:
        return Problem(entry.name, "damaged", seen.damage)
    if control and control.damage:
        return Problem(entry.name, "control", f"{entry.control.name} is damaged: {control.damage}")
    if control and not 1 / SAME_SHAPE <= control.height * seen.width / (control.width * seen.height) <= SAME_SHAPE:
        return Problem(
            entry.name, "control",
            f"{entry.control.name} is {control.width} x {control.height} px, but the picture {seen.width} x "
            f"{seen.height}: give it the picture's shape",
        )  # fmt: skip
    bucket = Bucket(*nearest(training_table(options.size), seen.height, seen.width))
    enlargement = max(bucket.height / seen.height, bucket.width / seen.width)
    if enlargement > options.max_enlargement:
        return Problem(
            entry.name, "too small",
            f"{seen.width} x {seen.height} px would be enlarged {enlargement:.1f} times to {bucket.width} x "
            f"{bucket.height}",
        )  # fmt: skip
    caption = with_trigger(entry.caption, options.trigger_word)
    vlm_caption = with_trigger(entry.vlm_caption, options.trigger_word)
    if not caption and not vlm_caption:
        if not options.caption_from_trigger:
            return Problem(entry.name, "missing caption", f"write {entry.path.stem}.txt, or let PixArtCaption write it")
        caption = options.trigger_word.strip()
    return Sample(
        entry.name, str(entry.path), seen.digest, seen.height, seen.width, bucket, caption, vlm_caption,
        control=str(entry.control or ""), control_digest=control.digest if control else "",
        role=options.role, repeats=options.repeats,
    )  # fmt: skip


def with_trigger(caption: str, trigger_word: str) -> str:
    """The trigger word in front, unless the caption holds it already; nothing stays nothing."""
    trigger_word = trigger_word.strip()
    if not caption or not trigger_word or f" {' '.join(words(trigger_word))} " in f" {' '.join(words(caption))} ":
        return caption
    return f"{trigger_word}, {caption}"


def words(text: str) -> list[str]:
    return [word.strip(",.;:!?\"'()") for word in text.lower().split()]


def arrange(source: str, found: list[Sample | Problem], options: ScanOptions) -> Manifest:
    """Puts samples into buckets, small ones merged; lists duplicates and pictures that lack the others' control."""
    first, samples = {}, []
    problems = [item for item in found if isinstance(item, Problem)]
    with_control = any(isinstance(item, Sample) and item.control for item in found)
    for sample in (item for item in found if isinstance(item, Sample)):
        if sample.digest in first:
            problems.append(Problem(sample.name, "duplicate", f"the same file as {first[sample.digest]}"))
        elif with_control and not sample.control:
            problems.append(Problem(sample.name, "control", "other pictures have a control image, this one has none"))
        else:
            first[sample.digest] = sample.name
            samples.append(sample)
    counts = Counter(sample.bucket.ratio for sample in samples)
    targets = merge_small(counts, options.smallest_bucket)
    table = training_table(options.size)
    moved = {ratio: Bucket(target, *table[target]) for ratio, target in targets.items()}
    samples = [replace(sample, bucket=moved[sample.bucket.ratio]) for sample in samples]
    held = held_out(samples, options)
    samples = [replace(sample, role="validation") if sample.digest in held else sample for sample in samples]
    notes = bucket_notes(counts, moved, options)
    return Manifest(source, options.size, tuple(samples), tuple(problems), notes, options.real_caption_ratio)


def held_out(samples: list[Sample], options: ScanOptions) -> set[str]:
    """Digests of the pictures that are kept for validation: about as many as asked for, and one at least.

    By default 2 % where there are 50 pictures, none where there are fewer.
    """
    percent = (2.0 if len(samples) >= 50 else 0.0) if options.validation_percent < 0 else options.validation_percent
    if not percent or options.role != "train" or len(samples) < 2:
        return set()
    rank = {sample.digest: int(sample.digest[:8], 16) % 10_000 for sample in samples}
    return {digest for digest, number in rank.items() if number < percent * 100} or {min(rank, key=rank.get)}


def bucket_notes(counts, moved: dict[float, Bucket], options: ScanOptions) -> tuple[str, ...]:
    notes = []
    table = training_table(options.size)
    for ratio, bucket in sorted(moved.items()):
        if bucket.ratio != ratio:
            height, width = table[ratio]
            notes.append(
                f"{counts[ratio]} of {width} x {height} joined {bucket.width} x {bucket.height}, so that no bucket has "
                f"fewer than {options.smallest_bucket}."
            )
    sizes = Counter()
    for ratio, bucket in moved.items():
        sizes[bucket] += counts[ratio]
    notes += [
        f"{bucket.width} x {bucket.height} has {size} and no near neighbour: they are repeated to fill a batch."
        for bucket, size in sorted(sizes.items())
        if size < options.smallest_bucket
    ]
    return tuple(notes)
