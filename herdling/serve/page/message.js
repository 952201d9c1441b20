/** One message of the thread: its text, pictures, tool calls, figures, and what can be done with it. */

import { connection } from "./connection.js";
import { copy, h, icon, iconButton } from "./dom.js";
import { expertPanel } from "./experts.js";
import { modelFacts, plain } from "./facts.js";
import { watch } from "./hover.js";
import { MarkdownView } from "./markdown.js";
import { describe, tiledPicture, tiling } from "./tiles.js";
import { hidePeek, peekAt, tokenPanel } from "./tokens.js";

const WHO = { user: "You", assistant: "Herdling", tool: "Tool result" };
const facts = () => modelFacts(connection.facts);

/** `act` has edit, regenerate, answer(call, text). */
export class MessageView {
  constructor(message, act) {
    this.message = message;
    this.act = act;
    this.body = h("div", { class: "body" });
    this.calls = h("div", { class: "calls" });
    this.note = h("div", { class: "note" });
    this.actions = h("div", { class: "actions" });
    this.panel = h("div", { class: "panel", hidden: true });
    this.node = h("article", { class: `message ${message.role}`, "aria-label": WHO[message.role], tabindex: "-1", "data-id": message.id },
      h("h2", { class: "offscreen" }, WHO[message.role]),
      this.#pictures(), this.body, this.calls, this.note, this.actions, this.panel);
    if (message.role === "assistant") {
      this.markdown = new MarkdownView(this.body);
      watch(this.body, message, facts);
    } else if (message.role === "tool") {
      this.body.append(h("figure", { class: "call" }, h("figcaption", {}, icon("tool"), "Tool result"), h("pre", { tabindex: "0" }, message.text)));
    } else this.body.append(h("p", { class: "plain" }, message.text));
    this.update();
  }

  /** Shows what the message has become. */
  update() {
    const { message } = this;
    const writing = message.state === "writing";
    this.node.classList.toggle("writing", writing);
    this.node.setAttribute("aria-busy", String(writing));
    if (this.markdown) this.markdown.update(message.text);
    this.#calls();
    if (!writing || !this.actions.childElementCount) this.#finish(writing);
  }

  #finish(writing) {
    this.note.replaceChildren(...this.#notes());
    this.actions.replaceChildren(...(writing ? [] : this.#buttons()));
  }

  #pictures() {
    const { images } = this.message;
    if (!images?.length) return null;
    return h("div", { class: "pictures" }, images.map((image) => {
      const vision = facts().image;
      const label = vision ? `${image.name}, ${describe(tiling(image.width, image.height, vision))}` : image.name;
      return h("button", { type: "button", class: "picture-button", title: label, "aria-label": `Show ${label}`, onclick: () => showPicture(image) },
        h("img", { src: image.url, alt: image.name }));
    }));
  }

  #calls() {
    const { calls, state } = this.message;
    if (!calls?.length) return;
    const shape = JSON.stringify([calls, state === "writing", this.act.answered(this.message)]);
    if (shape === this.callsShown) return;
    this.callsShown = shape;
    this.calls.replaceChildren(...calls.filter(Boolean).map((call) => this.#call(call, state === "writing")));
  }

  #call(call, writing) {
    const card = h("figure", { class: "call" },
      h("figcaption", {}, icon("tool"), "Calls ", h("code", {}, call.name || "…")),
      h("pre", { tabindex: "0", role: "region", "aria-label": `Arguments of ${call.name}` }, pretty(call.arguments)));
    if (writing || this.act.answered(this.message, call)) return card;
    const field = h("textarea", { rows: "1", placeholder: "What the tool answers", "aria-label": `Result of ${call.name}` });
    const form = h("form", { onsubmit: (event) => { event.preventDefault(); this.act.answer(this.message, call, field.value); } },
      field, h("button", { type: "submit" }, "Send result"));
    card.append(form);
    return card;
  }

  #notes() {
    const { state, error, finish, role, text, calls } = this.message;
    const said = {
      stopped: "Stopped.",
      cut: error ?? "The reply was interrupted; what had arrived is kept.",
      failed: error ?? "The request failed.",
    }[state];
    if (said) {
      const again = h("button", { type: "button", onclick: () => this.act.regenerate(this.message) }, icon("retry"), "Try again");
      return [h("p", { class: state === "stopped" ? "hint" : "problem" }, state === "stopped" ? null : icon("alert"), h("span", {}, said), state === "stopped" ? null : again)];
    }
    if (state !== "done" || role !== "assistant") return [];
    if (finish === "length") return [h("p", { class: "hint" }, "The reply ends at the longest length allowed; raise “Longest reply” in the settings for more.")];
    if (finish === "content_filter") return [h("p", { class: "hint" }, "The server’s safeguards ended the reply here.")];
    return text || calls?.length ? [] : [h("p", { class: "hint" }, "The model ended its reply at once, without a word.")];
  }

  #buttons() {
    const { message } = this;
    const copyButton = iconButton("copy", "Copy", async () => {
      await copy(message.text);
      copyButton.replaceChildren(icon("check"));
      setTimeout(() => copyButton.replaceChildren(icon("copy")), 1500);
    });
    if (message.role === "user") return [iconButton("edit", "Edit and send again", () => this.edit()), copyButton];
    if (message.role === "tool" || message.state === "failed") return [];
    return [
      copyButton,
      iconButton("retry", "Regenerate", () => this.act.regenerate(message)),
      ...this.#toggles(),
      h("span", { class: "figures" }, figures(message.stats)),
    ];
  }

