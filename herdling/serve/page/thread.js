/** The conversation that is looked at: its messages, and every way in which it goes on. */

import { announce, byId, eachFrame, h, toast } from "./dom.js";
import { MessageView } from "./message.js";
import { runner } from "./runner.js";
import { newId, store } from "./store.js";

const NEAR = 80; // pixels from the end that still count as being there
const SPOKEN = 1500; // characters of a reply that are read out

export class Thread {
  constructor() {
    this.node = byId("thread");
    this.scroller = byId("scroller");
    this.conversation = null;
    this.views = new Map();
    this.follow = true;
    this.draw = eachFrame(() => this.#draw());
    runner.addEventListener("progress", ({ detail }) => detail.conversation === this.conversation && this.draw());
    runner.addEventListener("end", ({ detail }) => this.#ended(detail));
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    byId("to-end").addEventListener("click", () => this.toEnd());
  }

  show(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.node.replaceChildren();
    this.#draw();
    this.toEnd();
  }

  get running() {
    return runner.running(this.conversation.id);
  }

  stop() {
    runner.stop(this.conversation.id);
  }

  /** Adds a message of the user's and asks for the reply. */
  send(text, images) {
    const { conversation } = this;
    conversation.messages.push({ id: newId(), role: "user", text, images: images.length ? images : undefined, state: "done" });
    if (!conversation.title) conversation.title = titleOf(text, images);
    this.#ask();
  }

  /** Asks for the reply to the last message of the user's once more. */
  regenerate(message = this.conversation.messages.findLast(({ role }) => role === "assistant")) {
    const place = this.conversation.messages.indexOf(message);
    if (this.running || place < 0) return;
    this.#replaceFrom(place, []);
  }

  editLast() {
    const last = this.conversation.messages.findLast(({ role }) => role === "user");
    if (last && !this.running) this.views.get(last.id).edit();
  }

  /** Moves the focus to the next or previous message. */
  step(direction) {
    const nodes = [...this.node.querySelectorAll(".message")];
    const now = nodes.indexOf(document.activeElement?.closest(".message"));
    const next = nodes[now < 0 ? (direction > 0 ? 0 : nodes.length - 1) : now + direction];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  toEnd() {
    this.follow = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #edit(message, text) {
    const place = this.conversation.messages.indexOf(message);
    if (this.running || place < 0 || (!text.trim() && !message.images?.length)) return;
    this.#replaceFrom(place, [{ ...message, id: newId(), text }]);
  }

  /** What comes after is replaced; where that is more than the one reply, there is a way back. */
  #replaceFrom(place, messages) {
    const { conversation } = this;
    const before = [...conversation.messages];
    conversation.messages.splice(place, Infinity, ...messages);
    if (before.length - place - messages.length > 1) {
      toast("Later messages were replaced.", () => {
        runner.stop(conversation.id);
        conversation.messages = before;
        store.save(conversation);
        if (conversation === this.conversation) this.show(conversation);
      });
    }
    this.#ask();
  }

  #answer(call, text) {
    const { messages } = this.conversation;
    messages.push({ id: newId(), role: "tool", call: call.id, text, state: "done" });
    const asked = messages.findLast(({ role }) => role === "assistant");
    if (asked.calls.every((one) => this.#answered(asked, one))) this.#ask();
    else {
      store.save(this.conversation);
      this.#draw();
    }
  }

  #answered(message, call) {
    const { messages } = this.conversation;
    const later = messages.slice(messages.indexOf(message) + 1);
    return later.some(({ role }) => role === "user") || later.some((other) => other.role === "tool" && (!call || other.call === call.id));
  }

  #ask() {
    this.follow = true;
    runner.start(this.conversation);
    this.#draw();
    this.toEnd();
    // What had the focus may be gone; on a phone the field would bring up its keyboard.
    if (matchMedia("(hover: hover)").matches) byId("text").focus();
  }

  #draw() {
    const { messages, id } = this.conversation;
    const known = new Set(messages.map((message) => message.id));
    for (const [key, view] of this.views) {
      if (!known.has(key) || !messages.includes(view.message)) {
        view.node.remove();
        this.views.delete(key);
      }
    }
    for (const message of messages) {
      const view = this.views.get(message.id);
      if (view) view.update();
      else {
        const fresh = new MessageView(message, this.#acts());
        this.views.set(message.id, fresh);
        this.node.append(fresh.node);
      }
    }
    byId("welcome").hidden = messages.length > 0;
    document.body.classList.toggle("replying", runner.running(id));
    if (this.follow) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #acts() {
    return {
      edit: (message, text) => this.#edit(message, text),
      regenerate: (message) => this.regenerate(message),
      answer: (message, call, text) => this.#answer(call, text),
      answered: (message, call) => this.#answered(message, call),
    };
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follow = scrollHeight - scrollTop - clientHeight < NEAR;
    byId("to-end").hidden = this.follow;
  }

  #ended({ conversation, message }) {
    if (conversation !== this.conversation) return;
    this.#draw();
    if (message.state === "done") announce(message.text.slice(0, SPOKEN) || "The reply has ended.");
    else announce(message.state === "stopped" ? "Stopped." : message.error);
  }
}

function titleOf(text, images) {
  const line = text.trim().split("\n")[0] || images[0]?.name || "Conversation";
  return line.length > 60 ? `${line.slice(0, 57)}…` : line;
}
