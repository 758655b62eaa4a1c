/** All runs as a list, and the sidebar that shows it: choosing a run shows its panel. */

import { element, write } from "./dom.js";
import { moment, number } from "./format.js";
import { RunPanel } from "./panel.js";
import { listRuns, onRunChange } from "./run_client.js";
import { progress, stateOf } from "./state.js";
import { t } from "./texts.js";

const POLL = 5000; // ms, while a run goes on

function rowOf(run, choose) {
  const { status } = run;
  const [state, step, steps] = [stateOf(run), run.last?.step ?? status.step ?? 0, status.steps ?? 0];
  const bar = element("span", { class: "pixart-fill" });
  bar.style.width = `${100 * progress({ step, steps })}%`;
  const given = { class: "pixart-row", "data-run": run.id, "data-state": state, onclick: () => choose(run.id) };
  const says = (kind, text) => element("span", { class: kind && `pixart-${kind}`, text });
  const head = element("span", { class: "pixart-head" }, says("name", run.name || run.id), says("recipe", run.recipe),
    says("state", t(state)));
  const ends = element("span", { class: "pixart-ends" }, says("", steps ? t("stepOf", { step, steps }) : ""),
    says("", run.last ? `${t("loss")} ${number(run.last.loss)}` : ""), says("", moment(run.created)));
  return element("li", {}, element("button", given, head, element("span", { class: "pixart-progress" }, bar), ends));
}

export class Sidebar {
  #list = element("ul", { class: "pixart-list" });
  #empty = element("p", { class: "pixart-hint", hidden: true });
  #overview = element("div", {}, this.#empty, this.#list);
  #panel = new RunPanel();
  #back = element("button", { class: "pixart-button pixart-back", hidden: true, onclick: () => this.#choose("") },
    element("i", { class: "pi pi-arrow-left", "aria-hidden": "true" }), element("span", { text: t("allRuns") }));
  #timer = 0;
  #said = "";
  #unhear = onRunChange(() => this.#refresh());
  root = element("div", { class: "pixart pixart-sidebar", role: "region", "aria-label": t("title") },
    element("h2", { text: t("title") }), this.#back, this.#overview, this.#panel.root);

  constructor() {
    this.#panel.watch(true);
    this.#refresh();
  }

  destroy() {
    this.#unhear();
    clearTimeout(this.#timer);
    this.#timer = -1;
    this.#panel.destroy();
    this.root.remove();
  }

  #choose(run) {
    this.#panel.run = run;
    this.#back.hidden = !run;
    this.#overview.hidden = Boolean(run);
    (run ? this.#back : this.#list.querySelector("button"))?.focus();
    this.#refresh();
  }

  async #refresh() {
    if (this.#timer === -1) return;
    clearTimeout(this.#timer);
    let goesOn = true;
    if (!document.hidden && !this.#overview.hidden) {
      const runs = await listRuns().catch(() => null);
      if (this.#timer === -1) return;
      this.#show(runs);
      goesOn = runs === null || runs.some((run) => run.alive);
    }
    clearTimeout(this.#timer); // of a second call meanwhile
    if (goesOn && !this.#overview.hidden) this.#timer = setTimeout(() => this.#refresh(), POLL);
  }

  /** runs: null when there was no answer. */
  #show(runs) {
    const said = JSON.stringify(runs);
    if (said === this.#said) return;
    this.#said = said;
    this.#empty.hidden = Boolean(runs?.length);
    write(this.#empty, runs ? t("noRuns") : t("noAnswer"));
    if (!runs) return;
    const focused = document.activeElement?.dataset?.run;
    this.#list.replaceChildren(...runs.map((run) => rowOf(run, (id) => this.#choose(id))));
    if (focused) [...this.#list.querySelectorAll("button")].find((row) => row.dataset.run === focused)?.focus();
  }
}
