// The jobs of this key, newest first, kept up to date: one is watched step by step, the others are asked for, and the
// list is read again now and then, for what other tabs and programs do.

import { ApiError } from "./api.js";
import { isActive } from "./words.js";

const PAGE = 24;
const LONGEST_PAGE = 100; // the most that the server lists at once
const POLL_MS = { active: 3000, idle: 10000 }; // the latter while the page is in sight
const AGAIN_MS = [500, 1000, 2000, 5000]; // waits before a broken connection is tried again

/** Tells of changes by events: "list" (which there are), "video" (detail: one of them), "offline" and "online". */
export class Videos extends EventTarget {
  #byId = new Map();
  #order = []; // their ids, as the server lists them
  #isListed = false; // a page has come
  #added = new Set(); // ids that no page has brought yet: others may stand between them and the rest
  #gone = new Set(); // ids that are no more: an answer that was overtaken may still tell of them
  #turn = { asked: 0, taken: 0 }; // answers to the list come in any order: only newer ones are taken over
  #watched = null; // { id, stop }
  #wished = null; // the id to watch, if it is active
  #polling = 0;
  #turning = false; // to the next page

  constructor(api) {
    super();
    this.api = api;
    this.hasMore = false;
    document.addEventListener("visibilitychange", () => this.#look());
    addEventListener("focus", () => this.#look());
  }

  get all() {
    return this.#order.map((id) => this.#byId.get(id));
  }

  get = (id) => this.#byId.get(id) ?? null;

  /** Somebody looks at the page, or not any more. */
  #look() {
    if (document.hidden || !this.#isListed) this.#again();
    else this.refresh();
  }

  /** The list again: what came, what is gone, and how the others stand. False while the server does not answer. */
  async refresh() {
    clearTimeout(this.#polling);
    const before = new Set(this.#order);
    const turn = ++this.#turn.asked;
    const page = await this.#try(() => this.#newest());
    if (page && turn > this.#turn.taken) {
      this.#turn.taken = turn;
      this.#takeOver(page, before);
      await this.#others(new Set(page.data.map(({ id }) => id)));
    }
    this.#again();
    return page !== null;
  }

  /** As many of the newest as are shown; more where so many new ones came that they do not reach what is known. */
  async #newest() {
    const known = this.#order.filter((id) => !this.#added.has(id));
    const reached = new Set(known.length ? known : this.#order.slice(-1));
    const page = await this.api.page(null, Math.min(LONGEST_PAGE, Math.max(PAGE, this.#order.length)));
    while (reached.size && page.has_more && !page.data.some(({ id }) => reached.has(id))) {
      const next = await this.api.page(page.last_id, LONGEST_PAGE);
      page.data.push(...next.data);
      [page.last_id, page.has_more] = [next.last_id ?? page.last_id, next.has_more && next.data.length > 0];
    }
    return page;
  }

  /** Take over a list; of those that were there `before`, what is missing in it was deleted. */
  #takeOver(page, before) {
    const told = page.data.filter(({ id }) => !this.#gone.has(id)).map(({ id }) => id);
    const last = this.#order.indexOf(told.at(-1)); // -1: the list reaches beyond all that is shown
    const end = page.has_more && last >= 0 ? last : this.#order.length;
    const gone = new Set(this.#order.filter((id, index) => index < end && before.has(id) && !told.includes(id)));
    for (const id of gone) this.#drop(id);
    for (const video of page.data) this.#put(video);
    for (const id of told) this.#added.delete(id);
    const rest = this.#order.filter((id) => !told.includes(id) && !gone.has(id));
    const order = [...rest.filter((id) => !before.has(id)), ...told, ...rest.filter((id) => before.has(id))];
    if (order.at(-1) === told.at(-1)) this.hasMore = page.has_more;
    if (!this.#isListed || order.join() !== this.#order.join()) {
      [this.#isListed, this.#order] = [true, order];
      this.#tell("list");
    }
  }

  /** Those too old for the list that may have changed: active ones, and the chosen one, which may be gone. */
  async #others(told) {
    const asked = this.all.filter((video) => !told.has(video.id) && video.id !== this.#watched?.id &&
      (isActive(video) || video.id === this.#wished));
    for (const { id } of asked.slice(0, PAGE)) await this.#one(id);
  }

  /** How one stands; null while nobody says. One that is no more is forgotten. */
  async #one(id) {
    const video = await this.#try(async () => {
      try {
        return await this.api.get(id);
      } catch (error) {
        if (error.status !== 404) throw error;
        if (this.#byId.has(id)) this.forget(id);
        return null;
      }
    });
    if (video) this.#put(video);
    return video;
  }

  /** The next page of older ones. */
  async more() {
    if (this.#turning) return;
    this.#turning = true;
    const last = this.#order.at(-1);
    const page = await this.#try(() => this.api.page(last, PAGE));
    if (!page && last) await this.#one(last); // if it is no more, the next try begins at the one before
    this.#turning = false;
    if (!page) return;
    for (const video of page.data) this.#put(video);
    this.#order.push(...page.data.map(({ id }) => id).filter((id) => this.#byId.has(id) && !this.#order.includes(id)));
    this.hasMore = page.has_more;
    this.#tell("list");
  }

  /** A job that was just accepted. */
  add(video) {
    this.#put(video);
    if (!this.#order.includes(video.id)) {
      this.#order.unshift(video.id);
      this.#added.add(video.id);
    }
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
    this.#drop(id);
    this.#order = this.#order.filter((other) => other !== id);
    this.#tell("list");
  }

  #drop(id) {
    if (this.#watched?.id === id) this.#unwatch();
    this.#byId.delete(id);
    this.#added.delete(id);
    this.#gone.add(id);
  }

  /** Begin anew, with another key: what was asked with the earlier one is not taken over. */
  forgetAll() {
    this.#unwatch();
    for (const held of [this.#byId, this.#added, this.#gone]) held.clear();
    [this.#order, this.hasMore, this.#isListed] = [[], false, false];
    this.#turn.taken = this.#turn.asked;
    this.#tell("list");
  }

  /** Watch this one step by step while it is active; else the one that runs. */
  prefer(id) {
    this.#wished = id;
    this.#again();
  }

  #put(video) {
    if (this.#gone.has(video.id)) return;
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
      if (error.status === 401) this.#isListed = false; // nothing is asked for by itself before there is another key
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
      this.#polling = setTimeout(() => this.refresh(), POLL_MS.active);
    } else if (this.#isListed && !document.hidden) {
      this.#polling = setTimeout(() => this.refresh(), POLL_MS.idle);
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
      const now = await this.#one(id);
      if (this.#watched !== watched) return;
      if (now && !isActive(now)) break;
      watched.broken = true; // meanwhile it is asked for like the others
      this.#again();
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS[Math.min(tries, AGAIN_MS.length - 1)]));
    }
    if (this.#watched === watched) this.#watched = null;
    this.#again();
  }
}
