/** The server's runs, and what is new in the ones that somebody looks at. */

import { api } from "../../../scripts/api.js";
import { Series } from "./series.js";

const POLL = 1000; // ms between looks at a run that goes on
const PATIENCE = 10_000; // ms between tries, at most, while ComfyUI does not answer
const POINTS = 1000; // of a curve that is read from its start
const LOG_BYTES = 16_384;
const CHANGED = "pixart.run"; // ComfyUI's websocket: {id, state}, and {node, name} when this page asked for the run

const runPath = (id, rest = "") => `/pixart/runs/${encodeURIComponent(id)}${rest}`;

/** A parsed answer. Throws an Error with the server's sentence and its `status`; no status: no answer. */
async function ask(path, options) {
  const reply = await api.fetchApi(path, { cache: "no-store", ...options });
  if (reply.ok) return reply.json();
  const { error } = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(error ?? `HTTP ${reply.status}`), { status: reply.status });
}

/** All runs, newest first. */
export async function listRuns() {
  return (await ask("/pixart/runs")).runs;
}

/** The end of a run's log. */
export async function logTail(id) {
  return (await ask(runPath(id, `/log?offset=-${LOG_BYTES}`))).text;
}

/** Address of a picture; `version` changes when the same step is drawn again. */
export function sampleAddress(id, file, version) {
  return api.apiURL(runPath(id, `/samples/${encodeURIComponent(file)}?version=${version ?? 0}`));
}

/** "pause", "resume", "sample", "save" or "stop". Throws an Error with one sentence. */
export async function sendCommand(id, command) {
  const headers = { "Content-Type": "application/json" };
  await ask(runPath(id, "/commands"), { method: "POST", headers, body: JSON.stringify({ command }) });
}

/** Calls listener({id, state, node, name}) when a run starts, changes or ends, and with {} when ComfyUI is back.

Returns the function that ends it. */
export function onRunChange(listener) {
  const [changed, back] = [(event) => listener(event.detail), () => listener({})];
  api.addEventListener(CHANGED, changed);
  api.addEventListener("reconnected", back);
  return () => {
    api.removeEventListener(CHANGED, changed);
    api.removeEventListener("reconnected", back);
  };
}

/** What is known of one run. Asks once a second while it goes on, and not at all while nobody looks. */
class Feed {
  details = null; // the server's answer: config, status, alive, last_checkpoint
  trouble = ""; // "" or "noAnswer" or "gone"
  version = 0; // changes whenever something is new
  series = new Series();
  samples = new Map(); // step -> "sample" event
  validation = new Map(); // step -> loss
  checkpoints = new Set(); // steps
  notes = []; // sentences of warnings
  heard = { sample: 0, checkpoint: 0, warning: 0 }; // events of these types
  #offset = 0;
  #failures = 0;
  #timer = 0;
  #asking = false;
  #again = false;
  #viewers = new Set();

  constructor(id) {
    this.id = id;
  }

  /** A viewer has `awake`, whether it is looked at, and show(feed), which is called when something is new. */
  join(viewer) {
    this.#viewers.add(viewer);
    if (this.details) viewer.show(this);
    this.refresh();
  }

  leave(viewer) {
    this.#viewers.delete(viewer);
    if (this.#viewers.size) return;
    clearTimeout(this.#timer);
    feeds.delete(this.id);
  }

  /** Looks now, and goes on looking while the run goes on. */
  async refresh() {
    clearTimeout(this.#timer);
    this.#again = this.#asking;
    if (this.#asking || !this.#watched()) return;
    this.#asking = true;
    try {
      await this.#look();
      [this.trouble, this.#failures] = ["", 0];
    } catch (error) {
      this.trouble = error.status === 404 ? "gone" : "noAnswer";
      this.#failures += 1;
    }
    this.#asking = false;
    for (const viewer of this.#viewers) viewer.show(this);
    if (this.#again) this.refresh();
    else if (this.#watched() && this.#goesOn()) this.#timer = setTimeout(() => this.refresh(), this.#pause());
  }

  #watched() {
    return !document.hidden && [...this.#viewers].some((viewer) => viewer.awake);
  }

  #goesOn() {
    return this.trouble ? this.trouble === "noAnswer" : this.details.alive;
  }

  #pause() {
    return Math.min(PATIENCE, POLL * 2 ** this.#failures);
  }

  async #look() {
    const details = await ask(runPath(this.id)); // first: when the run has ended, its events are all there
    const news = await ask(runPath(this.id, `/events?offset=${this.#offset}&points=${POINTS}`));
    const changed = news.events.length || news.start !== this.#offset || JSON.stringify(details) !== JSON.stringify(this.details);
    if (changed) this.version += 1;
    if (news.start !== this.#offset) this.#forget(); // somebody has written the events anew
    [this.details, this.#offset] = [details, news.offset];
    for (const event of news.events) this.#take(event);
  }

  #take(event) {
    if (event.type in this.heard) this.heard[event.type] += 1;
    if (event.type === "step") {
      if (event.step <= this.series.last?.step) this.#goBack(event.step);
      this.series.add(event);
    } else if (event.type === "sample") this.samples.set(event.step, event);
    else if (event.type === "validation") this.validation.set(event.step, event.loss);
    else if (event.type === "checkpoint") this.checkpoints.add(event.step);
    else if (event.type === "warning") this.notes.push(event.text);
  }

  #forget() {
    this.series = new Series();
    for (const kept of [this.samples, this.validation, this.checkpoints]) kept.clear();
    this.notes = [];
  }

  /** The run went on from a checkpoint: what came of later weights is no more. */
  #goBack(step) {
    this.series.cut(step);
    for (const kept of [this.samples, this.validation, this.checkpoints]) {
      for (const later of [...kept.keys()].filter((key) => key >= step)) kept.delete(later);
    }
  }
}

const feeds = new Map(); // id -> Feed with viewers

/** The feed of a run, shared by all who view it. */
export function feedOf(id) {
  if (!feeds.has(id)) feeds.set(id, new Feed(id));
  return feeds.get(id);
}

/** Feeds look again when a run tells, when ComfyUI is back, and when the page is looked at. Called once. */
export function startFeeds() {
  const refresh = (id) => [...feeds.values()].filter((feed) => !id || feed.id === id).forEach((feed) => feed.refresh());
  onRunChange(({ id }) => refresh(id));
  document.addEventListener("visibilitychange", () => refresh());
}
