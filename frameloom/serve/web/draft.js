// What was typed and which pictures were chosen, kept over a reload: values in localStorage, pictures in IndexedDB.

const NAME = "frameloom.draft";
const STORE = "pictures";

/** The draft that was kept, or an empty one. */
export function load() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

/** Keep a draft. A browser that keeps nothing is fine: then it lasts as long as the page. */
export function save(draft) {
  try {
    localStorage.setItem(NAME, JSON.stringify(draft));
  } catch {
    // full, or forbidden in a private window
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("frameloom", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function within(mode, work) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** Keep a picture under a name; null forgets it. */
export async function savePicture(name, picture) {
  try {
    await within("readwrite", (store) => (picture ? store.put(picture, name) : store.delete(name)));
  } catch {
    // as above
  }
}

/** The picture that was kept under a name, or null. */
export async function loadPicture(name) {
  try {
    return (await within("readonly", (store) => store.get(name))) ?? null;
  } catch {
    return null;
  }
}
