/** The live monitor of training runs, as an extension of ComfyUI's front end. */

import { app } from "../../../scripts/app.js";
import { loadStyles } from "./dom.js";
import { addPanel } from "./node_panel.js";
import { startFeeds } from "./run_client.js";
import { Sidebar } from "./run_list.js";
import { t } from "./texts.js";

let sidebar = null;

/** ComfyUI calls this again whenever it draws the tab anew. */
function render(target) {
  if (!target || sidebar?.root.parentElement === target) return;
  sidebar?.destroy();
  sidebar = new Sidebar();
  target.append(sidebar.root);
}

function destroy() {
  sidebar?.destroy();
  sidebar = null;
}

app.registerExtension({
  name: "pixartnodes.monitor",
  setup() {
    loadStyles();
    startFeeds();
    app.extensionManager?.registerSidebarTab?.({
      id: "pixart-runs", icon: "pi pi-chart-line", title: t("title"), tooltip: t("tooltip"),
      type: "custom", render, destroy,
    });
  },
  nodeCreated(node) {
    if (node.comfyClass === "PixArtTrain") addPanel(node);
  },
});
