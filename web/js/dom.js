/** Elements in one line each. Everything a run says goes through textContent or an attribute, never through HTML. */

/** element("button", {class: "x", text: "Go", title: "...", onclick: f}, child, ...) */
export function element(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Writes a text if it is another one, so that selections and screen readers are left in peace. */
export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Loads the style sheet beside this module. */
export function loadStyles() {
  const href = new URL("./monitor.css", import.meta.url).href;
  document.head.append(element("link", { rel: "stylesheet", href }));
}
