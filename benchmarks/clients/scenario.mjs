// What a user of the official npm package `openai` does, and what the server answers; run by server_clients.py.
// `node scenario.mjs TEXT_URL IMAGE_URL PICTURE [STEP ...]`. Prints JSON: every step, and "ok" or what was wrong.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";
import { VERSION } from "openai/version";

const KEY = "sk-alice-0123456789abcdef";
const TIGHT = "sk-tight-0123456789abcdef"; // of a key that may have one job waiting
const [textUrl, imageUrl, picturePath, ...wanted] = process.argv.slice(2);
const picture = readFileSync(picturePath);
const SMALL = { num_frames: 9, steps: 2, seed: 3 };
const LONG = { size: "128x128", num_frames: 81, steps: 200, seed: 3 };
const PROMPT = "a red circle rising";
const BASE = { prompt: PROMPT, size: "64x64", ...SMALL };

let tries = 0;
const counted = (url, init) => ((tries += 1), fetch(url, init));
const client = (baseURL, apiKey = KEY, maxRetries = 2) => new OpenAI({ baseURL, apiKey, maxRetries, fetch: counted });
const text = client(textUrl);
const image = client(imageUrl);
let made = "";

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
const bytes = async (from, id, query) => Buffer.from(await (await from.videos.downloadContent(id, query)).arrayBuffer());

function expect(what, told) {
  if (!what) throw new Error(typeof told === "string" ? told : JSON.stringify(told));
}

async function refused(call, kind, status, code, more = {}) {
  const before = tries;
  let answer;
  try {
    answer = await call();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    const told = {
      class: error.constructor.name, status: error.status, code: error.code, param: error.param, type: error.type,
      request_id: error.requestID, tries: tries - before, message: error.message,
    };
    expect(error instanceof kind && error.status === status, told);
    expect(code === null || error.code === code, told);
    expect(told.tries === (more.tries ?? 1), told);
    expect(told.request_id && told.message && told.type, told);
    for (const [name, value] of Object.entries(more)) expect(told[name] === value || name === "tries", told);
    return error;
  }
  throw new Error(`no error, but ${JSON.stringify(answer)}`);
}

async function poll(from, id) {
  for (;;) {
    const video = await from.videos.retrieve(id);
    if (video.status === "completed" || video.status === "failed") return video;
    await sleep(0.1);
  }
}

async function small(from, more = {}) {
  const video = await poll(from, (await from.videos.create({ ...BASE, ...more })).id);
  expect(video.status === "completed", video);
  return video;
}

const json = { headers: { "Content-Type": "application/json" } };

