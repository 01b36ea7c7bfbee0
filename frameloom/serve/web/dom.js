// Small helpers over the document. Text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element with properties (attributes where the name has a dash, or `role`) and children; strings are text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A drawing of the page's own set, see index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with a drawing and a text. */
export function button(text, drawing, onclick, kind = "quiet") {
  return make("button", { type: "button", class: kind, onclick }, drawing && icon(drawing), make("span", {}, text));
}

/** Tell a screen reader something, politely. */
export function announce(text) {
  byId("announce").textContent = text;
}

let toastTimer = 0;

/** A short message at the edge of the page, which goes by itself. */
export function toast(text) {
  byId("toast").textContent = text;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (byId("toast").textContent = ""), 4000);
}

/** Show a dialog; what it is closed with, and by Escape `usual`. */
export function closed(dialog, usual) {
  dialog.dispatchEvent(new Event("close")); // of the last time: the browser's own comes later, perhaps in this one
  dialog.returnValue = usual;
  dialog.showModal();
  return new Promise((resolve) => {
    const told = () => {
      if (dialog.open) return;
      dialog.removeEventListener("close", told);
      resolve(dialog.returnValue);
    };
    dialog.addEventListener("close", told);
  });
}

/** Ask before something is lost; true if the answer is yes. Escape is no. */
export async function confirmed(title, text, yes) {
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-yes").textContent = yes;
  return (await closed(byId("ask-dialog"), "no")) === "yes";
}

/** Put a text on the clipboard; also where the page is not served over HTTPS. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text, class: "sr", "aria-hidden": "true" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
  return true;
}
