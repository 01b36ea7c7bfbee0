// The chosen video, large: played when it is there, and till then what becomes of it.

import { ApiError } from "./api.js";
import { announce, button, byId, icon, make } from "./dom.js";
import { ago, bytes, isActive, lengthOf, remaining, shape, standing } from "./words.js";

const EXAMPLES = {
  small: ["a red circle moving left on a white background", "a purple star spinning on a cream background",
    "a green square bouncing, a navy to black gradient", "a blue triangle growing on a yellow background"],
  large: ["A red fox trots through fresh snow at dawn, breath in the air, shallow depth of field",
    "Waves break on black volcanic rocks, slow motion, drone shot from above",
    "A paper boat sails down a rainy city gutter, neon reflections, close-up"],
};
const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Shows one video, or an invitation. `actions`: what its buttons do, by name, with the video as their argument. */
export class Stage {
  #shown = ""; // which video, in which state
  #preview = { version: 0, url: "" };
  #told = ""; // to screen readers
  #parts = {};

  constructor(api, blobs, actions) {
    Object.assign(this, { api, blobs, actions });
    this.box = byId("stage");
  }

  /** The page waits for the first answer. */
  showLoading() {
    this.#frame("loading", make("div", { class: "media blank" }, make("p", { class: "waiting" }, "Looking for your videos…")));
  }

