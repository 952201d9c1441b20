/**
 * Whether the server is there, and what it says of itself: `connection.state` is one of asking, ok,
 * loading, gone, key, broken; `connection.facts` the last status; a "change" event tells of each answer.
 *
 * Asked once a second by the dashboard, seldom by the chat, every two seconds while it is away, never
 * while the page is hidden.
 */

import { models, ServerError, status } from "./server.js";

const AWAY = 2000;

class Connection extends EventTarget {
  state = "asking";
  message = "";
  facts = null;
  models = [];
  interval = 10000;
  #timer;
  #asking = null;

  start() {
    document.addEventListener("visibilitychange", () => this.check());
    return this.check();
  }

  every(milliseconds) {
    this.interval = milliseconds;
    this.check();
  }

  /** Asks now; calls that overlap share one answer. */
  check() {
    this.#asking ??= this.#ask().finally(() => (this.#asking = null));
    return this.#asking;
  }

  /** For failures that a request met on its way. */
  report(error) {
    if (["gone", "loading", "key"].includes(error.kind)) {
      this.#become(error.kind, error.message);
      this.#later();
    }
  }

  async #ask() {
    clearTimeout(this.#timer);
    if (document.hidden && this.state === "ok") return;
    try {
      if (this.state !== "ok") this.models = await models();
      this.facts = await status();
      this.#become(...standing(this.facts));
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.#become(error.kind === "refused" ? "broken" : error.kind, error.message);
    }
    this.#later();
  }

  #become(state, message) {
    [this.state, this.message] = [state, message];
    this.dispatchEvent(new Event("change"));
  }

  #later() {
    clearTimeout(this.#timer);
    if (this.state === "key") return; // asked again when there is a key
    this.#timer = setTimeout(() => this.check(), this.state === "ok" ? this.interval : AWAY);
  }
}

/** A server that answers may still be loading its model, or have lost it. */
function standing({ status: state, reason }) {
  if (state === "ok") return ["ok", ""];
  return [state === "loading" ? "loading" : "broken", reason ?? ""];
}

export const connection = new Connection();
