/** A line chart on a canvas: raw and smoothed, linear or logarithmic, with a reading under the pointer. */

import { element, write } from "./dom.js";
import { METRICS, number } from "./format.js";
import { drawView, viewOf } from "./plot.js";
import { nearest, smooth } from "./series.js";
import { t } from "./texts.js";

const SHARPNESS = 2; // canvas pixels per CSS pixel at least: nodes are drawn enlarged, too
const SMOOTHEST = 0.1; // of the run's steps, at the slider's right end

export class Chart {
  #canvas = element("canvas", { class: "pixart-canvas", tabindex: "0", role: "img" });
  #reading = element("div", { class: "pixart-reading", role: "status", hidden: true });
  #empty = element("div", { class: "pixart-empty", text: t("noPoints") });
  #log = element("input", { type: "checkbox", onchange: () => this.draw() });
  #smoothing = element("input", {
    type: "range", min: "0", max: "1", step: "0.05", value: "0.7", oninput: () => this.draw(),
  });
  #legend = element("span", { class: "pixart-legend" });
  #given = { points: [], validation: [], checkpoints: [], steps: 0 };
  #metric = "loss";
  #at = -1; // index of the point that is read
  #view = null;
  #size = new ResizeObserver(() => this.draw());
  #theme = new MutationObserver(() => this.draw());

  constructor() {
    const options = element("div", { class: "pixart-options" }, this.#legend,
      element("label", {}, element("span", { text: t("smoothing") }), this.#smoothing),
      element("label", { title: t("logHelp") }, this.#log, element("span", { text: t("log") })));
    const plot = element("div", { class: "pixart-plot" }, this.#canvas, this.#empty, this.#reading);
    this.root = element("div", { class: "pixart-chart" }, plot, options);
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#read(-1));
    this.#canvas.addEventListener("blur", () => this.#read(-1));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#size.observe(plot);
    this.#theme.observe(document.documentElement, { attributeFilter: ["class", "style"] });
    this.metric = "loss";
  }

  destroy() {
    this.#size.disconnect();
    this.#theme.disconnect();
  }

  get metric() {
    return this.#metric;
  }

  set metric(name) {
    this.#metric = name;
    this.#canvas.setAttribute("aria-label", t("chart", { metric: t(name) }));
    this.draw();
  }

  /** points: "step" events; validation: [[step, loss]]; checkpoints: steps; steps: how many the run will have. */
  show(given) {
    if (given.points[0] !== this.#given.points[0]) this.#at = -1;
    this.#given = given;
    this.draw();
  }

  /** Names the lines and marks that there are. */
  #explain({ raw, validation, checkpoints }) {
    const there = { accent: raw.length, raw: raw.length, check: validation.length, done: checkpoints.length };
    const names = Object.keys(there).filter((colour) => there[colour]);
    if (names.length === this.#legend.children.length) return;
    this.#legend.replaceChildren(...names.map((colour) =>
      element("span", { class: `pixart-key pixart-key-${colour}`, text: t(`line_${colour}`) })));
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const [points, metric] = [this.#given.points, METRICS[this.#metric]];
    this.#empty.hidden = points.length > 0;
    if (!width || !height) return;
    const scale = Math.max(SHARPNESS, devicePixelRatio);
    Object.assign(this.#canvas, { width: width * scale, height: height * scale });
    if (!points.length) return this.#say((this.#view = null));
    const style = getComputedStyle(this.#canvas);
    const pen = this.#canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = `11px ${style.fontFamily}`;
    const [steps, raw] = [points.map((event) => event.step), points.map(metric.of)];
    this.#view = viewOf({
      pen, width, height, steps, raw, log: this.#log.checked, read: metric.read,
      smooth: smooth(steps, raw, this.#smoothing.value ** 2 * SMOOTHEST * this.#given.steps),
      colour: (name) => style.getPropertyValue(`--pixart-${name}`).trim(),
      validation: this.#metric === "loss" ? this.#given.validation : [],
      checkpoints: this.#given.checkpoints,
    });
    this.#at = Math.min(this.#at, points.length - 1);
    drawView(this.#view, this.#at);
    this.#explain(this.#view);
    this.#say(points[this.#at]);
  }

  #point(event) {
    if (!this.#view) return;
    const { steps, toStep } = this.#view;
    const box = this.#canvas.getBoundingClientRect(); // the node may be drawn enlarged
    this.#read(nearest(steps, toStep(((event.clientX - box.left) / box.width) * this.#canvas.clientWidth)));
  }

  #key(event) {
    const last = this.#given.points.length - 1;
    const at = this.#at < 0 ? last : this.#at;
    const target = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
    if (target === undefined || !this.#view) return;
    event.preventDefault();
    event.stopPropagation();
    this.#read(Math.min(last, Math.max(0, target)));
  }

  #read(at) {
    if (at === this.#at) return;
    this.#at = at;
    this.draw();
  }

  /** Writes beside the pointer what the point that is read says. */
  #say(event) {
    this.#reading.hidden = !event;
    if (!event) return;
    const [{ x, width, raw, smooth: smoothed, read }, at] = [this.#view, this.#at];
    const says = [t("step", event), `${t("line_accent")} ${read(smoothed[at])}`, `${t("line_raw")} ${read(raw[at])}`];
    const parts = this.#metric === "loss" ? Object.entries(event.losses ?? {}) : [];
    if (parts.length > 1) says.push(...parts.map(([name, part]) => `${name} ${number(part)}`));
    write(this.#reading, says.join("\n"));
    this.#reading.classList.toggle("pixart-left", x(event.step) > width / 2);
  }
}
