// The server's routes. Everything that can go wrong is an ApiError (the server's sentence) or an OfflineError.

export class ApiError extends Error {
  constructor(status, { message, code, param }, retry_s) {
    super(message || `The server answered ${status}.`);
    Object.assign(this, { status, code: code ?? "", param: param ?? null, retry_s });
  }
}

export class OfflineError extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

const address = (path) => new URL(path, document.baseURI);

/** Talks to the server; `keys.current` is sent along, and `keys.ask` is called where the server wants another. */
export class Api {
  constructor(keys) {
    this.keys = keys;
  }

  async fetch(path, options = {}) {
    for (;;) {
      const key = this.keys.current;
      const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
      const answer = await this.#send(path, { ...options, headers });
      if (answer.ok) return answer;
      const error = await refusal(answer);
      if (answer.status !== 401 || !(await this.keys.ask(error.message, key))) throw error;
    }
  }

  async #send(path, options) {
    try {
      return await fetch(address(path), { cache: "no-store", ...options });
    } catch (error) {
      throw error.name === "AbortError" ? error : new OfflineError();
    }
  }

  async json(path, options) {
    const answer = await this.fetch(path, options);
    try {
      return await answer.json();
    } catch (error) {
      throw error.name === "AbortError" ? error : new OfflineError();
    }
  }

  async blob(path, options) {
    const answer = await this.fetch(path, options);
    try {
      return await answer.blob();
    } catch (error) {
      throw error.name === "AbortError" ? error : new OfflineError();
    }
  }

  /** A new video. Sent twice with one `token` it is made once. */
  create(fields, pictures, token) {
    const headers = { "Idempotency-Key": token };
    if (!Object.keys(pictures).length) {
      headers["Content-Type"] = "application/json";
      return this.json("v1/videos", { method: "POST", headers, body: JSON.stringify(fields) });
    }
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) {
      body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    for (const [name, picture] of Object.entries(pictures)) body.append(name, picture, picture.name || name);
    return this.json("v1/videos", { method: "POST", headers, body });
  }

  /** The request of another video again, its pictures too, with another prompt. */
  remix(id, prompt, token) {
    const headers = { "Idempotency-Key": token, "Content-Type": "application/json" };
    return this.json(`v1/videos/${id}/remix`, { method: "POST", headers, body: JSON.stringify({ prompt }) });
  }

  page(after, limit) {
    const query = new URLSearchParams({ limit, order: "desc", ...(after && { after }) });
    return this.json(`v1/videos?${query}`);
  }

  get = (id) => this.json(`v1/videos/${id}`);
  cancel = (id) => this.json(`v1/videos/${id}/cancel`, { method: "POST" });
  remove = (id) => this.json(`v1/videos/${id}`, { method: "DELETE" });
  content = (id, variant) => this.blob(`v1/videos/${id}/content?variant=${variant}`, { cache: "default" });
  preview = (id, version) => this.blob(`v1/videos/${id}/preview?version=${version}`);
  models = () => this.json("v1/models");
  loras = () => this.json("v1/loras");
  estimate = (fields, signal) => this.json(`v1/estimate?${new URLSearchParams(fields)}`, { signal });

  /** Whether videos are made now; else the reason. Asks for no key. */
  async trouble() {
    const answer = await this.#send("health/ready", {});
    return answer.ok ? "" : (await refusal(answer)).message;
  }

  /** How a job stands, again and again, until it has ended or the connection has. */
  async *events(id, signal) {
    const answer = await this.fetch(`v1/videos/${id}/events`, { headers: { Accept: "text/event-stream" }, signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const parts = (held + value).split(/\r?\n\r?\n/);
        held = parts.pop();
        for (const part of parts) {
          const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
          if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
        }
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error;
    } finally {
      reader.cancel().catch(() => {});
    }
  }
}

async function refusal(answer) {
  let told = {};
  try {
    const body = await answer.json();
    told = body.error ?? body;
  } catch {
    told = {}; // not from this server: a proxy in between, say
  }
  const retry = Number(answer.headers.get("retry-after"));
  return new ApiError(answer.status, told, Number.isFinite(retry) && retry > 0 ? retry : null);
}
