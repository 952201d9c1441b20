/**
 * Replies under way, by conversation: they go on when another conversation is looked at. An
 * "progress" event's `detail` is {conversation, message}; "end" comes once, with the same.
 */

import { connection } from "./connection.js";
import { Reply, requestBody } from "./reply.js";
import { chat, ServerError } from "./server.js";
import { newId, store } from "./store.js";

const SAVED_EVERY = 400; // ms

class Runner extends EventTarget {
  #running = new Map();
  #leaving = false;

  constructor() {
    super();
    addEventListener("beforeunload", () => this.#leave());
    addEventListener("pagehide", () => this.#leave());
  }

  get busy() {
    return this.#running.size > 0;
  }

  running(id) {
    return this.#running.has(id);
  }

  stop(id) {
    this.#running.get(id)?.controller.abort();
  }

  /** Writes down what has arrived of every reply: the browser is about to cut their connections. */
  #leave() {
    this.#leaving = true;
    setTimeout(() => (this.#leaving = false), 3000); // for a departure that does not come about
    for (const [id, { message }] of this.#running) store.saveDraft(id, message);
  }

  /** Appends a reply to the conversation; resolves when it has ended, however it did. */
  async start(conversation) {
    const controller = new AbortController();
    const message = { id: newId(), role: "assistant", text: "", state: "writing" };
    const detail = { conversation, message };
    const reply = new Reply(message);
    this.#running.set(conversation.id, { controller, message });
    try {
      const body = requestBody(conversation);
      conversation.messages.push(message);
      store.save(conversation);
      this.#tell("progress", detail);
      await this.#read(chat(body, controller.signal), reply, detail);
      message.state = "done";
    } catch (error) {
      this.#failed(error, message, controller.signal);
      if (!conversation.messages.includes(message)) conversation.messages.push(message);
    } finally {
      this.#running.delete(conversation.id);
      if (store.get(conversation.id) === conversation) store.save(conversation);
      this.#tell("end", detail);
      connection.check();
    }
  }

  async #read(chunks, reply, detail) {
    let saved = performance.now();
    for await (const chunk of chunks) {
      reply.take(chunk);
      if (performance.now() - saved > SAVED_EVERY) {
        store.saveDraft(detail.conversation.id, detail.message);
        saved = performance.now();
      }
      this.#tell("progress", detail);
    }
  }

  #failed(error, message, signal) {
    if (signal.aborted) {
      message.state = "stopped";
      return;
    }
    message.state = message.text || this.#leaving ? "cut" : "failed";
    if (this.#leaving) return;
    message.error = error.message;
    if (error instanceof ServerError) connection.report(error);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

export const runner = new Runner();
