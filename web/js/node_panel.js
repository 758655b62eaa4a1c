/** The panel inside the node PixArtTrain: it follows the run that the node started, or one that is chosen. */

import { app } from "../../../scripts/app.js";
import { element, write } from "./dom.js";
import { moment } from "./format.js";
import { RunPanel } from "./panel.js";
import { listRuns, onRunChange } from "./run_client.js";
import { stateOf } from "./state.js";
import { t } from "./texts.js";

const WIDGET = "pixart_monitor";
const PROPERTY = "pixart_run"; // saved with the workflow
const WIDTH = 460; // of a new node
const HEIGHT = { empty: 96, run: 640 };

/** The node of an execution id such as "5:12", which is node 12 in the subgraph of node 5. */
function nodeOf(id) {
  let [graph, node] = [app.rootGraph ?? app.graph, null];
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

const nameOf = (node) => node.widgets.find((widget) => widget.name === "output_name")?.value?.trim();

/** Whether a run of this name may be the node's: another graph can have a node of the same number. */
function makes(node, name) {
  const linked = node.inputs?.some((input) => input.name === "output_name" && input.link != null);
  return linked || nameOf(node) === name;
}

function optionOf(run) {
  const says = [run.name || run.id, run.recipe, moment(run.created), t(stateOf(run))];
  return element("option", { value: run.id, text: says.join(" · ") });
}

class NodePanel {
  #node;
  #panel = new RunPanel();
  #choice = element("select", {
    "aria-label": t("chooseRun"), title: t("chooseRun"), hidden: true, onchange: () => this.#attach(this.#choice.value),
  });
  #empty = element("p", { class: "pixart-hint", text: t("noRun") });
  #unhear = onRunChange((change) => this.#hear(change));
  #sight = new IntersectionObserver((entries) => this.#look(entries.at(-1).isIntersecting));
  root = element("div", { class: "pixart pixart-node", role: "region", "aria-label": t("panel") },
    this.#choice, this.#empty, this.#panel.root);

  constructor(node) {
    this.#node = node;
    this.#sight.observe(this.root);
  }

  get height() {
    return this.#panel.run ? HEIGHT.run : HEIGHT.empty;
  }

  destroy() {
    this.#unhear();
    this.#sight.disconnect();
    this.#panel.destroy();
    this.#node = null;
  }

  #look(seen) {
    this.#panel.watch(seen);
    if (seen) this.#refresh();
  }

  #hear({ id, node, name }) {
    if (node != null && nodeOf(node) === this.#node && makes(this.#node, name)) this.#attach(id);
    if (this.#panel.awake) this.#refresh();
  }

  /** Reads the list of runs anew; without a run of its own the node takes the newest with its output name. */
  async #refresh() {
    const runs = await listRuns().catch(() => null);
    if (!runs || !this.#node) return; // the node may have gone while the server answered
    this.#choice.hidden = !runs.length;
    this.#choice.replaceChildren(element("option", { value: "", text: t("chooseRun") }), ...runs.map(optionOf));
    const [own, name] = [this.#node.properties[PROPERTY], nameOf(this.#node)];
    const known = runs.find((run) => run.id === own) ?? runs.find((run) => run.name === name);
    this.#attach(this.#panel.run || known?.id || "");
  }

  #attach(run) {
    const before = this.#panel.run;
    this.#panel.run = run;
    this.#choice.value = run;
    this.#empty.hidden = Boolean(run);
    if (run === before) return;
    this.#node.properties[PROPERTY] = run;
    const [width, height] = this.#node.computeSize();
    this.#node.setSize([Math.max(width, this.#node.size[0]), Math.max(height, this.#node.size[1])]);
    this.#node.setDirtyCanvas(true, true);
  }
}

/** Classic nodes: what the panel does not use goes to the canvas, so that wheel and middle button move the graph. */
function passOn(root) {
  const classic = () => !globalThis.LiteGraph?.vueNodesMode;
  root.addEventListener("wheel", (event) => {
    const within = event.composedPath().filter((part) => part instanceof Element && root.contains(part));
    if (classic() && !within.some((part) => canScroll(part, event))) app.canvas.processMouseWheel(event);
  });
  const pass = (kind, middle, target) =>
    root.addEventListener(kind, (event) => classic() && middle(event) && app.canvas[target](event));
  pass("pointerdown", (event) => event.button === 1, "processMouseDown");
  pass("pointermove", (event) => event.buttons === 4, "processMouseMove");
  pass("pointerup", (event) => event.button === 1, "processMouseUp");
}

function canScroll(part, { deltaX, deltaY }) {
  const { overflowX, overflowY } = getComputedStyle(part);
  const goes = (overflow, delta, at, size, all) =>
    /auto|scroll/.test(overflow) && (delta > 0 ? at + size < all - 1 : delta < 0 && at > 0);
  return goes(overflowY, deltaY, part.scrollTop, part.clientHeight, part.scrollHeight)
    || goes(overflowX, deltaX, part.scrollLeft, part.clientWidth, part.scrollWidth);
}

/** Adds the panel to a node; it goes with the node. */
export function addPanel(node) {
  const panel = new NodePanel(node);
  const widget = node.addDOMWidget(WIDGET, "pixart_monitor", panel.root, {
    serialize: false, hideOnZoom: false, getMinHeight: () => panel.height,
  });
  widget.serialize = false; // neither in the prompt nor in the saved workflow
  passOn(panel.root);
  const removed = node.onRemoved;
  node.onRemoved = function (...given) {
    panel.destroy();
    return removed?.apply(this, given);
  };
  node.setSize([Math.max(WIDTH, node.size[0]), node.computeSize()[1]]);
}
