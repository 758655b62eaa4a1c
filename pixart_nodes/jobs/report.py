"""A run in words and as a curve."""

from pathlib import Path

from PIL import Image, ImageDraw

from .watch import last_word, log_tail, read_events, status_of

WIDTH, HEIGHT, MARGIN = 768, 384, 48
SMOOTHING = 0.95
VANISHED = "The trainer "  # how watch.last_word begins
DARK, GRID, RAW, SMOOTH, INK = "#202428", "#3a4046", "#5b6f86", "#ffa94d", "#c8ccd0"


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Pace:
    """The time that is left, from the steps of this session: samples and checkpoints count too."""

    first: dict | None = None

    def left(self, step: dict, steps: int) -> float:
        self.first = self.first or step
        done = step["step"] - self.first["step"]
        each = (step["time"] - self.first["time"]) / done if done > 0 else step["seconds_per_step"]
        return each * (steps - step["step"])


def progress_text(run: Path, status: dict, step: dict | None, pace: Pace) -> str:
    """One line under the node while it waits."""
    state, steps = status.get("state", "starting"), status.get("steps")
    if step is None or not steps or state == "starting":
        return f"{run.name}: {state} ..."
    left = f"about {duration(pace.left(step, steps))} left" if state == "running" else state
    loss = "no number" if step["loss"] is None else f"{step['loss']:.4g}"
    return (f"{run.name}: step {step['step']} of {steps}, loss {loss}, "
            f"{step['seconds_per_step']:.2g} s per step, {left}")  # fmt: skip


def running_text(run: Path) -> str:
    """What the node says while a run goes on in the background."""
    status = status_of(run)
    steps = f" of {status['steps']}" if "steps" in status else ""
    errors = [event["text"] for event in read_events(run).found if event.get("type") == "error"]
    before = f" It has failed before: {errors[-1]}" if errors else ""
    return (f"{run.name} is training in the background, step {status.get('step', 0)}{steps}. It shares the GPU's "
            f"memory with what you draw meanwhile.{before}")  # fmt: skip


def done_text(run: Path, result: str) -> str:
    status = status_of(run)
    loss = smoothed([loss for _, loss in losses(read_events(run).found)])[-1:]
    said = f"{run.name}: {status.get('step')} steps done" + (f", loss {loss[0]:.4g}" if loss else "")
    return f"{said}. In the loaders as {result}"


def losses(events: list[dict]) -> list[tuple[int, float]]:
    """[(step, loss)] without losses that are no number."""
    return [(e["step"], e["loss"]) for e in events if e.get("type") == "step" and e.get("loss") is not None]


def failure(run: Path) -> str:
    """What the node says of a failed run; with the end of the log when the trainer could not say it itself."""
    error = status_of(run).get("error") or last_word(run, None)
    where = f"The whole log: {run / 'log.txt'}"
    return f"{error}\n{where}" if not error.startswith(VANISHED) else f"{error}\n{where}\nIts end:\n{log_tail(run)}"


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average without the bias of its start."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        found.append(total / weight)
    return found


def loss_curve(run: Path) -> Image.Image:
    """The loss of each step and its average, WIDTH x HEIGHT."""
    steps = dict(losses(read_events(run).found))  # a resumed run takes steps again: the last one of each number counts
    image = Image.new("RGB", (WIDTH, HEIGHT), DARK)
    draw = ImageDraw.Draw(image)
    if not steps:
        draw.text((MARGIN, HEIGHT // 2), "no steps yet", fill=INK)
        return image
    numbers = sorted(steps)
    raw = [steps[number] for number in numbers]
    low, high = min(raw), max(raw)
    high = high if high > low else low + 1.0

    def place(number, loss):
        across = (number - numbers[0]) / max(1, numbers[-1] - numbers[0])
        up = (loss - low) / (high - low)
        return MARGIN + across * (WIDTH - 1.5 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 1.5 * MARGIN)

    for part in range(5):
        loss = low + part / 4 * (high - low)
        x, y = place(numbers[0], loss)
        draw.line([(x, y), (WIDTH - MARGIN / 2, y)], fill=GRID)
        draw.text((4, y - 6), f"{loss:.3g}", fill=INK)
    for values, colour, width in ((raw, RAW, 1), (smoothed(raw), SMOOTH, 2)):
        points = [place(number, loss) for number, loss in zip(numbers, values, strict=True)]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=width)
    draw.text((MARGIN, HEIGHT - MARGIN + 12), f"loss, steps {numbers[0]} to {numbers[-1]}", fill=INK)
    return image
