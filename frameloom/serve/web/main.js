// The page: its parts, and what happens between them.

import { Api, ApiError } from "./api.js";
import { Blobs } from "./blobs.js";
import { asCommand, asCurl } from "./commands.js";
import { Composer } from "./composer.js";
import { announce, byId, confirmed, copy, make, toast } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Keys } from "./keys.js";
import { Stage } from "./stage.js";
import { Videos } from "./videos.js";
import { isActive } from "./words.js";

const KEPT = { thumbnail: 200, video: 6 };
const HEALTH_MS = { well: 15000, ill: 4000 }; // how often the server is asked how it is
const BUILT_IN = "frameloom-shapes";
const OFFLINE = "The server does not answer. What you typed is kept; the page tries again.";

const keys = new Keys();
const api = new Api(keys);
const blobs = new (class {
  #kinds = Object.fromEntries(Object.entries(KEPT).map(([variant, most]) => [variant, new Blobs(api, most)]));
  url = (id, variant) => this.#kinds[variant].url(id, variant);
  forget = (id) => Object.values(this.#kinds).forEach((kind) => kind.forget(id));
})();
const videos = new Videos(api);
const stage = new Stage(api, blobs, {
  suggest: (text) => composer.suggest(text),
  remix: (video) => composer.fill(video),
  unlock: () => keys.change(),
  offline: () => nowOffline(),
  cancel, remove, download, copyCommand,
  copyCurl: async (video) => copied(await copy(asCurl(video, Boolean(keys.current))), "The curl command"),
});
const gallery = new Gallery(blobs, (video) => choose(video.id, true));
const composer = new Composer(api, submitted);

let chosen = location.hash.slice(1) || null;
let model = null;
let loaded = false;
let offline = false;
let ill = false; // by the last answer about the server's health
let health = 0;

const isSmall = () => model?.id === BUILT_IN;
const copied = (done, what) => toast(done ? `${what} is on the clipboard.` : "The browser does not let this page copy.");

async function submitted(fields, pictures, { source, token }) {
  const video = source ? await api.remix(source.id, fields.prompt, token) : await api.create(fields, pictures, token);
  videos.add(video);
  choose(video.id, false);
  if (matchMedia("(max-width: 899px)").matches) byId("stage").scrollIntoView({ block: "start" });
}

function choose(id, byHand) {
  chosen = id;
  history.replaceState(null, "", id ? `#${id}` : location.pathname + location.search);
  videos.prefer(id);
  gallery.mark(id);
  show();
  if (byHand) {
    byId("stage").scrollIntoView({ block: "nearest" });
    byId("stage").focus({ preventScroll: true });
  }
}

function show() {
  const all = videos.all;
  const video = videos.get(chosen) ?? all[0] ?? null;
  if (video && video.id !== chosen && loaded) {
    chosen = video.id;
    videos.prefer(chosen);
    gallery.mark(chosen);
  }
  if (video) stage.show(video);
  else if (loaded) stage.showEmpty(isSmall());
  else if (keys.declined) stage.showLocked();
  else stage.showLoading();
  byId("more").hidden = !videos.hasMore;
  const note = byId("gallery-note");
  note.hidden = all.length > 0;
  note.textContent = loaded ? "What you generate is kept here." : "";
}

async function cancel(video) {
  await attempt(async () => {
    videos.update(await api.cancel(video.id));
    announce("Cancelled.");
  });
}

async function remove(video) {
  if (!(await confirmed("Delete this video?", "It is deleted from the server for good, with its settings.", "Delete"))) return;
  await attempt(async () => {
    try {
      await api.remove(video.id);
    } catch (error) {
      if (error.status !== 404) throw error;
    }
    const before = videos.all;
    const next = before[before.findIndex(({ id }) => id === video.id) + 1] ?? before.at(-2) ?? null;
    blobs.forget(video.id);
    chosen = next?.id ?? null;
    videos.forget(video.id);
    choose(chosen, false);
    toast("Deleted.");
    if (chosen) gallery.focus(chosen);
    else byId("prompt").focus();
  });
}

async function download(video) {
  await attempt(async () => {
    const link = make("a", { href: await blobs.url(video.id, "video"), download: `${fileName(video)}.mp4` });
    document.body.append(link);
    link.click();
    link.remove();
  });
}

async function copyCommand(video) {
  const command = asCommand(video, isSmall());
  if (command) copied(await copy(command), "The command");
  else toast("No single command goes on from another video; copy it as curl.");
}

const fileName = ({ prompt, id }) =>
  (prompt ?? "").normalize("NFKC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || id;

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof ApiError)) nowOffline();
    toast(error.message);
  }
}

function nowOffline() {
  if (offline) return;
  offline = ill = true;
  banner(OFFLINE);
  clearTimeout(health);
  health = setTimeout(checkHealth, HEALTH_MS.ill / 2);
}

function banner(text) {
  const line = byId("banner");
  if (line.textContent !== text) line.textContent = text;
  line.hidden = !text;
}

/** Say what is wrong with the server, and catch up when it is back. */
async function checkHealth() {
  clearTimeout(health);
  let trouble = "";
  try {
    trouble = await api.trouble();
    const wasOffline = offline;
    offline = false;
    if (wasOffline || ((!loaded || !composer.isReady) && !keys.declined)) await begin();
  } catch {
    offline = true;
  }
  clearTimeout(health);
  trouble = offline ? OFFLINE : trouble;
  if (ill && !trouble) composer.relieve();
  ill = Boolean(trouble);
  banner(trouble);
  health = setTimeout(checkHealth, trouble ? HEALTH_MS.ill : HEALTH_MS.well);
}

/** The model and the videos. What fails is tried again with the server's health. */
async function begin() {
  try {
    const { data } = await api.models();
    model = data[0] ?? null;
    byId("model").textContent = model?.id ?? "";
    if (model?.defaults && !composer.isReady) await composer.offer(model, (await api.loras()).data ?? []);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== 401) toast(error.message);
  }
  loaded = await videos.refresh();
  videos.prefer(chosen);
  show();
}

videos.addEventListener("list", () => {
  gallery.list(videos.all);
  if (loaded && chosen && !videos.get(chosen)) {
    toast("The video was deleted elsewhere.");
    choose(videos.all[0]?.id ?? null, false);
  } else {
    gallery.mark(chosen);
    show();
  }
});
videos.addEventListener("video", ({ detail }) => {
  gallery.update(detail);
  if (detail.id === chosen) stage.show(detail);
});
videos.addEventListener("offline", () => nowOffline());
addEventListener("frameloom-key", () => {
  loaded = false;
  videos.forgetAll();
  begin();
});
addEventListener("online", checkHealth);
byId("more").addEventListener("click", () => videos.more());
new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && !byId("more").hidden && videos.more(), {
  rootMargin: "600px",
}).observe(byId("more"));

show();
checkHealth();
