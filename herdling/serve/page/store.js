/**
 * Conversations in this browser's localStorage, one key each, and a draft key for the reply that is
 * being written, so that a reload loses nothing that has arrived.
 *
 * A conversation: {id, title, updated, settings, messages}; a message: {id, role, text, images?,
 * calls?, tokens?, stats?, state, error?}. When room runs out, the token details of the oldest
 * conversations go first, then their pictures; text is never dropped.
 */

import { checkConversation } from "./exchange.js";

const LIST = "herdling.list";
const ONE = "herdling.chat.";
const DRAFT = "herdling.draft.";
const PREFERENCES = "herdling.preferences";

export const DEFAULTS = {
  model: "", system: "", temperature: 0.6, top_p: 0.9, top_k: 0, max_tokens: 512, seed: "", tools: "",
  probabilities: true, experts: true,
};

const parse = (text) => {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
};

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("").slice(0, 14);

class Store extends EventTarget {
  #open = new Map();

  preferences = { theme: "", shortcuts: true, last: "", settings: {}, ...parse(localStorage.getItem(PREFERENCES)) };

  constructor() {
    super();
    addEventListener("storage", (event) => this.#elsewhere(event.key));
  }

  /** [{id, title, updated}], newest first. */
  list() {
    return parse(localStorage.getItem(LIST)) ?? [];
  }

  create() {
    const settings = { ...DEFAULTS, ...this.preferences.settings };
    const conversation = { id: newId(), title: "", updated: Date.now(), settings, messages: [] };
    this.#open.set(conversation.id, conversation);
    return conversation;
  }

  /** The conversation, always the same object for an id; null if there is none. */
  get(id) {
    if (!this.#open.has(id)) {
      const found = this.#read(id);
      if (found) this.#open.set(id, found);
    }
    return this.#open.get(id) ?? null;
  }

  #read(id) {
    const found = parse(localStorage.getItem(ONE + id));
    if (!found) return null;
    const draft = parse(localStorage.getItem(DRAFT + id));
    const place = draft ? found.messages.findIndex((message) => message.id === draft.id) : -1;
    if (place >= 0) found.messages[place] = draft;
    for (const message of found.messages) if (message.state === "writing") message.state = "cut";
    return { ...found, settings: { ...DEFAULTS, ...found.settings } };
  }

  save(conversation) {
    conversation.updated = Date.now();
    this.#open.set(conversation.id, conversation);
    this.#write(ONE + conversation.id, conversation);
    localStorage.removeItem(DRAFT + conversation.id);
    const { id, title, updated } = conversation;
    this.#writeList([{ id, title, updated }, ...this.list().filter((item) => item.id !== id)]);
  }

  saveDraft(id, message) {
    this.#write(DRAFT + id, message);
  }

  remove(id) {
    const conversation = this.get(id);
    this.#open.delete(id);
    localStorage.removeItem(ONE + id);
    localStorage.removeItem(DRAFT + id);
    this.#writeList(this.list().filter((item) => item.id !== id));
    return conversation;
  }

  prefer(changes) {
    Object.assign(this.preferences, changes);
    this.#write(PREFERENCES, this.preferences);
  }

  export(ids = this.list().map((item) => item.id)) {
    const conversations = ids.map((id) => this.get(id)).filter(Boolean);
    return JSON.stringify({ format: "herdling-conversations", version: 1, conversations }, null, 1);
  }

  /** Adds what an exported file holds, beside what is here; returns how many. Throws Error on others. */
  import(text) {
    const found = parse(text);
    if (found?.format !== "herdling-conversations" || !Array.isArray(found.conversations)) {
      throw new Error("this is not a file that Herdling exported");
    }
    const clean = found.conversations.map(checkConversation);
    for (const conversation of clean.reverse()) {
      if (localStorage.getItem(ONE + conversation.id)) conversation.id = newId();
      this.save({ ...conversation, settings: { ...DEFAULTS, ...conversation.settings } });
    }
    return clean.length;
  }

  #writeList(items) {
    this.#write(LIST, items);
    this.dispatchEvent(new Event("change"));
  }

  #write(name, value) {
    const text = JSON.stringify(value);
    for (;;) {
      try {
        return localStorage.setItem(name, text);
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        if (!this.#shed(name)) return this.dispatchEvent(new Event("full"));
      }
    }
  }

  /** Makes room at the cost of the oldest other conversation that has details or pictures to lose. */
  #shed(keep) {
    for (const field of ["tokens", "images"]) {
      for (const { id } of this.list().reverse()) {
        const conversation = ONE + id === keep || DRAFT + id === keep ? null : parse(localStorage.getItem(ONE + id));
        const heavy = conversation?.messages.filter((message) => message[field]?.length) ?? [];
        if (!heavy.length) continue;
        for (const message of heavy) delete message[field];
        localStorage.setItem(ONE + id, JSON.stringify(conversation));
        return true;
      }
    }
    return false;
  }

  /** Another tab wrote: forget what is open here unless it is the same reply being written. */
  #elsewhere(name) {
    if (name === null || name === LIST) this.dispatchEvent(new Event("change"));
    if (name?.startsWith(ONE)) this.dispatchEvent(new CustomEvent("elsewhere", { detail: name.slice(ONE.length) }));
  }

  forget(id) {
    this.#open.delete(id);
  }
}

export const store = new Store();
