/**
 * Which experts the tokens of a reply went to: a strip with one row a layer and one column a token,
 * and how often each expert of each layer was chosen.
 */

import { h } from "./dom.js";
import { plain } from "./facts.js";

/** A colour of its own for each expert, hues a golden angle apart so that neighbours differ. */
export function expertColour(id, alpha = 1) {
  const hue = (id * 137.508 + 18) % 360;
  const light = 56 + 7 * ((id % 3) - 1);
  return `hsl(${hue.toFixed(1)} 50% ${light}% / ${alpha})`;
}

/** Number of the model's layer for each row, where the server told; otherwise they are counted. */
export const layerName = (facts, row) => `Layer ${facts.moeLayers[row] ?? row}`;

const tooWide = 4096; // pixels of a canvas

export function expertPanel(message, facts, onPoint) {
  const routed = (message.tokens ?? []).map((token, index) => ({ index, rows: token.experts })).filter(({ rows }) => rows?.length);
  if (!routed.length) return h("p", { class: "hint" }, "The server told no experts for this reply.");
  const layers = Math.max(...routed.map(({ rows }) => rows.length));
  const counts = countExperts(routed, layers, facts.experts);
  return h("div", { class: "experts" },
    h("p", { class: "hint" }, `${plain(routed.length)} tokens from left to right, one row a layer; a colour is an expert.`),
    strip(routed, layers, counts, facts, onPoint),
    h("details", {}, h("summary", {}, "How often each expert was chosen"), table(counts, routed.length, facts)));
}

/** counts[layer][expert] over the tokens. */
function countExperts(routed, layers, experts) {
  let most = (experts ?? 1) - 1;
  for (const { rows } of routed) for (const ids of rows) for (const id of ids) most = Math.max(most, id);
  const counts = Array.from({ length: layers }, () => new Array(most + 1).fill(0));
  for (const { rows } of routed) {
    rows.forEach((ids, layer) => {
      for (const id of ids) if (id >= 0) counts[layer][id]++;
    });
  }
  return counts;
}

function strip(routed, layers, counts, facts, onPoint) {
  const roomy = routed.length <= 55 ? 12 : routed.length <= 140 ? 6 : 4;
  const cell = Math.max(1, Math.min(roomy, Math.floor(tooWide / routed.length)));
  const row = layers > 16 ? 6 : 12;
  const canvas = h("canvas", { role: "img", "aria-label": summary(counts, facts), width: routed.length * cell, height: layers * row });
  const context = canvas.getContext("2d");
  routed.forEach(({ rows }, column) => {
    rows.forEach((ids, layer) => {
      const chosen = ids.filter((id) => id >= 0);
      chosen.forEach((id, i) => {
        context.fillStyle = expertColour(id);
        const height = (row - 1) / chosen.length;
        context.fillRect(column * cell, layer * row + i * height, Math.max(1, cell - (cell > 3 ? 1 : 0)), height);
      });
    });
  });
  canvas.addEventListener("pointermove", (event) => {
    const column = Math.floor((event.offsetX / canvas.clientWidth) * routed.length);
    if (routed[column]) onPoint(routed[column].index, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => onPoint(null));
  const names = h("div", { class: "layers", "aria-hidden": "true" },
    counts.map((_, layer) => h("span", {}, layers > 16 && layer % 4 ? "" : layerName(facts, layer).replace("Layer ", ""))));
  for (const name of names.children) name.style.height = `${row}px`;
  return h("div", { class: "strip" }, names, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Experts by token" }, canvas));
}

function summary(counts, facts) {
  const lines = counts.map((row, layer) => {
    const most = row.indexOf(Math.max(...row));
    const used = row.filter(Boolean).length;
    return `${layerName(facts, layer)}: ${used} of ${row.length} experts used, most often expert ${most}`;
  });
  return lines.join(". ");
}

function table(counts, tokens, facts) {
  const cells = (row) => row.map((value) => {
    const cell = h("td", { class: "right" }, plain(value));
    cell.style.setProperty("--share", value / tokens);
    return cell;
  });
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Counts of experts" },
    h("table", { class: "heat" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Expert"), counts[0].map((_, id) => h("th", { scope: "col", class: "right" }, swatch(id), `${id}`)))),
      h("tbody", {}, counts.map((row, layer) => h("tr", {}, h("th", { scope: "row" }, layerName(facts, layer)), cells(row))))));
}

export function swatch(id) {
  const square = h("span", { class: "swatch", "aria-hidden": "true" });
  square.style.backgroundColor = expertColour(id);
  return square;
}
