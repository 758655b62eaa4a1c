/** The panel of one run: state, progress, figures, curve, samples, buttons, notes and log. */

import { Chart } from "./chart.js";
import { Commands } from "./commands.js";
import { element, write } from "./dom.js";
import { METRICS, duration } from "./format.js";
import { feedOf, logTail } from "./run_client.js";
import { SampleStrip } from "./samples.js";
import { progress, sentence, stateOf } from "./state.js";
import { t } from "./texts.js";

const NOTES = 20; // warnings that are shown

export class RunPanel {
  awake = false; // whether it is looked at
  #feed = null;
  #shown = -1; // version of the feed
  #lost = ""; // trouble of the feed
  #name = element("strong", { class: "pixart-name" });
  #recipe = element("span", { class: "pixart-recipe" });
  #state = element("span", { class: "pixart-state", role: "status" });
  #says = element("p", { class: "pixart-sentence" });
  #bar = element("div", { class: "pixart-fill" });
  #progress = element("div", { class: "pixart-progress", role: "progressbar", "aria-valuemin": "0" }, this.#bar);
  #step = element("span");
  #left = element("span");
  #tiles = {};
  #chart = new Chart();
  #samples = new SampleStrip();
  #commands = new Commands();
  #notes = element("ul");
  #notesTitle = element("summary");
  #notesBox = element("details", { class: "pixart-notes", hidden: true }, this.#notesTitle, this.#notes);
  #log = element("pre", { tabindex: "0", "aria-label": t("logTail") });
  #logBox = element("details", { class: "pixart-log", ontoggle: () => this.#readLog() },
    element("summary", { text: t("logTail") }), this.#log);
  root = element("article", { class: "pixart-panel", "aria-label": t("panel"), hidden: true });

  constructor() {
    const tiles = element("div", { class: "pixart-tiles", role: "group", "aria-label": t("panel") });
    for (const metric of Object.keys(METRICS)) tiles.append(this.#makeTile(metric));
    this.root.append(
      element("header", { class: "pixart-head" }, this.#name, this.#recipe, this.#state),
      this.#progress,
      element("div", { class: "pixart-ends" }, this.#step, this.#left),
      this.#says, tiles, this.#chart.root, this.#samples.root, this.#commands.root, this.#notesBox, this.#logBox);
    this.#choose("loss");
  }

  get run() {
    return this.#feed?.id ?? "";
  }

  /** Follows another run; "" follows none. */
  set run(id) {
    if (id === this.run) return;
    this.#feed?.leave(this);
    [this.#feed, this.#shown] = [id ? feedOf(id) : null, -1];
    this.root.hidden = true;
    this.#logBox.open = false;
    this.#commands.clear();
    this.#feed?.join(this);
  }

  /** Says whether the panel is looked at: one that is not asks the server for nothing. */
  watch(awake) {
    if (awake === this.awake) return;
    this.awake = awake;
    if (awake) this.#feed?.refresh();
  }

  destroy() {
    this.run = "";
    this.#chart.destroy();
  }

  /** Called by the feed. */
  show(feed) {
    this.#trouble(feed);
    if (!feed.details) return;
    this.root.hidden = false;
    this.#commands.show(feed);
    if (this.#logBox.open) this.#readLog(); // it says more than the events while a trainer starts
    if (feed.version === this.#shown) return;
    this.#shown = feed.version;
    this.#head(feed);
    this.#figures(feed.series.last);
    const [points, steps] = [feed.series.points, feed.details.config.steps ?? 0];
    this.#chart.show({ points, steps, validation: [...feed.validation], checkpoints: [...feed.checkpoints] });
    this.#samples.show(feed.id, feed.samples);
    this.#warnings(feed.notes);
  }

  #trouble({ id, trouble, details }) {
    this.root.classList.toggle("pixart-lost", trouble !== "");
    this.root.classList.toggle("pixart-unknown", !details); // what is drawn is another run's
    if (trouble !== this.#lost) this.#shown = -1; // what was said is said anew
    this.#lost = trouble;
    if (!trouble) return;
    this.root.hidden = false;
    write(this.#state, t(trouble));
    if (details) return;
    write(this.#name, id);
    write(this.#recipe, "");
    Object.assign(this.root.dataset, { run: id, state: "unknown" });
  }

  #head({ details, series }) {
    const { config, status, alive } = details;
    const [state, steps] = [stateOf(details), status.steps ?? config.steps ?? 0];
    const step = Math.max(status.step ?? 0, series.last?.step ?? 0);
    write(this.#name, config.output?.name || details.id);
    write(this.#recipe, config.recipe ?? "");
    write(this.#state, t(this.#lost || state));
    this.root.dataset.state = state;
    this.root.dataset.run = details.id;
    write(this.#says, sentence(details));
    this.#says.hidden = !this.#says.textContent;
    this.#bar.style.width = `${100 * progress({ step, steps })}%`;
    const done = t("stepOf", { step, steps });
    const values = { "aria-valuemax": steps, "aria-valuenow": step, "aria-valuetext": done };
    for (const [name, value] of Object.entries(values)) this.#progress.setAttribute(name, value);
    write(this.#step, done);
    const left = series.secondsPerStep() * (steps - step);
    const takes = alive && state === "running" && Number.isFinite(left);
    write(this.#left, takes ? t("left", { time: duration(left) }) : `${Math.floor(100 * progress({ step, steps }))} %`);
  }

  #figures(event) {
    for (const [metric, { value }] of Object.entries(this.#tiles)) {
      write(value, event ? METRICS[metric].read(METRICS[metric].of(event)) : "–");
    }
  }

  #makeTile(metric) {
    const value = element("span", { class: "pixart-value", text: "–" });
    const label = element("span", { class: "pixart-label", text: t(metric) });
    const onclick = () => this.#choose(metric);
    const given = { class: "pixart-tile", title: t(metric), "data-metric": metric, onclick };
    const button = element("button", given, label, value);
    this.#tiles[metric] = { button, value };
    return button;
  }

  /** The figure that the curve shows. */
  #choose(chosen) {
    this.#chart.metric = chosen;
    for (const [metric, { button }] of Object.entries(this.#tiles)) {
      button.setAttribute("aria-pressed", String(metric === chosen));
    }
  }

  #warnings(notes) {
    this.#notesBox.hidden = !notes.length;
    write(this.#notesTitle, t("notes", { count: notes.length }));
    this.#notes.replaceChildren(...notes.slice(-NOTES).map((text) => element("li", { text })));
  }

  async #readLog() {
    if (!this.#logBox.open || !this.run) return;
    const run = this.run;
    const text = await logTail(run).catch(() => null);
    if (text === null || run !== this.run) return;
    const atEnd = this.#log.scrollTop + this.#log.clientHeight >= this.#log.scrollHeight - 8;
    write(this.#log, text || t("emptyLog"));
    if (atEnd) this.#log.scrollTop = this.#log.scrollHeight;
  }
}
