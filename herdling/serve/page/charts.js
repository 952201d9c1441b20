/** Small drawings for the dashboard: a line over time, a divided bar, a row of bars. */

import { h, svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 56;

/** Values from oldest to newest, as many as `room` at the right end. */
export function line(values, room, label) {
  const top = Math.max(1e-9, ...values);
  const x = (i) => (WIDTH * (room - values.length + i)) / (room - 1);
  const y = (value) => HEIGHT - 2 - (HEIGHT - 6) * (value / top);
  const points = values.map((value, i) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "line", role: "img", "aria-label": label });
  if (points.length > 1) {
    drawing.append(
      svg("path", { d: `M${points.join("L")}L${WIDTH} ${HEIGHT}L${x(0).toFixed(1)} ${HEIGHT}Z`, class: "area" }),
      svg("path", { d: `M${points.join("L")}`, class: "stroke" }));
  }
  return drawing;
}

/** parts: [[name, share of 1, class]]. */
export function divided(parts, label) {
  return h("div", { class: "divided", role: "img", "aria-label": label },
    parts.map(([name, share, kind]) => {
      const part = h("span", { class: kind, title: name });
      part.style.width = `${100 * share}%`;
      return part;
    }));
}

/** One bar for each share; `even` is drawn as a line across, what an even spread would be. */
export function bars(shares, label) {
  const even = 1 / shares.length;
  const top = Math.max(2.2 * even, ...shares);
  const wide = 100 / shares.length;
  const drawing = svg("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", class: "bars", role: "img", "aria-label": label });
  for (const [i, share] of shares.entries()) {
    const tall = share > 0 ? Math.max(0.6, (24 * share) / top) : 0;
    const bar = svg("rect", { x: i * wide + wide * 0.12, width: wide * 0.76, y: 24 - tall, height: tall, class: share > 2 * even ? "hot" : "" });
    const name = svg("title", {});
    name.textContent = `Expert ${i}: ${(100 * share).toFixed(1)} %`;
    bar.append(name);
    drawing.append(bar);
  }
  const y = 24 - (24 * even) / top;
  drawing.append(svg("path", { d: `M0 ${y}H100`, class: "even" }));
  return drawing;
}
