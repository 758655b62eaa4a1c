/** The steps of a run, as many as a chart can show. */

const MOST = 4000; // points; above it, every other one goes
const RECENT = 20; // steps that the speed is an average of

export class Series {
  points = []; // "step" events by rising step

  /** Adds a "step" event that is later than all others. */
  add(event) {
    this.points.push(event);
    if (this.points.length > MOST) this.points = this.points.filter((_, i) => i % 2 || i > MOST - RECENT);
  }

  /** Forgets what is not before a step: the run went back to a checkpoint. */
  cut(step) {
    while (this.points.length && this.last.step >= step) this.points.pop();
  }

  get last() {
    return this.points.at(-1);
  }

  /** Mean seconds per step of the last steps; NaN before the first. */
  secondsPerStep() {
    const recent = this.points.slice(-RECENT);
    return recent.reduce((sum, event) => sum + event.seconds_per_step, 0) / recent.length;
  }
}

/** Exponential mean over `span` steps, bias corrected; points may lie any number of steps apart. NaN is left out. */
export function smooth(steps, values, span) {
  let [mean, weight, before] = [0, 0, steps[0] - 1];
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return NaN;
    const keep = span > 0 ? Math.exp((before - steps[i]) / span) : 0;
    [mean, weight, before] = [keep * mean + (1 - keep) * value, keep * weight + (1 - keep), steps[i]];
    return mean / weight;
  });
}

/** Index of the point whose step is nearest. */
export function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}
