/** What state a run is in, in a word and a sentence. */

import { t } from "./texts.js";

const ENDED = ["done", "stopped", "failed"];

/** The state of a run out of {status, alive}: as it says, or "interrupted" when it ended without a word. */
export function stateOf({ status, alive }) {
  const said = status.state ?? "starting";
  return alive || ENDED.includes(said) ? said : "interrupted";
}

/** One sentence about the state, or "". */
export function sentence({ status, alive, last_checkpoint: checkpoint }) {
  const step = status.step ?? 0;
  switch (stateOf({ status, alive })) {
    case "failed":
      return status.error ?? "";
    case "starting":
      return t("saysStarting");
    case "stopping":
      return t("saysStopping");
    case "stopped":
      return t("saysStopped", { step });
    case "done":
      return status.output ? t("saysDone", { output: status.output }) : "";
    case "interrupted":
      return checkpoint == null ? t("saysLost", { step }) : t("saysInterrupted", { step, checkpoint });
    default:
      return "";
  }
}

/** Share of the steps that are done, 0..1. */
export function progress({ step = 0, steps = 0 }) {
  return steps > 0 ? Math.min(1, step / steps) : 0;
}
