// Pictures and videos of jobs as blob addresses: they need the key, which an address in a tag cannot carry.

/** Keeps the latest `most` blobs; older ones are let go of. */
export class Blobs {
  #urls = new Map(); // by name: promises of addresses, the one used last at the end

  constructor(api, most) {
    this.api = api;
    this.most = most;
  }

  /** The address of a job's file ("video", "thumbnail"), fetched once. Raises what the API raises. */
  url(id, variant) {
    const name = `${id} ${variant}`;
    const url = this.#urls.get(name) ?? this.api.content(id, variant).then((blob) => URL.createObjectURL(blob));
    this.#urls.delete(name);
    this.#urls.set(name, url);
    url.catch(() => this.#urls.delete(name));
    for (const oldest of [...this.#urls.keys()].slice(0, -this.most)) this.#drop(oldest);
    return url;
  }

  /** Let go of all of a job. */
  forget(id) {
    for (const name of [...this.#urls.keys()]) if (name.startsWith(`${id} `)) this.#drop(name);
  }

  #drop(name) {
    this.#urls.get(name).then((url) => URL.revokeObjectURL(url), () => {});
    this.#urls.delete(name);
  }
}
