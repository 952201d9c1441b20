/**
 * Elements without markup strings: everything the page shows is built here from text nodes, so that
 * nothing a model or a file name says can become an element.
 */

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "textContent"]);

/** h("button", {class: "x", onclick: f, "aria-pressed": "true"}, "text", node, [more], null) */
export function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) node[name] = value;
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, props, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props ?? {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const ICONS = {
  alert: "M12 4 2.8 20h18.4L12 4zM12 10v4.5M12 17.2v.3",
  chart: "M4 20V10M10 20V4M16 20v-7M21 20H3",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
  down: "M12 5v14M6 13l6 6 6-6",
  download: "M12 4v11M7 10.5l5 5 5-5M4 20h16",
  edit: "M4 20l1-4.5L16.5 4 20 7.5 8.5 19 4 20zM14 6.5L17.5 10",
  help: "M9 9a3 3 0 1 1 4.3 2.7c-.9.5-1.3 1-1.3 2.3M12 17.2v.3",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9h.01",
  menu: "M4 7h16M4 12h16M4 17h16",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5 7.5 7.5 0 1 0 19 14.5z",
  plus: "M12 5v14M5 12h14",
  retry: "M19 8a8 8 0 1 0 1 5M19 3.5V8h-4.5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h8M18 8h2M15 5.3a2.7 2.7 0 1 0 0 5.4 2.7 2.7 0 0 0 0-5.4M4 16h2M12 16h8M9 13.3a2.7 2.7 0 1 0 0 5.4 2.7 2.7 0 0 0 0-5.4",
  stop: "M7 7h10v10H7z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M18.4 5.6L17 7M7 17l-1.4 1.4",
  tool: "M14.5 6.5a4 4 0 0 1 5-2l-2.7 2.7 2 2 2.7-2.7a4 4 0 0 1-5.4 4.9L8.5 19 5 15.5l7.6-7.6a4 4 0 0 1 1.9-1.4z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5.5M13.5 11v5.5",
  upload: "M12 16V4M7 8.5l5-5 5 5M4 20h16",
};

/** A decorative drawing; the button around it carries the name. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button that shows only an icon. */
export function iconButton(name, label, onclick, props) {
  return h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Runs `draw` at most once a frame however often it is called. */
export function eachFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}

let clearing;
/** Reads `text` out to screen readers, once. */
export function announce(text) {
  clearTimeout(clearing);
  byId("announcer").textContent = text;
  clearing = setTimeout(() => (byId("announcer").textContent = ""), 5000);
}

/** A line at the bottom for a few seconds, with an optional way back. */
export function toast(text, undo) {
  const line = h("div", { class: "toast" }, h("span", {}, text));
  const remove = () => line.remove();
  if (undo) {
    line.append(h("button", { type: "button", onclick: () => { undo(); remove(); } }, "Undo"));
  }
  byId("toasts").replaceChildren(line);
  announce(text);
  setTimeout(remove, undo ? 9000 : 4000);
}

/** Without the clipboard interface (plain http on another host) the old selection trick is used. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "offscreen", value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