  #toggles() {
    if (!this.message.tokens?.length) return [];
    const kinds = [["Tokens", tokenPanel]];
    if (this.message.tokens.some((token) => token.experts?.length)) kinds.push(["Experts", expertPanel]);
    const buttons = kinds.map(([name, build]) =>
      h("button", { type: "button", class: "quiet small", "aria-expanded": "false", onclick: (event) => this.#open(event.currentTarget, buttons, build) }, name));
    return buttons;
  }

  #open(button, buttons, build) {
    const open = button.getAttribute("aria-expanded") !== "true";
    for (const other of buttons) other.setAttribute("aria-expanded", String(other === button && open));
    this.panel.hidden = !open;
    hidePeek();
    this.panel.replaceChildren(...(open ? [build(this.message, facts(), (index, x, y) => {
      if (index === null) hidePeek();
      else peekAt(this.message.tokens[index], facts(), new DOMRect(x, y, 0, 0));
    })] : []));
    if (open) this.panel.scrollIntoView({ block: "nearest" });
  }

  /** Turns a message of the user's into a field. */
  edit() {
    const field = h("textarea", { class: "editor", value: this.message.text, "aria-label": "Edit the message" });
    const done = () => {
      this.body.replaceChildren(h("p", { class: "plain" }, this.message.text));
      this.actions.hidden = false;
      this.actions.querySelector("button")?.focus();
    };
    const send = () => this.act.edit(this.message, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey) send();
      else if (event.key === "Escape") done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.actions.hidden = true;
    this.body.replaceChildren(field, h("div", { class: "row" },
      h("button", { type: "button", class: "primary", onclick: send }, "Send again"),
      h("button", { type: "button", onclick: done }, "Cancel")));
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    field.addEventListener("input", fit);
    fit();
    field.focus();
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still arriving
  }
}

function figures(stats) {
  if (!stats) return "";
  const parts = [`${plain(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`];
  if (stats.rate) parts.push(`${plain(stats.rate, stats.rate < 10 ? 1 : 0)} tokens/s`);
  if (stats.wait) parts.push(`${stats.wait.toFixed(stats.wait < 10 ? 2 : 1)} s to the first`);
  if (stats.prompt) parts.push(`prompt ${plain(stats.prompt)}${stats.cached ? ` (${plain(stats.cached)} cached)` : ""}`);
  return parts.join(" · ");
}

/** The picture at full size with the tiles it is cut into. */
export function showPicture(image) {
  const vision = facts().image;
  const dialog = h("dialog", { class: "viewer", "aria-label": image.name, onclose: () => dialog.remove() },
    h("header", {}, h("strong", {}, image.name),
      h("span", { class: "hint" }, `${image.width} × ${image.height} pixels`, vision ? `; ${describe(tiling(image.width, image.height, vision))}` : ""),
      iconButton("close", "Close", () => dialog.close())),
    tiledPicture(image, vision));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}
