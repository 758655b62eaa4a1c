/** Drawing of a line chart. A view holds what is drawn, and where: see `viewOf`. */

const MARGIN = { left: 54, right: 12, top: 10, bottom: 22 };
const OUTLIERS = 0.01; // of raw values, at each end, that may lie outside

/** Draws a view: grid, checkpoints, curves, and the point `at` that is read, if any. */
export function drawView(view, at) {
  axes(view);
  marks(view);
  curves(view);
  if (at < 0) return;
  const x = view.x(view.steps[at]);
  line(view.pen, [[x, MARGIN.top], [x, view.height - MARGIN.bottom]], view.colour("muted"), 1);
  if (view.fits(view.smooth[at])) dot(view.pen, x, view.y(view.smooth[at]), 3.5, view.colour("accent"));
}

/** Round numbers within low..high, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => (first + i) * step);
}

/** Powers of ten within low..high; round numbers where there are too few. */
function logTicks(low, high, count) {
  const powers = ticks(Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9), count);
  const whole = powers.filter(Number.isInteger).map((power) => 10 ** power);
  return whole.length > 1 ? whole : ticks(low, high, count).filter((value) => value > 0);
}

function range(values, extra) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const cut = Math.floor(sorted.length * OUTLIERS);
  const inner = [...sorted.slice(cut, sorted.length - cut), ...extra].filter(Number.isFinite);
  return [inner.reduce((a, b) => Math.min(a, b), Infinity), inner.reduce((a, b) => Math.max(a, b), -Infinity)];
}

/** Adds x(step), y(value), toStep(x), fits(value) and limits to a view: {pen, width, height, log, colour(name),
read(value), steps, raw, smooth, validation, checkpoints}. */
export function viewOf(view) {
  const { steps, raw, width, height, log } = view;
  const shown = (values) => (log ? values.filter((value) => value > 0) : values);
  let [low, high] = range(shown(raw), shown([...view.smooth, ...view.validation.map(([, loss]) => loss)]));
  if (!Number.isFinite(low)) [low, high] = log ? [0.1, 1] : [0, 1];
  if (high - low < 1e-9 * Math.abs(high) || high === low) {
    [low, high] = high ? [Math.min(high * 0.5, high * 1.5), Math.max(high * 0.5, high * 1.5)] : [-1, 1];
  }
  const bend = log ? Math.log : (value) => value;
  const [bottom, top] = [bend(low), bend(high)];
  const [first, last] = [steps[0] - (steps.length === 1), steps.at(-1)];
  const [across, up] = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom - 8];
  return Object.assign(view, { low, high, first, last,
    x: (step) => MARGIN.left + ((step - first) / (last - first)) * across,
    toStep: (x) => first + ((x - MARGIN.left) / across) * (last - first),
    y: (value) => MARGIN.top + 4 + ((top - bend(value)) / (top - bottom)) * up,
    fits: (value) => Number.isFinite(value) && (!log || value > 0) });
}

function axes(view) {
  const { pen, width, height } = view;
  const rows = Math.max(4, Math.floor(height / 36));
  pen.fillStyle = view.colour("muted");
  [pen.textAlign, pen.textBaseline] = ["right", "middle"];
  for (const value of view.log ? logTicks(view.low, view.high, rows) : ticks(view.low, view.high, rows)) {
    line(pen, [[MARGIN.left, view.y(value)], [width - MARGIN.right, view.y(value)]], view.colour("grid"), 1);
    pen.fillText(view.read(value).split(" ")[0], MARGIN.left - 6, view.y(value));
  }
  [pen.textAlign, pen.textBaseline] = ["center", "bottom"];
  const columns = ticks(view.first, view.last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
  for (const step of columns) pen.fillText(String(step), Math.min(view.x(step), width - 14), height - 4);
}

/** Triangles under the steps that have a checkpoint. */
function marks({ pen, height, first, x, colour, checkpoints }) {
  pen.fillStyle = colour("done");
  for (const step of checkpoints) {
    if (step < first) continue;
    const [middle, bottom] = [x(step), height - MARGIN.bottom];
    pen.beginPath();
    for (const [dx, dy] of [[-4, 0], [4, 0], [0, -6]]) pen.lineTo(middle + dx, bottom + dy);
    pen.fill();
  }
}

function curves(view) {
  const { pen, steps, width, height, colour } = view;
  const path = (values) => steps.map((step, i) => [view.x(step), view.fits(values[i]) ? view.y(values[i]) : NaN]);
  const body = path(view.smooth).filter(([, y]) => Number.isFinite(y));
  pen.save();
  pen.beginPath();
  pen.rect(MARGIN.left - 4, 0, width - MARGIN.left, height - MARGIN.bottom);
  pen.clip();
  const shade = pen.createLinearGradient(0, 0, 0, height);
  shade.addColorStop(0, colour("shade"));
  shade.addColorStop(1, "transparent");
  pen.fillStyle = shade;
  pen.beginPath();
  if (body.length) for (const [x, y] of [...body, [body.at(-1)[0], height], [body[0][0], height]]) pen.lineTo(x, y);
  pen.fill();
  line(pen, path(view.raw), colour("raw"), 1);
  line(pen, body, colour("accent"), 2);
  if (body.length) dot(pen, ...body.at(-1), 3, colour("accent"));
  const place = ([step, loss]) => [view.x(Math.max(step, view.first)), view.fits(loss) ? view.y(loss) : NaN];
  const checks = view.validation.map(place);
  line(pen, checks, colour("check"), 1.5);
  for (const [x, y] of checks) dot(pen, x, y, 3, colour("check"));
  pen.restore();
}

/** Joins points; one that is no number is a gap. */
function line(pen, points, colour, width) {
  Object.assign(pen, { strokeStyle: colour, lineWidth: width, lineJoin: "round" });
  pen.beginPath();
  let drawing = false;
  for (const [x, y] of points) {
    if (drawing && Number.isFinite(y)) pen.lineTo(x, y);
    else pen.moveTo(x, y);
    drawing = Number.isFinite(y);
  }
  pen.stroke();
}

function dot(pen, x, y, radius, colour) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}