const steps = {
  "01 create by text": async () => {
    const video = await text.videos.create(BASE);
    expect(video.object === "video" && ["queued", "in_progress"].includes(video.status), video);
    expect(video.prompt === PROMPT && video.size === BASE.size && video.progress < 100, video);
    const done = await poll(text, video.id);
    expect(done.status === "completed" && done.progress === 100 && !done.error, done);
    made = video.id;
  },
  "02 the same request": async () => {
    const again = await small(text);
    expect((await bytes(text, made)).equals(await bytes(text, again.id)), "the same request has other bytes");
  },
  "05 list pages": async () => {
    const ids = [];
    for (let i = 0; i < 5; i++) ids.push((await text.videos.create(BASE)).id);
    for (const order of ["asc", "desc"]) {
      const listed = [];
      for await (const video of text.videos.list({ limit: 2, order })) listed.push(video.id);
      expect(new Set(listed).size === listed.length, "a video is listed twice");
      const ours = listed.filter((id) => ids.includes(id));
      expect(ours.join() === (order === "asc" ? ids : ids.toReversed()).join(), listed);
    }
    for (const id of ids) await text.videos.delete(id);
  },
  "06 download variants": async () => {
    expect((await bytes(text, made)).subarray(4, 8).toString() === "ftyp", "no mp4");
    for (const variant of ["thumbnail", "spritesheet"]) {
      expect((await bytes(text, made, { variant }))[0] === 0xff, `no JPEG: ${variant}`);
    }
  },
  "08 bracket fields": async () => {
    for (const loras of [[{ name: "bold", scale: 0.5 }], JSON.stringify([{ name: "bold", scale: 0.5 }])]) {
      try {
        await text.videos.create({ ...BASE, loras });
      } catch (error) {
        expect(error.status === 400 && error.message.includes("bold"), error.message);
        continue;
      }
      throw new Error("a LoRA that nobody has registered was taken");
    }
  },
  "09 remix": async () => {
    const video = await text.videos.remix(made, { prompt: "a blue square falling" });
    expect(video.remixed_from_video_id === made && video.prompt === "a blue square falling", video);
    expect((await poll(text, video.id)).status === "completed", video);
  },
  "10 edit": async () => {
    const source = await toFile(await bytes(text, made), "source.mp4", { type: "video/mp4" });
    const more = { prompt: "a blue circle rising", steps: 2, seed: 1 };
    for (const video of [source, { id: made }]) {
      const edited = await text.videos.edit({ ...more, video });
      expect((await poll(text, edited.id)).status === "completed", edited);
    }
  },
  "11 image file": async () => {
    await small(image, { input_reference: await toFile(picture, "start.png", { type: "image/png" }) });
    await small(image, { input_reference: await toFile(picture, "lies.jpg", { type: "image/jpeg" }) });
  },
  "12 image url in brackets": async () => {
    const image_url = `data:image/png;base64,${picture.toString("base64")}`;
    await small(image, { input_reference: { image_url } });
  },
  "13 extend": async () => {
    const first = await small(image, { input_reference: await toFile(picture, "start.png") });
    const video = await toFile(await bytes(image, first.id), "source.mp4");
    const longer = await image.videos.extend({ prompt: PROMPT, video, seconds: "1", steps: 1 });
    const done = await poll(image, longer.id);
    expect(done.status === "completed" && Number(done.seconds) > Number(first.seconds), done);
  },
  "14 delete": async () => {
    const video = await small(text);
    const gone = await text.videos.delete(video.id);
    expect(gone.id === video.id && gone.deleted === true && gone.object === "video.deleted", gone);
    await refused(() => text.videos.retrieve(video.id), OpenAI.NotFoundError, 404, "video_not_found");
  },
  "20 keys": async () => {
    const stranger = client(textUrl, "sk-nobody-0123456789abcdef");
    await refused(() => stranger.videos.list(), OpenAI.AuthenticationError, 401, null);
    const other = client(textUrl, TIGHT);
    await refused(() => other.videos.retrieve(made), OpenAI.NotFoundError, 404, "video_not_found");
  },
  "21 unknown": async () => {
    for (const name of ["video_nothing", "a b", "..%2F..%2Fetc"]) {
      await refused(() => text.videos.retrieve(name), OpenAI.NotFoundError, 404, null);
    }
    await refused(() => text.videos.create({ prompt: PROMPT, model: "sora-9" }), OpenAI.NotFoundError, 404, "model_not_found");
  },
  "22 bad values": async () => {
    for (const [param, value] of [["size", "65x64"], ["seconds", "-1"], ["steps", "many"], ["num_frames", 10], ["seed", 1.5]]) {
      await refused(() => text.videos.create({ ...BASE, [param]: value }), OpenAI.BadRequestError, 400, null, { param });
    }
    const poster = () => text.videos.downloadContent(made, { variant: "poster" });
    await refused(poster, OpenAI.BadRequestError, 400, null, { param: "variant" });
  },
  "23 content too early": async () => {
    const video = await text.videos.create({ prompt: PROMPT, ...LONG });
    await refused(() => text.videos.downloadContent(video.id), OpenAI.NotFoundError, 404, "video_not_ready");
    await text.post(`/videos/${video.id}/cancel`);
    const ended = await poll(text, video.id);
    expect(ended.status === "failed" && ended.error.code === "cancelled", ended);
    await refused(() => text.videos.downloadContent(video.id), OpenAI.APIError, 400, "video_failed");
    await text.videos.delete(video.id);
  },
  "24 repeats": async () => {
    const headers = { "Idempotency-Key": randomUUID() };
    const one = await text.videos.create(BASE, { headers });
    const other = await text.videos.create(BASE, { headers });
    expect(one.id === other.id, "the same Idempotency-Key gave two videos");
    const again = () => text.videos.create({ ...BASE, prompt: "another" }, { headers });
    await refused(again, OpenAI.ConflictError, 409, "idempotency_mismatch");
  },
  "25 full queue": async () => {
    const tight = client(textUrl, TIGHT, 0);
    const long = await text.videos.create({ prompt: PROMPT, ...LONG });
    while ((await text.videos.retrieve(long.id)).status === "queued") await sleep(0.1);
    const waits = await tight.videos.create(BASE);
    const error = await refused(() => tight.videos.create(BASE), OpenAI.RateLimitError, 429, "key_queue_full");
    const pause = Number(error.headers.get("retry-after"));
    expect(pause >= 1 && pause <= 120, pause);
    for (const [from, id] of [[text, long.id], [tight, waits.id]]) await from.videos.delete(id);
  },
  "27 wrong method": async () => {
    await refused(() => text.patch("/videos"), OpenAI.APIError, 405, null);
    await refused(() => text.get("/nothing"), OpenAI.NotFoundError, 404, null);
  },
  "28 models": async () => {
    const { data } = await text.models.list();
    expect(data.length === 1 && (await text.models.retrieve(data[0].id)).id === data[0].id, data);
  },
};

const told = { client: `openai ${VERSION}, npm, node ${process.version}` };
for (const [name, step] of Object.entries(steps)) {
  if (wanted.length && !wanted.includes(name.slice(0, 2))) continue;
  try {
    await step();
    told[name.slice(3)] = "ok";
  } catch (error) {
    told[name.slice(3)] = `WRONG ${error.constructor.name} ${String(error.message).slice(0, 600)}`;
  }
}
console.log(JSON.stringify(told, null, 1));
