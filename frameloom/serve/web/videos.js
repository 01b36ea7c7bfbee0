// The jobs of this key, newest first, kept up to date: one is watched step by step, the others are asked for.

import { ApiError } from "./api.js";
import { isActive } from "./words.js";

const PAGE = 24;
const POLL_MS = 3000;
const AGAIN_MS = [500, 1000, 2000, 5000]; // waits before a broken connection is tried again

/** Tells of changes by events: "list" (which there are), "video" (detail: one of them), "offline" and "online". */
export class Videos extends EventTarget {
  #byId = new Map();
  #order = []; // their ids, as the server lists them
  #last = null; // the oldest that a page has brought
  #watched = null; // { id, stop }
  #wished = null; // the id to watch, if it is active
  #polling = 0;
  #turning = false; // to the next page

  constructor(api) {
    super();
    this.api = api;
    this.hasMore = false;
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
  }

  get all() {
    return this.#order.map((id) => this.#byId.get(id));
  }

  get = (id) => this.#byId.get(id) ?? null;

  /** The first page again: new jobs come in, and how the others stand. False while the server does not answer. */
  async refresh() {
    clearTimeout(this.#polling);
    const before = new Set(this.#order);
    const page = await this.#try(() => this.api.page(null, PAGE));
    if (page) this.#first(page, before);
    await this.#older();
    this.#again();
    return page !== null;
  }

  /** Take over the first page; what is not on it any more was deleted, unless it was not there yet. */
  #first(page, before) {
    const told = page.data.map(({ id }) => id);
    const end = page.has_more ? this.#order.indexOf(told.at(-1)) : this.#order.length;
    const gone = this.#order.filter((id, index) => index < end && before.has(id) && !told.includes(id));
    for (const id of gone) this.#byId.delete(id);
    for (const video of page.data) this.#put(video);
    const isFirst = this.#last === null;
    const order = [...this.#order.filter((id) => !before.has(id) && !told.includes(id)), ...told,
      ...this.#order.filter((id) => before.has(id) && !told.includes(id) && !gone.includes(id))];
    if (isFirst || !page.has_more) [this.#last, this.hasMore] = [page.last_id, page.has_more];
    if (isFirst || order.join() !== this.#order.join()) {
      this.#order = order;
      this.#tell("list");
    }
  }

  /** Active ones that are too old for the first page. */
  async #older() {
    const shown = this.all.slice(PAGE).filter((video) => isActive(video) && video.id !== this.#watched?.id);
    for (const { id } of shown.slice(0, PAGE)) {
      const video = await this.#try(() => this.api.get(id));
      if (video) this.#put(video);
    }
  }

  /** The next page of older ones. */
  async more() {
    if (this.#turning) return;
    this.#turning = true;
    const page = await this.#try(() => this.api.page(this.#last, PAGE));
    this.#turning = false;
    if (!page) return;
    for (const video of page.data) this.#put(video);
    this.#order.push(...page.data.map(({ id }) => id).filter((id) => !this.#order.includes(id)));
    [this.#last, this.hasMore] = [page.last_id ?? this.#last, page.has_more];
    this.#tell("list");
  }

  /** A job that was just accepted. */
  add(video) {
    this.#put(video);
    if (!this.#order.includes(video.id)) this.#order.unshift(video.id);
    this.#tell("list");
    this.#again();
  }

  /** What the server said of a job. */
  update(video) {
    this.#put(video);
    this.#again();
  }

  /** A job that is no more. */
  forget(id) {
    if (this.#watched?.id === id) this.#unwatch();
    this.#byId.delete(id);
    this.#order = this.#order.filter((other) => other !== id);
    this.#tell("list");
  }

  forgetAll() {
    this.#unwatch();
    this.#byId.clear();
    [this.#order, this.#last, this.hasMore] = [[], null, false];
    this.#tell("list");
  }

  /** Watch this one step by step while it is active; else the one that runs. */
  prefer(id) {
    this.#wished = id;
    this.#again();
  }

  #put(video) {
    const before = this.#byId.get(video.id);
    if (before && !isActive(before) && isActive(video)) return; // an answer that was overtaken
    this.#byId.set(video.id, video);
    if (JSON.stringify(before) !== JSON.stringify(video)) this.#tell("video", video);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  async #try(work) {
    try {
      const answer = await work();
      this.#tell("online");
      return answer;
    } catch (error) {
      if (!(error instanceof ApiError)) this.#tell("offline");
      return null;
    }
  }

  /** Watch what is to be watched, and come again while there is something to see. */
  #again() {
    const active = this.all.filter(isActive);
    const one = active.find(({ id }) => id === this.#wished) ?? active.findLast(({ status }) => status === "in_progress");
    if (one?.id !== this.#watched?.id) {
      this.#unwatch();
      if (one) this.#watch(one.id);
    }
    clearTimeout(this.#polling);
    if (active.some(({ id }) => id !== this.#watched?.id || this.#watched.broken)) {
      this.#polling = setTimeout(() => this.refresh(), POLL_MS);
    }
  }

  #unwatch() {
    this.#watched?.stop.abort();
    this.#watched = null;
  }

  async #watch(id) {
    const watched = (this.#watched = { id, stop: new AbortController(), broken: false });
    for (let tries = 0; this.#watched === watched; tries++) {
      try {
        for await (const video of this.api.events(id, watched.stop.signal)) {
          tries = 0;
          watched.broken = false;
          if (video.id === id) this.#put(video);
        }
      } catch (error) {
        if (error instanceof ApiError && error.status === 404) return this.forget(id);
      }
      if (this.#watched !== watched) return;
      const now = await this.#try(() => this.api.get(id));
      if (now) this.#put(now);
      if (now && !isActive(now)) break;
      watched.broken = true; // meanwhile it is asked for like the others
      this.#again();
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS[Math.min(tries, AGAIN_MS.length - 1)]));
    }
    if (this.#watched === watched) this.#watched = null;
    this.#again();
  }
}
