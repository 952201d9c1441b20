/**
 * A reply token by token, tinted by how unsure the model was or by the expert of a layer; pointing at
 * a token, or walking to it with the arrow keys, shows what else it might have been.
 */

import { announce, byId, h } from "./dom.js";
import { expertColour, layerName, swatch } from "./experts.js";

const share = (logprob) => Math.exp(logprob);
const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.01 ? `${(100 * p).toFixed(1)} %` : p >= 1e-5 ? `${(100 * p).toPrecision(1)} %` : "< 0.001 %");

/** Spaces and line ends made visible. */
export const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";

export function tokenPanel(message, facts) {
  const tokens = message.tokens ?? [];
  if (!tokens.length) return h("p", { class: "hint" }, "No tokens were recorded for this reply; they are when “Token probabilities” is on in the settings.");
  const nodes = tokens.map((token, i) => h("span", { class: "token", "data-index": i, tabindex: i ? "-1" : "0" }, tokenText(token.text)));
  const strip = h("div", { class: "tokens", role: "group", "aria-label": "Tokens of the reply; move with the arrow keys" }, nodes);
  const layers = Math.max(0, ...tokens.map((token) => token.experts?.length ?? 0));
  const chooser = colourBy(layers, facts, (layer) => tint(nodes, tokens, layer));
  tint(nodes, tokens, null);
  walk(strip, nodes, tokens, facts);
  return h("div", {}, chooser, strip);
}

function tokenText(text) {
  const end = /\n+$/.exec(text);
  return end ? [text.slice(0, end.index) + "⏎".repeat(end[0].length), h("br")] : text;
}

function colourBy(layers, facts, choose) {
  const options = Array.from({ length: layers }, (_, layer) => h("option", { value: layer }, `Expert, ${layerName(facts, layer).toLowerCase()}`));
  return h("label", { class: "chooser" }, "Colour by ",
    h("select", { onchange: (event) => choose(event.target.value === "" ? null : Number(event.target.value)) },
      h("option", { value: "" }, "Probability"), options));
}

function tint(nodes, tokens, layer) {
  nodes.forEach((node, i) => {
    const { logprob, experts } = tokens[i];
    const id = layer === null ? null : experts?.[layer]?.[0];
    if (id !== null && id !== undefined && id >= 0) node.style.backgroundColor = expertColour(id, 0.34);
    else if (layer === null && logprob !== undefined) node.style.backgroundColor = doubt(share(logprob));
    else node.style.backgroundColor = "";
  });
}

/** Nothing where the model was sure; amber, then red. */
function doubt(p) {
  if (p > 0.9) return "transparent";
  return `hsl(${(8 + 36 * p).toFixed(0)} 85% 55% / ${(0.12 + 0.3 * (1 - p)).toFixed(2)})`;
}

function walk(strip, nodes, tokens, facts) {
  const index = (target) => {
    const node = target.closest?.(".token");
    return node ? Number(node.dataset.index) : null;
  };
  strip.addEventListener("pointerover", (event) => {
    const i = index(event.target);
    if (i !== null) peekAt(tokens[i], facts, nodes[i].getBoundingClientRect(), true);
  });
  strip.addEventListener("pointerleave", hidePeek);
  strip.addEventListener("focusin", (event) => {
    const i = index(event.target);
    if (i === null) return;
    peekAt(tokens[i], facts, nodes[i].getBoundingClientRect(), true);
    announce(spoken(tokens[i], facts));
  });
  strip.addEventListener("focusout", hidePeek);
  strip.addEventListener("keydown", (event) => {
    const i = index(event.target);
    const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (i === null || next === undefined || !nodes[next]) return;
    event.preventDefault();
    nodes[i].tabIndex = -1;
    nodes[next].tabIndex = 0;
    nodes[next].focus();
  });
}

function spoken({ text, logprob, top, experts }, facts) {
  const others = top.filter(([other]) => other !== text).slice(0, 3).map(([other, p]) => `${visible(other)} ${percent(share(p))}`);
  const routes = (experts ?? []).map((ids, layer) => `${layerName(facts, layer)}: expert ${ids.join(" and ")}`);
  return [visible(text), logprob === undefined ? "" : percent(share(logprob)), others.length ? `or ${others.join(", ")}` : "", ...routes].filter(Boolean).join("; ");
}

/** The little card about one token, above `box` (a DOMRect) or, if wanted, below, where there is room. */
export function peekAt(token, facts, box, wantBelow = false) {
  const peek = byId("peek");
  peek.replaceChildren(card(token, facts));
  peek.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = peek;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
  const [above, below] = [box.top - height - 8, box.bottom + 8];
  const fits = below + height < innerHeight - 8;
  peek.style.left = `${left}px`;
  peek.style.top = `${(wantBelow && fits) || above < 8 ? Math.min(below, innerHeight - height - 8) : above}px`;
}

export function hidePeek() {
  byId("peek").hidden = true;
}

function card({ text, logprob, top, experts }, facts) {
  const rows = [...(top ?? [])];
  if (logprob !== undefined && !rows.some(([other]) => other === text)) rows.push([text, logprob]);
  return h("div", {},
    rows.length
      ? h("dl", { class: "chances" }, rows.map(([other, value]) => chance(other, share(value), other === text)))
      : h("p", { class: "chosen" }, visible(text)),
    experts?.length ? h("div", { class: "routes" }, experts.map((ids, layer) => route(ids, layer, facts))) : null);
}

function chance(text, p, chosen) {
  const bar = h("span", { class: "bar" });
  bar.style.width = `${100 * p}%`;
  return h("div", { class: chosen ? "chosen" : null }, h("dt", {}, visible(text)), h("dd", {}, h("span", { class: "track" }, bar), h("span", {}, percent(p))));
}

function route(ids, layer, facts) {
  return h("span", { title: layerName(facts, layer) }, h("small", {}, `L${facts.moeLayers[layer] ?? layer}`), ids.map((id) => [swatch(id), `${id}`]));
}
