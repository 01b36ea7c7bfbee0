// The form: what is asked for, what it would take, and what was wrong with it.

import { ApiError, OfflineError } from "./api.js";
import { announce, byId, make } from "./dom.js";
import * as draft from "./draft.js";
import { Pictures } from "./pictures.js";
import { Settings } from "./settings.js";
import { bytes, duration } from "./words.js";

const FORECAST_MS = 250; // after the last touch
const NOT_READY = "The server has not said yet what its model can do; wait a moment.";
const PLACES = {
  prompt: "prompt", input_reference: "input_reference", last_image: "input_reference",
  size: "size", width: "size", height: "size", num_frames: "num_frames", seconds: "num_frames", steps: "steps",
  seed: "seed", negative_prompt: "negative_prompt", loras: "loras",
}; // where the sentence about a parameter is shown

/** The form. `submitted(fields, pictures, source)` is called with what is asked for; it may throw what the API throws. */
export class Composer {
  #card = null;
  #forecast = { timer: 0, asked: null };
  #source = null; // a video whose pictures are taken over
  #busy = false;
  #sent = null; // the token and the seed of a request whose answer was lost: the server makes it once
  #countdown = 0;
  #passing = ""; // a sentence about the server, which is true only as long as the server stands so

  constructor(api, submitted) {
    Object.assign(this, { api, submitted });
    this.settings = new Settings();
    this.pictures = new Pictures({
      onchange: (ratio, quietly) => (this.settings.follow(ratio, quietly), this.#changed()),
      onerror: (text) => this.#say("input_reference", text),
    });
    const form = byId("form");
    form.addEventListener("submit", (event) => (event.preventDefault(), this.#submit()));
    form.addEventListener("input", ({ target }) => this.#touched(target, false));
    form.addEventListener("change", ({ target }) => this.#touched(target, true));
    form.addEventListener("keydown", (event) => this.#key(event));
    byId("reset").addEventListener("click", () => (this.settings.set({}), this.#changed()));
    const kept = draft.load();
    byId("prompt").value = kept.prompt ?? "";
    byId("advanced").open = kept.advanced ?? false;
    byId("advanced").addEventListener("toggle", () => this.#keep());
  }

  /** Whether the model is known. */
  get isReady() {
    return this.#card !== null;
  }

  /** The model is known: its controls are shown, with the draft that was kept. */
  async offer(card, loras) {
    if (this.#card) return;
    this.settings.offer(card, loras);
    this.#card = card;
    this.settings.set(draft.load().values ?? {});
    byId("form").classList.add("ready");
    this.relieve();
    await this.pictures.offer(card.takes ?? []);
    this.#changed();
  }

  /** The server is well again: what was said of its state is over. */
  relieve() {
    if (this.#passing && byId("error-form").textContent === this.#passing) this.#say("form", "");
    this.#passing = "";
  }

  /** Ask for another video like this one. */
  fill(video) {
    byId("prompt").value = video.prompt ?? "";
    if (this.#card) this.settings.set({ ...video, shape: undefined });
    this.#takeOver(video.inputs?.length ? video : null);
    this.#changed();
    byId("prompt").focus();
    byId("prompt").select();
  }

  /** Put a prompt into the form. */
  suggest(prompt) {
    byId("prompt").value = prompt;
    this.#changed();
    byId("prompt").focus();
  }

  #takeOver(video) {
    this.#source = video;
    const note = byId("from-source");
    note.hidden = !video;
    if (video) {
      this.pictures.clear();
      note.replaceChildren(
        "It starts from the pictures of the earlier video, with its settings; only the prompt can be changed. ",
        make("button", { type: "button", class: "link", onclick: () => this.#takeOver(null) }, "Start without them"),
      );
    }
    for (const part of document.querySelectorAll("#form .row, #advanced")) part.inert = Boolean(video);
  }

  #touched(target, done) {
    if (!this.#card) return this.#keep();
    if (target.id !== "prompt" && target.id !== "file") this.settings.touched(target, done);
    for (const id of (target.getAttribute("aria-describedby") ?? "").split(" ")) {
      if (id.startsWith("error-")) this.#say(id.slice("error-".length), "");
    }
    this.#changed();
  }

  #changed() {
    this.#sent = null;
    this.#keep();
    clearTimeout(this.#forecast.timer);
    this.#forecast.timer = setTimeout(() => this.#foresee(), FORECAST_MS);
  }

  #keep() {
    const values = this.#card ? this.settings.kept() : draft.load().values;
    draft.save({ prompt: byId("prompt").value, advanced: byId("advanced").open, values });
  }

  #key(event) {
    if (event.key !== "Enter" || event.isComposing) return;
    const typed = event.target.id === "prompt" && !event.shiftKey && !matchMedia("(pointer: coarse)").matches;
    if (typed || event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.#submit();
    }
  }

  async #foresee() {
    if (!this.#card) return;
    this.#forecast.asked?.abort();
    const asked = (this.#forecast.asked = new AbortController());
    const { width, height, num_frames, steps, guidance_scale } = this.settings.fields();
    const fields = { width, height, num_frames, steps, ...(guidance_scale !== undefined && { guidance_scale }) };
    try {
      const told = await this.api.estimate(fields, asked.signal);
      if (asked.signal.aborted) return;
      this.#tell(told);
    } catch (error) {
      if (error.name === "AbortError") return;
      byId("forecast").textContent = "";
      if (error instanceof ApiError && error.status === 400) this.#place(error);
    }
  }

  #tell({ seconds, memory_bytes, refusal }) {
    this.#say("size", refusal || "");
    const parts = [seconds ? `about ${duration(seconds)}` : "", memory_bytes ? `${bytes(memory_bytes)} of memory` : ""];
    byId("forecast").textContent = refusal ? "" : parts.filter(Boolean).join(" · ");
  }

  async #submit() {
    if (this.#busy) return;
    this.#clear();
    const prompt = byId("prompt").value.trim();
    if (!prompt) {
      this.#say("prompt", "Say what the video should show.");
      return byId("prompt").focus();
    }
    if (!this.#card) return this.#say("form", (this.#passing = NOT_READY));
    this.#setBusy(true);
    this.#sent ??= { token: newToken(), seed: this.settings.seed }; // the same again after a lost answer
    const { token, seed } = this.#sent;
    try {
      const fields = { prompt, ...this.settings.fields(), seed };
      await this.submitted(fields, this.pictures.files(), { source: this.#source, token });
      this.#sent = null;
      this.#takeOver(null);
    } catch (error) {
      if (error instanceof ApiError && error.status < 500) this.#sent = null; // a proxy's 502 is a lost answer, too
      this.#place(error);
    } finally {
      this.#setBusy(false);
    }
  }

  #setBusy(busy) {
    this.#busy = busy;
    byId("generate").setAttribute("aria-busy", String(busy));
    byId("generate").textContent = busy ? "Sending…" : "Generate";
  }

  #place(error) {
    if (error.status === 429 && error.retry_s) return this.#wait(error.message, error.retry_s);
    const base = (error.param ?? "").split(/[.[]/)[0];
    const place = PLACES[base] ?? (base && byId(`error-${base}`) ? base : "form");
    this.#say(place, sentence(error));
    if (error instanceof OfflineError || error.status === 503) this.#passing = sentence(error);
    const field = byId(place === "size" ? "tier" : place);
    if (field?.closest("details")) byId("advanced").open = true;
    if (field && document.activeElement === byId("generate")) field.focus();
  }

  #wait(text, seconds) {
    const until = Date.now() + seconds * 1000;
    this.#say("form", text);
    const show = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      byId("forecast").textContent = left > 0 ? `Come again in ${duration(left)}` : "";
      if (left > 0) return;
      clearInterval(this.#countdown);
      this.#say("form", "There may be room now: try again.");
    };
    clearInterval(this.#countdown);
    this.#countdown = setInterval(show, 1000);
    show();
  }

  #clear() {
    clearInterval(this.#countdown);
    for (const place of document.querySelectorAll("#form .error")) this.#say(place.id.slice("error-".length), "");
  }

  #say(place, text) {
    const line = byId(`error-${place}`);
    if (line.textContent === text) return;
    line.textContent = text;
    byId(place === "size" ? "tier" : place)?.setAttribute("aria-invalid", String(Boolean(text)));
    if (text && place === "size") announce(text);
  }
}

function sentence(error) {
  if (error instanceof ApiError) return error.message;
  if (error instanceof OfflineError) return `${error.message} Your request is kept here; try again in a moment.`;
  return "Something went wrong on this page; reload it. What you typed is kept.";
}

const newToken = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
