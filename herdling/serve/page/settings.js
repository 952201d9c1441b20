/** The settings of a conversation; a new one begins with those used last. */

import { connection } from "./connection.js";
import { byId, h } from "./dom.js";
import { readTools } from "./reply.js";
import { key } from "./server.js";
import { DEFAULTS, store } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, "0 always takes the likeliest token"],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }, "of the likeliest tokens, those that make up this share"],
  ["top_k", "Top k", { min: 0, max: 1000, step: 1 }, "of that many likeliest tokens; 0 of all"],
  ["max_tokens", "Longest reply", { min: 1, max: 1000000, step: 1 }, "in tokens"],
  ["seed", "Seed", { min: 0, max: 2 ** 48, step: 1 }, "the same seed gives the same reply; empty draws one"],
];
const SWITCHES = [
  ["probabilities", "Token probabilities", "shown on hover"],
  ["experts", "Experts of each token", "shown below a reply"],
];

export class Settings {
  constructor() {
    this.conversation = null;
    byId("model").addEventListener("change", ({ target }) => this.#set("model", target.value));
    connection.addEventListener("change", () => this.#models());
    byId("fields").append(this.#system(), ...NUMBERS.map((row) => this.#number(...row)), ...SWITCHES.map((row) => this.#switch(...row)), this.#tools(), this.#key());
  }

  show(conversation) {
    this.conversation = conversation;
    for (const field of byId("fields").querySelectorAll("[name]")) {
      const value = conversation.settings[field.name];
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
    }
    this.#models();
  }

  #set(name, value) {
    const { conversation } = this;
    conversation.settings[name] = value;
    store.prefer({ settings: { ...conversation.settings } });
    if (conversation.messages.length) store.save(conversation);
  }

  /** The model of the conversation if the server has it, otherwise the server's first. */
  #models() {
    const names = connection.models.map(({ id }) => id);
    if (!this.conversation || !names.length) return;
    const { settings } = this.conversation;
    if (!names.includes(settings.model)) settings.model = names[0];
    const select = byId("model");
    if (names.join("\n") !== [...select.options].map(({ value }) => value).join("\n")) {
      select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    }
    select.value = settings.model;
  }

  #system() {
    return h("label", { class: "field" }, h("span", {}, "System prompt"),
      h("textarea", { name: "system", rows: "4", placeholder: "How the model should behave", onchange: ({ target }) => this.#set("system", target.value) }));
  }

  #number(name, label, limits, hint) {
    const take = ({ target }) => {
      const empty = target.value === "";
      if ((empty && name !== "seed") || !target.checkValidity()) target.value = this.conversation.settings[name];
      else this.#set(name, empty ? "" : Number(target.value));
    };
    return h("label", { class: "field number" }, h("span", {}, label), h("input", { type: "number", name, ...limits, required: name !== "seed", placeholder: name === "seed" ? "random" : null, onchange: take }), h("small", {}, hint));
  }

  #switch(name, label, hint) {
    return h("label", { class: "field switch" }, h("input", { type: "checkbox", name, onchange: ({ target }) => this.#set(name, target.checked) }), h("span", {}, label), h("small", {}, hint));
  }

  #tools() {
    const problem = h("small", { class: "problem", role: "alert" });
    const take = ({ target }) => {
      problem.textContent = "";
      try {
        if (target.value.trim()) readTools(target.value);
      } catch (error) {
        problem.textContent = error.message;
      }
      this.#set("tools", target.value);
    };
    return h("label", { class: "field" }, h("span", {}, "Tools"),
      h("textarea", { name: "tools", rows: "5", class: "code", spellcheck: "false", placeholder: '[{"name": "get_weather", "parameters": {…}}]', onchange: take }),
      h("small", {}, "functions as JSON, in OpenAI's form; you answer the model's calls yourself"), problem);
  }

  #key() {
    return h("div", { class: "row" },
      h("button", { type: "button", onclick: () => askKey() }, "API key"),
      h("button", { type: "button", onclick: () => this.#reset() }, "Reset to defaults"));
  }

  #reset() {
    const { model } = this.conversation.settings;
    Object.assign(this.conversation.settings, DEFAULTS, { model });
    this.#set("model", model);
    this.show(this.conversation);
  }
}

/** Asks for the API key; the server is asked again with what is given. */
export function askKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  const field = byId("key");
  field.value = key.get() ?? "";
  byId("key-message").textContent = connection.state === "key" ? connection.message : "Sent with every request; empty for a server without keys.";
  dialog.onclose = () => {
    if (dialog.returnValue !== "use") return;
    key.set(field.value.trim(), byId("key-keep").checked);
    connection.check();
  };
  dialog.returnValue = "";
  dialog.showModal();
}