  /** The server wants a key, and none was given. */
  showLocked() {
    this.#frame("locked", make("div", { class: "empty" }, icon("key"), make("h2", {}, "This server asks for a key"),
      make("p", {}, "With it you see your videos and make new ones."),
      button("Enter the key", "key", () => this.actions.unlock(), "plain")));
  }

  /** There is nothing yet. */
  showEmpty(isSmall) {
    const focused = this.box.contains(document.activeElement);
    if (!this.#frame(`empty ${isSmall}`)) return;
    const examples = EXAMPLES[isSmall ? "small" : "large"];
    this.box.replaceChildren(
      make("div", { class: "empty" }, icon("film"),
        make("h2", {}, "Your first video starts with a sentence"),
        make("p", {}, "Write what it should show, or begin with one of these:"),
        make("ul", { class: "examples" }, ...examples.map((text) =>
          make("li", {}, make("button", { type: "button", class: "example", onclick: () => this.actions.suggest(text) }, text))))));
    if (focused) this.box.focus({ preventScroll: true });
  }

  /** A video, as it stands. */
  show(video) {
    if (this.#frame(`${video.id} ${video.status}`)) this.#build(video);
    if (isActive(video)) this.#progress(video);
    this.#tell(video);
  }

  #frame(name, ...children) {
    if (this.#shown === name) return false;
    this.#shown = name;
    this.#letGo();
    if (children.length) this.box.replaceChildren(...children);
    return true;
  }

  #letGo() {
    URL.revokeObjectURL(this.#preview.url);
    this.#preview = { version: 0, url: "" };
  }

  #build(video) {
    const focused = this.box.contains(document.activeElement);
    const media = make("div", { class: "media" });
    const { width, height } = shape(video);
    media.style.setProperty("--ratio", String(width / height));
    media.classList.toggle("small", Math.max(width, height) <= 256);
    const status = make("div", { class: "standing" });
    this.#parts = { media, status };
    const fill = { queued: this.#fillActive, in_progress: this.#fillActive, completed: this.#fillDone, failed: this.#fillFailed };
    (fill[video.status] ?? this.#fillActive).call(this, video);
    this.box.replaceChildren(media, make("div", { class: "about" },
      status, make("h2", { class: "prompt" }, video.prompt ?? ""), facts(video), this.#buttons(video)));
    if (focused) this.box.focus({ preventScroll: true });
  }

  #fillActive() {
    const { media, status } = this.#parts;
    const image = make("img", { alt: "What the video is becoming", class: "preview", hidden: true });
    const line = make("span", { class: "now" });
    const left = make("span", { class: "left" });
    const bar = make("progress", { max: 100, "aria-label": "Progress of the video" });
    media.classList.add("blank");
    media.append(image);
    status.append(make("p", {}, line, left), bar);
    Object.assign(this.#parts, { image, line, left, bar });
  }

  #progress(video) {
    const { media, line, left, bar } = this.#parts;
    line.textContent = standing(video);
    left.textContent = remaining(video);
    media.classList.toggle("working", video.status === "in_progress");
    if (video.status === "queued") bar.removeAttribute("value");
    else bar.value = video.progress ?? 0;
    bar.setAttribute("aria-valuetext", [`${video.progress ?? 0} percent`, line.textContent, left.textContent].filter(Boolean).join(", "));
    bar.hidden = video.status === "queued";
    if ((video.preview_version ?? 0) > this.#preview.version) this.#draw(video);
  }

  async #draw(video) {
    const name = this.#shown;
    this.#preview.version = video.preview_version;
    try {
      const url = URL.createObjectURL(await this.api.preview(video.id, video.preview_version));
      if (this.#shown !== name) return URL.revokeObjectURL(url);
      URL.revokeObjectURL(this.#preview.url);
      this.#preview.url = url;
      Object.assign(this.#parts.image, { src: url, hidden: false });
    } catch {
      // the next one will do
    }
  }

  async #fillDone(video) {
    const { media } = this.#parts;
    const name = this.#shown;
    const player = make("video", { controls: true, loop: true, muted: true, playsInline: true, preload: "auto",
      "aria-label": `Video: ${video.prompt ?? ""}` });
    media.append(player);
    this.blobs.url(video.id, "thumbnail").then((url) => (player.poster = url), () => {});
    try {
      const url = await this.blobs.url(video.id, "video");
      if (this.#shown !== name) return;
      player.src = url;
      if (!isStill()) player.play().catch(() => {});
    } catch (error) {
      if (this.#shown !== name) return;
      media.classList.add("blank");
      media.replaceChildren(problem(error.message), button("Try again", null, () => {
        this.#shown = "";
        this.show(video);
      }));
      if (!(error instanceof ApiError)) this.actions.offline();
    }
  }

  #fillFailed(video) {
    const cancelled = video.error?.code === "cancelled";
    this.#parts.media.classList.add("blank", "failed");
    this.#parts.media.append(problem(cancelled ? "Cancelled before it was done." : video.error?.message ?? "It failed."));
    if (!cancelled && video.attempts > 1) {
      this.#parts.status.append(make("p", {}, `It was tried ${video.attempts} times.`));
    }
  }

  #buttons(video) {
    const { actions } = this;
    const row = make("div", { class: "actions" });
    if (isActive(video)) row.append(button("Cancel", "stop", () => actions.cancel(video), "plain"));
    if (video.status === "completed") row.append(button("Download", "download", () => actions.download(video), "plain"));
    row.append(button(video.status === "failed" ? "Try again" : "Remix", "remix", () => actions.remix(video), "plain"));
    row.append(button("Copy as command", "terminal", () => actions.copyCommand(video)));
    row.append(button("Copy as curl", "link", () => actions.copyCurl(video)));
    if (!isActive(video)) row.append(button("Delete", "trash", () => actions.remove(video)));
    return row;
  }

  /** Say what is worth an interruption: starts, quarters, the end. */
  #tell(video) {
    const quarter = 25 * Math.floor((video.progress ?? 0) / 25);
    const told = `${video.id} ${video.status} ${video.status === "in_progress" ? quarter : ""}`;
    if (told === this.#told) return;
    const isNews = this.#told.startsWith(video.id);
    this.#told = told;
    if (video.status === "completed" && isNews) announce("The video is done.");
    else if (video.status === "failed" && isNews) announce(`The video failed: ${video.error?.message ?? ""}`);
    else if (video.status === "queued") announce(standing(video));
    else if (video.status === "in_progress") announce(quarter ? `${quarter} percent` : "The video has been started.");
  }
}

const problem = (text) => make("p", { class: "problem" }, icon("alert"), make("span", {}, text));

function facts(video) {
  const { width, height, frames } = shape(video);
  const told = [
    `${width} × ${height}`, lengthOf(video), frames && `${frames} frames`, video.steps && `${video.steps} steps`,
    (video.seed ?? null) !== null && `seed ${video.seed}`,
    ...(video.loras ?? []).map(({ name, scale, strength }) => `${name} ${scale ?? strength ?? 1}`),
    video.bytes && bytes(video.bytes), ago(video.created_at),
  ];
  return make("ul", { class: "facts", "aria-label": "Settings" }, ...told.filter(Boolean).map((text) => make("li", {}, text)));
}
