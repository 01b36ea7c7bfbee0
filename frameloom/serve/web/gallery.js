// All videos as cards, newest first. Thumbnails come as they are scrolled to; a card moves while it is pointed at.

import { byId, icon, make } from "./dom.js";
import { isActive, lengthOf, remaining, standing } from "./words.js";

const HOVER_MS = 150;

/** The cards. `choose(video)` is called with the one that was chosen. */
export class Gallery {
  #cards = new Map(); // by id: { item, update }

  constructor(blobs, choose) {
    Object.assign(this, { blobs, choose, chosen: null });
    this.seen = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) if (isIntersecting) this.#load(target);
    }, { rootMargin: "400px" });
  }

  /** Show these, in this order. Cards that stay are left alone; the focus of one that goes passes to its neighbour. */
  list(videos) {
    const list = byId("cards");
    const focused = [...list.children].findIndex((item) => item.contains(document.activeElement));
    const ids = new Set(videos.map(({ id }) => id));
    for (const [id, { item }] of this.#cards) {
      if (!ids.has(id)) item.remove(), this.#cards.delete(id);
    }
    videos.forEach((video, index) => {
      if (!this.#cards.has(video.id)) this.#cards.set(video.id, this.#card(video));
      const { item } = this.#cards.get(video.id);
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
    if (focused >= 0 && !list.contains(document.activeElement)) {
      const near = list.children[Math.min(focused, list.children.length - 1)];
      (near?.firstChild ?? byId("prompt")).focus({ preventScroll: true });
    }
  }

  /** One of them stands otherwise now. */
  update(video) {
    this.#cards.get(video.id)?.update(video);
  }

  /** Mark the one that is shown large. */
  mark(id) {
    this.#cards.get(this.chosen)?.item.firstChild.removeAttribute("aria-current");
    this.#cards.get(id)?.item.firstChild.setAttribute("aria-current", "true");
    this.chosen = id;
  }

  /** Move the focus to the card of a video, or to the first. */
  focus(id) {
    (this.#cards.get(id)?.item ?? byId("cards").firstChild)?.firstChild.focus();
  }

  #card(video) {
    const picture = make("div", { class: "picture" });
    const caption = make("span", { class: "caption" });
    const card = make("button", { type: "button", class: "card", onclick: () => this.choose(card.video) }, picture, caption);
    const item = make("li", {}, card);
    const update = (now) => {
      const before = card.video;
      card.video = now;
      caption.textContent = now.prompt || "A video";
      if (before?.status !== now.status) this.#dress(card, picture, now);
      if (isActive(now)) describe(picture, now);
    };
    card.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.#move(card, picture));
    update(video);
    if (video.id === this.chosen) card.setAttribute("aria-current", "true");
    return { item, update };
  }

  #dress(card, picture, video) {
    picture.className = `picture ${video.status}`;
    if (video.status === "completed") {
      picture.replaceChildren(make("span", { class: "badge" }, lengthOf(video)));
      this.seen.observe(card);
    } else if (video.status === "failed") {
      picture.replaceChildren(icon(video.error?.code === "cancelled" ? "stop" : "alert"), make("span", {}, standing(video)));
    } else {
      picture.replaceChildren(make("span", { class: "now" }), make("span", { class: "left" }),
        make("span", { class: "bar", "aria-hidden": "true" }, make("i")));
    }
  }

  async #load(card) {
    this.seen.unobserve(card);
    try {
      const url = await this.blobs.url(card.video.id, "thumbnail");
      const image = make("img", { src: url, alt: "", decoding: "async" });
      await image.decode();
      card.querySelector(".picture.completed")?.prepend(image);
    } catch {
      // the card shows its prompt and its length all the same
    }
  }

  async #move(card, picture) {
    if (card.video.status !== "completed" || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    let left = false;
    const leave = () => ((left = true), picture.querySelector("video")?.remove());
    card.addEventListener("pointerleave", leave, { once: true });
    await new Promise((resolve) => setTimeout(resolve, HOVER_MS));
    if (left) return;
    try {
      const url = await this.blobs.url(card.video.id, "video");
      if (left) return;
      const player = make("video", { src: url, muted: true, loop: true, playsInline: true, "aria-hidden": "true", tabIndex: -1 });
      picture.prepend(player);
      await player.play();
    } catch {
      leave();
    }
  }
}

function describe(picture, video) {
  picture.querySelector(".now").textContent = standing(video);
  picture.querySelector(".left").textContent = remaining(video);
  picture.querySelector(".bar i").style.setProperty("width", `${video.progress ?? 0}%`);
}
