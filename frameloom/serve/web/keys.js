// The key that the server asks for: held for this tab, or on this device if wished.

import { byId, closed } from "./dom.js";

const NAME = "frameloom.key";

function stored() {
  try {
    return sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
  } catch {
    return ""; // a browser that keeps nothing: the key lasts as long as the page
  }
}

function store(key, remembered) {
  try {
    sessionStorage.setItem(NAME, key);
    if (remembered) localStorage.setItem(NAME, key);
    else localStorage.removeItem(NAME);
  } catch {
    // as above
  }
}

/** Holds the key, and asks for one in a dialog: once, however many requests wait for it. */
export class Keys {
  #asking = null;

  constructor() {
    this.current = stored();
    this.declined = false; // asked for a key, the answer was "not now"
    byId("key-button").addEventListener("click", () => this.change());
    byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
    this.#show();
  }

  /** Ask for another key. */
  change() {
    return this.#dialog("", false);
  }

  /** True once there is another key than `used`, which the server did not take. A "not now" is not asked again. */
  async ask(message, used) {
    if (this.current !== used) return true;
    if (this.declined) return false;
    this.#asking ??= this.#dialog(used ? message : "", true).finally(() => (this.#asking = null));
    return this.#asking;
  }

  async #dialog(error, wasAsked) {
    const dialog = byId("key-dialog");
    if (dialog.open) return false;
    byId("key-error").textContent = error;
    return this.#take((await closed(dialog, "cancel")) !== "cancel", wasAsked);
  }

  #take(confirmed, wasAsked) {
    const key = byId("key").value.trim();
    byId("key").value = "";
    const isGiven = confirmed && key !== "";
    this.declined = isGiven ? false : this.declined || wasAsked;
    if (isGiven) this.current = key;
    this.#show();
    if (!isGiven) return false;
    store(key, byId("key-remember").checked);
    dispatchEvent(new Event("frameloom-key"));
    return true;
  }

  #show() {
    byId("key-button").hidden = !this.current && !this.declined;
  }
}
