/** The pictures of a run: a column for each step, step 0 first and always in sight, a row for each prompt. */

import { element, write } from "./dom.js";
import { sampleAddress } from "./run_client.js";
import { t } from "./texts.js";

export class SampleStrip {
  #body = element("div", { class: "pixart-strip", role: "table", "aria-label": t("samples") });
  #empty = element("div", { class: "pixart-hint", text: t("noSamples") });
  #columns = new Map(); // step -> {column, time}
  #run = "";
  root = element("section", { class: "pixart-samples", "aria-label": t("samples") }, this.#empty, this.#body);

  /** samples: step -> {step, files, time}. */
  show(run, samples) {
    if (run !== this.#run) this.#clear(run);
    for (const [step, { column }] of this.#columns) {
      if (!samples.has(step)) {
        column.remove();
        this.#columns.delete(step);
      }
    }
    const atEnd = this.#body.scrollLeft + this.#body.clientWidth >= this.#body.scrollWidth - 8;
    const shown = this.#columns.size;
    for (const sample of samples.values()) {
      if (this.#columns.get(sample.step)?.time !== sample.time) this.#draw(run, sample, samples);
    }
    this.#empty.hidden = this.#columns.size > 0;
    if (atEnd && this.#columns.size > shown) this.#body.scrollLeft = this.#body.scrollWidth;
  }

  #clear(run) {
    this.#run = run;
    this.#columns.clear();
    this.#body.replaceChildren();
  }

  #draw(run, { step, files, time }, samples) {
    const cells = files.map((file, row) => {
      const picture = element("img", { src: sampleAddress(run, file, time), loading: "lazy", draggable: "false",
        alt: t("sampleAt", { number: row + 1, step }) });
      const label = t("enlarge", { number: row + 1, step });
      const open = () => enlarge(run, samples, step, row);
      return element("div", { role: "cell" }, element("button", { class: "pixart-picture", "aria-label": label,
        title: t("sampleAt", { number: row + 1, step }), onclick: open }, picture));
    });
    const head = element("div", { class: "pixart-step", role: "columnheader", text: t("step", { step }) });
    const column = element("div", { class: "pixart-column", role: "row", "data-step": step }, head, ...cells);
    this.#columns.get(step)?.column.remove();
    const later = [...this.#body.children].find((other) => Number(other.dataset.step) > step);
    this.#body.insertBefore(column, later ?? null);
    this.#columns.set(step, { column, time });
  }
}

/** Shows a picture large, beside the same prompt at step 0. Arrow keys go through steps and prompts, Escape closes. */
function enlarge(run, samples, step, row) {
  const steps = [...samples.keys()].sort((a, b) => a - b);
  const frames = [element("figure"), element("figure")];
  const caption = element("output");
  const go = (columns, rows) => {
    const at = Math.min(steps.length - 1, Math.max(0, steps.indexOf(step) + columns));
    step = steps[at];
    row = Math.min(samples.get(step).files.length - 1, Math.max(0, row + rows));
    const [first, chosen] = frames;
    fill(first, run, samples.get(steps[0]), row);
    fill(chosen, run, samples.get(step), row);
    first.hidden = at === 0 || row >= samples.get(steps[0]).files.length;
    write(caption, t("sampleAt", { number: row + 1, step }));
  };
  const button = (icon, label, onclick) =>
    element("button", { class: "pixart-button", "aria-label": label, title: label, onclick },
      element("i", { class: `pi ${icon}`, "aria-hidden": "true" }));
  const dialog = element("dialog", { class: "pixart pixart-dialog", "aria-label": t("samples") },
    element("div", { class: "pixart-frames" }, ...frames),
    element("div", { class: "pixart-buttons" },
      button("pi-arrow-left", t("earlier"), () => go(-1, 0)), caption,
      button("pi-arrow-right", t("later"), () => go(1, 0)),
      button("pi-times", t("close"), () => dialog.close())));
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the graph has shortcuts of its own
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) go(...move);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  go(0, 0);
  document.body.append(dialog);
  dialog.showModal();
}

function fill(figure, run, { step, files, time }, row) {
  const file = files[row];
  if (!file) return;
  const alt = t("sampleAt", { number: row + 1, step });
  const picture = element("img", { src: sampleAddress(run, file, time), alt });
  figure.replaceChildren(picture, element("figcaption", { text: t("step", { step }) }));
}
