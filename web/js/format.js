/** Numbers as people read them. */

import { locale, t } from "./texts.js";

const GIB = 2 ** 30;

/** Three significant digits, with an exponent where zeros would hide them; a dash for what is no number. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

/** Steps per second, or seconds per step where that is the larger number. */
export function speed(stepsPerSecond) {
  if (!Number.isFinite(stepsPerSecond) || stepsPerSecond <= 0) return "–";
  if (stepsPerSecond >= 1) return t("perSecond", { value: number(stepsPerSecond) });
  return t("perStep", { value: number(1 / stepsPerSecond) });
}

export function memory(bytes) {
  return Number.isFinite(bytes) ? `${number(bytes / GIB)} GiB` : "–";
}

/** Seconds -> "3 min 20 s". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [s, m] = [whole % 60, Math.floor(whole / 60) % 60];
  const [h, d] = [Math.floor(whole / 3600) % 24, Math.floor(whole / 86400)];
  if (d) return t("days", { d, h });
  if (h) return t("hours", { h, m });
  return m ? t("minutes", { m, s }) : t("seconds", { s });
}

/** Unix seconds -> day and time, short. */
export function moment(unix) {
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
  return new Date(unix * 1000).toLocaleString(locale(), options);
}

/** What each chart shows: its value in an event, and how a value reads. */
export const METRICS = {
  loss: { of: (event) => event.loss, read: number },
  lr: { of: (event) => event.lr, read: number },
  grad_norm: { of: (event) => event.grad_norm, read: number },
  speed: { of: (event) => 1 / event.seconds_per_step, read: speed },
  memory_bytes: { of: (event) => event.memory_bytes, read: memory },
};
