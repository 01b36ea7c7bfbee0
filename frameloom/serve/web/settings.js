// Shape, size, length, steps, seed and the advanced numbers: what the form shows, by what the model says of itself.

import { byId, make } from "./dom.js";
import { SHAPES, lengths, shapeOf, sizeOf, snap, snapFrames, tiers } from "./sizes.js";
import { length } from "./words.js";

const NUMBERS = [
  { name: "guidance_scale", title: "Guidance", step: 0.1, min: 0, help: "how near to the prompt" },
  { name: "guidance_scale_2", title: "Guidance of the second expert", step: 0.1, min: 0, help: "for the finer steps",
    needs: 2 },
  { name: "flow_shift", title: "Flow shift", step: 0.1, min: 0.1, help: "more steps for motion" },
  { name: "fps", title: "Frames per second", step: 1, min: 1, help: "of the file" },
];
const FURTHER = 3; // how many times the usual length the slider reaches

const choice = (group, value, title, ...drawn) =>
  make("label", { class: "choice", title }, make("input", { type: "radio", name: group, value }),
    make("span", {}, ...drawn));

const checked = (group) => document.querySelector(`input[name="${group}"]:checked`)?.value;

/** The numbers of the form. Call `offer` with the model's card first. */
export class Settings {
  #card = null;
  #tiers = [];
  #ratio = null; // of the first picture
  #awaited = false; // the draft has the shape of a picture that is still being read

  /** Build the controls of a model, at its own values. */
  offer(card, loras) {
    this.#card = card;
    this.#tiers = tiers(card.defaults);
    const { defaults, temporal, limits, experts } = card;
    byId("shapes").replaceChildren(...SHAPES.map(shapeChoice), ownChoice());
    byId("tier").replaceChildren(...this.#tiers.map(({ name, usual }) =>
      make("option", { value: name }, usual ? `${name}, usual` : name)));
    Object.assign(byId("width"), { min: card.width_multiple, step: card.width_multiple });
    Object.assign(byId("height"), { min: card.height_multiple, step: card.height_multiple });
    Object.assign(byId("num_frames"), { min: 1, step: temporal });
    const most = snapFrames(defaults.num_frames * FURTHER, temporal);
    Object.assign(byId("length"), { min: 0, max: (most - 1) / temporal, step: 1 });
    byId("lengths").replaceChildren(...lengths(defaults, temporal).map((frames) =>
      make("button", { type: "button", class: "chip", onclick: () => this.#setFrames(frames, true) },
        length(frames, defaults.fps))));
    byId("steps").max = Math.min(limits?.steps ?? Infinity, Math.max(60, defaults.steps * 2));
    const has = ({ name, needs }) => (defaults[name] ?? null) !== null && !(needs && experts && experts < needs);
    byId("numbers").replaceChildren(...NUMBERS.filter(has).map((number) => numberRow(number, defaults[number.name])));
    byId("loras-row").hidden = !loras.length;
    byId("loras").replaceChildren(...loras.map(loraRow));
    this.set({});
  }

  /** Show these values; what is missing takes the model's own. */
  set(values) {
    const { defaults } = this.#card;
    this.#setSize(values);
    this.#setFrames(values.num_frames ?? defaults.num_frames, false);
    byId("steps").value = values.steps ?? defaults.steps;
    const fixed = (values.seed ?? null) !== null;
    document.querySelector(`input[name="seeds"][value="${fixed ? "fixed" : "random"}"]`).checked = true;
    byId("seed").value = values.seed ?? "";
    byId("negative_prompt").value = values.negative_prompt ?? "";
    byId("negative_prompt").placeholder = defaults.negative_prompt ? "The model's own list" : "";
    for (const input of byId("numbers").querySelectorAll("input")) {
      input.value = values[input.name] === defaults[input.name] ? "" : (values[input.name] ?? "");
    }
    const strengths = new Map((values.loras ?? []).map(({ name, scale, strength }) => [name, scale ?? strength ?? 1]));
    for (const box of byId("loras").querySelectorAll("input[type=checkbox]")) {
      box.checked = strengths.has(box.value);
      box.closest("li").querySelector("input[type=number]").value = strengths.get(box.value) ?? 1;
    }
    this.refresh();
  }

