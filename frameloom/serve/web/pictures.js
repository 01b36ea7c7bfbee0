// The pictures that a video starts from: chosen, dropped or pasted, shown, and taken away again.

import { byId, icon, make } from "./dom.js";
import { loadPicture, savePicture } from "./draft.js";

const TITLES = { input_reference: "First frame", last_image: "Last frame" };
const FIRST = "input_reference";
const TYPES = ["image/png", "image/jpeg", "image/webp"];

/** Holds one picture for each name that the model takes. Tells `onchange(picture's ratio or null)`. */
export class Pictures {
  #takes = [];
  #held = new Map();
  #wanted = FIRST;

  constructor({ onchange, onerror }) {
    this.onchange = onchange;
    this.onerror = onerror;
    const box = byId("prompt-box");
    for (const name of Object.keys(TITLES)) byId(`add-${name}`).addEventListener("click", () => this.#choose(name));
    byId("file").addEventListener("change", (event) => this.#give([...event.target.files]));
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length && this.#takes.length) event.preventDefault();
      this.#give(files);
    });
    document.addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      box.classList.toggle("dropping", this.#takes.length > 0);
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget ?? box.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      box.classList.remove("dropping");
      this.#give([...event.dataTransfer.files]);
    });
  }

  /** Offer what the model takes, and bring back what was chosen before a reload. */
  async offer(takes) {
    this.#takes = Object.keys(TITLES).filter((name) => takes.includes(name));
    for (const name of this.#takes) {
      const kept = await loadPicture(name);
      if (kept && !this.#held.has(name)) await this.#hold(name, kept, { quietly: true });
    }
    this.#show();
  }

  /** The files, by the names of the API. */
  files() {
    return Object.fromEntries([...this.#held].map(([name, { file }]) => [name, file]));
  }

  /** Width through height of the first picture; null where there is none. */
  get ratio() {
    return this.#held.values().next().value?.ratio ?? null;
  }

  clear() {
    for (const name of [...this.#held.keys()]) this.#drop(name);
  }

  #choose(name) {
    this.#wanted = name;
    byId("file").value = "";
    byId("file").click();
  }

  async #give(files) {
    if (!files.length) return;
    if (!this.#takes.length) return this.onerror("This model starts from text alone; it takes no picture.");
    const file = files.find((each) => TYPES.includes(each.type));
    if (!file) return this.onerror(`${files[0].name || "This"} is no PNG, JPEG or WebP picture; choose one of these.`);
    const free = this.#takes.find((name) => !this.#held.has(name));
    const name = this.#takes.includes(this.#wanted) && !this.#held.has(this.#wanted) ? this.#wanted : free;
    await this.#hold(name ?? FIRST, file, { quietly: false });
  }

  async #hold(name, file, { quietly }) {
    const url = URL.createObjectURL(file);
    const image = make("img", { src: url, alt: TITLES[name] });
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      return this.onerror(`${file.name || "The picture"} cannot be read; is it whole?`);
    }
    if (this.#held.has(name)) URL.revokeObjectURL(this.#held.get(name).url);
    this.#held.set(name, { file, url, ratio: image.naturalWidth / image.naturalHeight });
    this.#wanted = FIRST;
    if (!quietly) {
      this.onerror("");
      await savePicture(name, file);
    }
    this.#show();
    this.onchange(this.ratio, quietly);
  }

  #drop(name) {
    URL.revokeObjectURL(this.#held.get(name).url);
    this.#held.delete(name);
    savePicture(name, null);
    this.#show();
    this.onchange(this.ratio, false);
  }

  #show() {
    const list = byId("pictures");
    list.hidden = !this.#held.size;
    list.replaceChildren(
      ...[...this.#held].map(([name, { url, file }]) =>
        make(
          "li",
          {},
          make("img", { src: url, alt: `${TITLES[name]}: ${file.name || "a pasted picture"}` }),
          make("span", {}, TITLES[name]),
          make("button", { type: "button", class: "bare", "aria-label": `Remove the ${TITLES[name].toLowerCase()}`,
            onclick: () => this.#remove(name) }, icon("close")),
        ),
      ),
    );
    for (const name of Object.keys(TITLES)) {
      const follows = name !== "last_image" || this.#held.has(FIRST);
      byId(`add-${name}`).hidden = !this.#takes.includes(name) || this.#held.has(name) || !follows;
    }
  }

  #remove(name) {
    this.#drop(name);
    if (name === FIRST && this.#held.has("last_image")) this.#drop("last_image");
    byId(`add-${name}`).focus();
  }
}
