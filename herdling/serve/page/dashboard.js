/** The server at work: load, queue, cache, tokens a second, and the load of every expert. */

import { bars, divided, line } from "./charts.js";
import { connection } from "./connection.js";
import { byId, h } from "./dom.js";
import { bytes, count, duration, loadFacts, modelFacts, plain } from "./facts.js";

const ROOM = 120; // most polls that a line shows
const LEAST = 40;
const RECENT = 60; // seconds

export class Dashboard {
  #history = [];
  #recent = true;

  constructor() {
    this.visible = false;
    connection.addEventListener("change", () => this.#take());
    byId("recent").addEventListener("change", () => this.#choose(true));
    byId("always").addEventListener("change", () => this.#choose(false));
  }

  show(visible) {
    this.visible = visible;
    connection.every(visible ? 1000 : 10000);
    if (visible) this.#draw();
  }

  #choose(recent) {
    this.#recent = recent;
    this.#draw();
  }

  #take() {
    if (connection.state !== "ok") return;
    const now = loadFacts(connection.facts);
    if (now.uptime < this.#history.at(-1)?.uptime) this.#history = []; // a server that was started again
    this.#history.push(now);
    this.#history.splice(0, Math.max(0, this.#history.length - ROOM));
    if (this.visible) this.#draw();
  }

  #draw() {
    const now = this.#history.at(-1);
    byId("nothing-yet").hidden = Boolean(now);
    if (!now) return;
    byId("about-model").textContent = about(modelFacts(connection.facts), now);
    byId("cards").replaceChildren(...this.#cards(now).filter(Boolean));
    this.#experts(now);
  }

  #cards(now) {
    const series = (name) => this.#history.map((facts) => facts[name] ?? 0);
    const chart = (name, label) => line(series(name), Math.max(LEAST, this.#history.length), `${label} over the last ${this.#history.length} answers`);
    return [
      now.newRate !== null && card("Writing", plain(now.newRate, 1), "tokens/s", chart("newRate", "Tokens written a second")),
      now.promptRate !== null && card("Reading", plain(now.promptRate, 1), "prompt tokens/s", chart("promptRate", "Prompt tokens read a second")),
      now.running !== null && card("Requests", plain(now.running), "running", chart("running", "Requests running")),
      now.waiting !== null && card("Queue", plain(now.waiting), now.queueLimit ? `waiting, of at most ${plain(now.queueLimit)}` : "waiting", chart("waiting", "Requests waiting")),
      this.#cache(now),
      now.memory !== null && card("Memory", bytes(now.memory), "of this process", chart("memory", "Memory")),
      totals(now),
    ];
  }

  #cache(now) {
    if (!now.pages) return null;
    const [used, kept] = [now.pagesUsed / now.pages, now.pagesCached / now.pages];
    const label = `${plain(now.pagesUsed)} of ${plain(now.pages)} pages in use, ${plain(now.pagesCached)} kept for reuse`;
    return card("Cache", `${plain(100 * (used + kept))} %`, now.cacheBytes ? `full, of ${bytes(now.cacheBytes)}` : "full",
      divided([["In use", used, "used"], ["Kept for reuse", kept, "kept"]], label),
      h("ul", { class: "key" }, [["used", now.pagesUsed, "in use"], ["kept", now.pagesCached, "for reuse"], ["free", now.pages - now.pagesUsed - now.pagesCached, "free"]].map(([kind, value, name]) =>
        h("li", {}, h("span", { class: kind }), `${plain(value)} ${name}`))));
  }

  #experts(now) {
    const before = this.#recent ? (this.#history.findLast(({ uptime }) => now.uptime - uptime >= RECENT) ?? this.#history[0]) : null;
    const load = now.expertLoad.map((row, layer) => row.map((value, id) => value - (before?.expertLoad[layer]?.[id] ?? 0)));
    const facts = modelFacts(connection.facts);
    byId("experts-section").hidden = !load.length;
    byId("experts").replaceChildren(...load.map((row, layer) => layerRow(row, `Layer ${facts.moeLayers[layer] ?? layer}`)));
  }
}

function about(facts, { version, uptime }) {
  const parts = [facts.name];
  if (facts.parameters) parts.push(`${count(facts.parameters)} parameters`);
  if (facts.layers) parts.push(`${facts.layers} layers, ${facts.moeLayers.length} with ${facts.experts} experts`);
  if (facts.context) parts.push(`context of ${plain(facts.context)}`);
  if (facts.dtype) parts.push(`${facts.dtype} on ${facts.device}`);
  if (version) parts.push(`Herdling ${version}`);
  if (uptime !== null) parts.push(`up for ${duration(uptime)}`);
  return parts.join(" · ");
}

function card(name, value, unit, ...below) {
  return h("section", { class: "card" }, h("h3", {}, name), h("p", { class: "value" }, h("strong", {}, value), " ", h("span", {}, unit)), below);
}

function totals(now) {
  const share = (part, whole) => (whole ? `${plain((100 * part) / whole)} %` : "–");
  const rows = [
    ["Replies", now.finished], ["Tokens written", now.newTokens], ["Prompt tokens", now.promptTokens],
    ["Of these cached", now.promptTokens === null ? null : share(now.cachedTokens, now.promptTokens)],
    ["Steps", now.steps], ["Preemptions", now.preemptions],
    ["Guesses accepted", now.drafted ? share(now.accepted, now.drafted) : null],
  ].filter(([, value]) => value !== null);
  if (!rows.length) return null;
  return h("section", { class: "card whole" }, h("h3", {}, "Since the start"),
    h("dl", { class: "totals" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "number" ? count(value) : value)))));
}

function layerRow(row, name) {
  const total = row.reduce((sum, value) => sum + value, 0);
  if (!total) return h("li", {}, h("span", { class: "name" }, name), h("span", { class: "idle" }, "no tokens"));
  const shares = row.map((value) => value / total);
  const most = shares.indexOf(Math.max(...shares));
  const unused = shares.filter((share) => !share).length;
  const label = `${name}: the busiest is expert ${most} with ${plain(100 * shares[most])} %${unused ? `; ${unused} unused` : ""}`;
  return h("li", {}, h("span", { class: "name" }, name), bars(shares, label),
    h("span", { class: "figure", title: "Load of the busiest expert, as a multiple of an even spread" }, `${(shares[most] * row.length).toFixed(1)}×`));
}