  #setSize({ width, height, shape, tier }) {
    const { defaults } = this.#card;
    const usual = this.#tiers.find((each) => each.usual);
    const wished = [width ?? defaults.width, height ?? defaults.height];
    const fitting = this.#tiers.flatMap((each) => SHAPES.map((one) => [one, each])).find(([one, each]) => {
      const size = sizeOf(one.ratio, each, this.#card);
      return size.width === wished[0] && size.height === wished[1];
    });
    byId("tier").value = tier ?? fitting?.[1].name ?? usual.name;
    this.#awaited = shape === "picture" && this.#ratio === null;
    this.#choose(this.#awaited ? shapeOf(...wished) : (shape ?? fitting?.[0].name ?? "own"));
    [byId("width").value, byId("height").value] = wished;
  }

  #choose(shape) {
    const input = document.querySelector(`input[name="shapes"][value="${shape}"]`);
    (input ?? document.querySelector('input[name="shapes"]')).checked = true;
  }

  #setFrames(frames, tell) {
    const input = byId("num_frames");
    input.value = snapFrames(Number(frames) || this.#card.defaults.num_frames, this.#card.temporal);
    if (tell) input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  /** A picture has come (its width through its height) or gone (null): its shape is offered, and chosen if new. */
  follow(ratio, quietly) {
    this.#ratio = ratio;
    const there = document.querySelector('input[name="shapes"][value="picture"]');
    if (ratio === null && there) {
      const chosen = there.checked;
      there.closest("label").remove();
      if (chosen) this.#choose(shapeOf(this.#card.defaults.width, this.#card.defaults.height));
    } else if (ratio !== null && !there) {
      byId("shapes").prepend(choice("shapes", "picture", "The shape of the picture", ratioBox(ratio), "Picture"));
      if (!quietly || this.#awaited) this.#choose("picture");
    }
    this.refresh();
  }

  /** Something was touched: bring what hangs together into line. `done`: the field was left, so it is snapped. */
  touched(target, done) {
    const { temporal } = this.#card;
    if (target.id === "length") byId("num_frames").value = 1 + temporal * Number(target.value);
    if (done) this.#snap(target);
    if (target.name === "seeds" && target.value === "fixed" && byId("seed").value === "") {
      byId("seed").value = randomSeed();
    }
    this.refresh();
  }

  #snap(target) {
    const { width_multiple: across, height_multiple: down, defaults } = this.#card;
    if (target.id === "num_frames") this.#setFrames(target.value, false);
    if (target.id === "width") target.value = snap(Number(target.value) || defaults.width, across);
    if (target.id === "height") target.value = snap(Number(target.value) || defaults.height, down);
  }

  /** Width and height as they stand. */
  get size() {
    const shape = checked("shapes");
    if (shape === "own") {
      const { defaults } = this.#card;
      return { width: Number(byId("width").value) || defaults.width, height: Number(byId("height").value) || defaults.height };
    }
    const tier = this.#tiers.find(({ name }) => name === byId("tier").value) ?? this.#tiers[0];
    const ratio = shape === "picture" ? this.#ratio : SHAPES.find(({ name }) => name === shape)?.ratio;
    return sizeOf(ratio ?? 1, tier, this.#card);
  }

  /** The fields of a request, by the names of the API; what is left to the model is not among them. */
  fields() {
    const numbers = [...byId("numbers").querySelectorAll("input")].filter(({ value }) => value !== "");
    const loras = [...byId("loras").querySelectorAll("input:checked")].map((box) => ({
      name: box.value,
      scale: Number(box.closest("li").querySelector("input[type=number]").value || 1),
    }));
    const negative = byId("negative_prompt").value.trim();
    return {
      ...this.size,
      num_frames: Number(byId("num_frames").value),
      steps: Number(byId("steps").value),
      ...Object.fromEntries(numbers.map(({ name, value }) => [name, Number(value)])),
      ...(negative && { negative_prompt: negative }),
      ...(loras.length && { loras }),
    };
  }

  /** The seed of the next video: the fixed one, or a new one. */
  get seed() {
    return checked("seeds") === "fixed" && byId("seed").value !== "" ? Number(byId("seed").value) : randomSeed();
  }

  /** What a draft keeps besides the fields. */
  kept() {
    const seed = checked("seeds") === "fixed" ? Number(byId("seed").value) : null;
    return { ...this.fields(), seed, shape: checked("shapes"), tier: byId("tier").value };
  }

  refresh() {
    const { defaults, temporal } = this.#card;
    const own = checked("shapes") === "own";
    const { width, height } = this.size;
    byId("own-row").hidden = !own;
    byId("size-row").hidden = own;
    if (!own) [byId("width").value, byId("height").value] = [width, height];
    byId("size-out").textContent = `${width} × ${height}`;
    const frames = Number(byId("num_frames").value) || 1;
    const fps = Number(byId("numbers").querySelector('[name="fps"]')?.value) || defaults.fps;
    byId("length").value = (frames - 1) / temporal;
    byId("length-out").textContent = length(frames, fps);
    for (const chip of byId("lengths").children) {
      chip.setAttribute("aria-pressed", String(chip.textContent === length(frames, defaults.fps)));
    }
    byId("length").setAttribute("aria-valuetext", `${length(frames, fps)}, ${frames} frames`);
    byId("steps-out").textContent = byId("steps").value;
    byId("seed").disabled = checked("seeds") !== "fixed";
    for (const id of ["length", "steps"]) fill(byId(id));
  }
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

/** How far a slider is along, for its style. */
function fill(slider) {
  const share = (Number(slider.value) - Number(slider.min)) / (Number(slider.max) - Number(slider.min) || 1);
  slider.style.setProperty("--share", `${Math.round(share * 100)}%`);
}

function ratioBox(ratio) {
  const box = make("i", { class: "ratio", "aria-hidden": "true" });
  box.style.setProperty("width", `${(14 * Math.min(1, ratio)).toFixed(1)}px`);
  box.style.setProperty("height", `${(14 / Math.max(1, ratio)).toFixed(1)}px`);
  return box;
}

const shapeChoice = ({ name, title, ratio }) => choice("shapes", name, title, ratioBox(ratio), name);
const ownChoice = () => choice("shapes", "own", "Width and height in pixels", "Own");

function numberRow({ name, title, step, min, help }, usual) {
  return make("div", { class: "stack" },
    make("div", { class: "row" },
      make("label", { htmlFor: name }, title),
      make("div", { class: "line" },
        make("input", { id: name, name, type: "number", step: "any", min, placeholder: String(usual),
          inputMode: "decimal", "aria-describedby": `help-${name} error-${name}`, "data-step": String(step) }),
        make("span", { class: "hint", id: `help-${name}` }, help))),
    make("p", { class: "error", id: `error-${name}`, role: "alert" }));
}

function loraRow({ id, name = id }) {
  return make("li", {},
    make("label", { class: "check" }, make("input", { type: "checkbox", value: name, name: "lora" }),
      make("span", {}, name)),
    make("input", { type: "number", step: "0.05", value: "1", inputMode: "decimal", "aria-label": `Strength of ${name}` }));
}
