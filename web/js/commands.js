/** The buttons of a run: Pause or Resume, Sample, Save, Stop. */

import { element, write } from "./dom.js";
import { sendCommand } from "./run_client.js";
import { stateOf } from "./state.js";
import { t } from "./texts.js";

const ICONS = { pause: "pi-pause", resume: "pi-play", sample: "pi-image", save: "pi-save", stop: "pi-stop" };
const FORGOTTEN = 30_000; // ms after which a command counts as done, if nothing says so

/** Whether a command has had its effect on the run. */
const EFFECTS = {
  pause: (feed) => stateOf(feed.details) === "paused",
  resume: (feed) => stateOf(feed.details) === "running",
  sample: ({ heard }, before) => heard.sample > before.sample || heard.warning > before.warning,
  save: ({ heard }, before) => heard.checkpoint > before.checkpoint,
  stop: () => false, // ends with the run
};

export class Commands {
  #buttons = {};
  #says = element("div", { class: "pixart-says", role: "status" });
  #asked = new Map(); // command -> {time, before}
  #feed = null;
  #confirm = this.#makeConfirm();
  root = element("div", { class: "pixart-commands" });

  constructor() {
    for (const name of Object.keys(ICONS)) this.#buttons[name] = this.#makeButton(name);
    const row = element("div", { class: "pixart-buttons" }, ...Object.values(this.#buttons));
    this.root.append(row, this.#confirm, this.#says);
  }

  show(feed) {
    this.#feed = feed;
    this.#update();
  }

  /** Commands no run until the next one is shown. */
  clear() {
    this.#feed = null;
    this.#asked.clear();
    this.#refused("");
    this.#confirm.hidden = true;
    for (const button of Object.values(this.#buttons)) button.disabled = true;
  }

  #update() {
    const { details, trouble } = this.#feed;
    const state = stateOf(details);
    const deaf = !details.alive || trouble !== "";
    for (const [name, { time, before }] of this.#asked) {
      const over = !details.alive || EFFECTS[name](this.#feed, before) || Date.now() - time > FORGOTTEN;
      if (over) this.#asked.delete(name);
    }
    const trains = state === "running" || state === "paused";
    const able = { pause: state === "running", resume: state === "paused", sample: trains, save: trains,
      stop: trains || state === "starting" };
    for (const [name, button] of Object.entries(this.#buttons)) {
      const waits = this.#asked.has(name);
      button.disabled = deaf || !able[name] || waits || this.#asked.has("stop");
      button.setAttribute("aria-busy", String(waits));
    }
    this.#buttons.pause.hidden = state === "paused";
    this.#buttons.resume.hidden = !this.#buttons.pause.hidden;
    if (!details.alive) this.#confirm.hidden = true;
    if (this.#says.classList.contains("pixart-error")) return;
    const waiting = [...this.#asked.keys()].map((name) => t("asked", { command: t(name) }));
    write(this.#says, waiting.join(" "));
  }

  async #send(name) {
    this.#refused("");
    const feed = this.#feed;
    this.#asked.set(name, { time: Date.now(), before: { ...feed.heard } });
    this.#update();
    try {
      await sendCommand(feed.id, name);
    } catch (error) {
      if (feed !== this.#feed) return;
      this.#asked.delete(name);
      this.#refused(t("commandFailed", { command: t(name), reason: error.status ? error.message : t("noAnswer") }));
      this.#update();
    }
    feed.refresh();
  }

  #refused(text) {
    this.#says.classList.toggle("pixart-error", text !== "");
    write(this.#says, text);
  }

  #makeButton(name) {
    const onclick = () => (name === "stop" ? this.#askFirst() : this.#send(name));
    const given = { class: `pixart-button pixart-${name}`, title: t(`${name}Help`), "data-command": name, onclick };
    return element("button", given,
      element("i", { class: `pi ${ICONS[name]}`, "aria-hidden": "true" }), element("span", { text: t(name) }));
  }

  #askFirst() {
    this.#confirm.hidden = false;
    this.#confirm.querySelector("button").focus();
  }

  #makeConfirm() {
    const close = () => {
      this.#confirm.hidden = true;
      this.#buttons.stop.focus();
    };
    const yes = () => {
      close();
      this.#send("stop");
    };
    const given = { class: "pixart-confirm", role: "alertdialog", "aria-label": t("confirmStop"), hidden: true };
    const answer = (name, kind, text, onclick) =>
      element("button", { class: `pixart-button ${kind}`, "data-answer": name, onclick, text: t(text) });
    const box = element("div", given, element("span", { text: t("confirmStop") }),
      answer("no", "", "no", close), answer("yes", "pixart-stop", "yesStop", yes));
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    return box;
  }
}
