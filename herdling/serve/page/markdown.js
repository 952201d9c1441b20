/**
 * A reply as it grows: `new MarkdownView(element).update(textSoFar)`, as often as you like.
 *
 * Only the last two blocks can still change when text is appended (a line that is not complete may or
 * may not belong to the block before), so only those are built again.
 */

import { blocks, lines } from "./blocks.js";
import { copy, h, icon } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline, textNode } from "./inline.js";

const COLOURED = 60000; // characters of code; beyond that, colours cost more than they help

export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.tail = []; // [{at, node}] of the last two blocks
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) {
      this.root.replaceChildren();
      this.tail = [];
    }
    this.text = text;
    const from = this.tail[0]?.at ?? 0;
    const fresh = blocks(lines(text.slice(from), from)).map((block) => ({ at: block.at, node: render(block) }));
    for (const { node } of this.tail) node.remove();
    this.root.append(...fresh.map(({ node }) => node));
    this.tail = fresh.slice(-2);
  }
}

function render(block) {
  return RENDER[block.type](block);
}

const RENDER = {
  paragraph: (block) => withInline(h("p"), block.lines),
  // Headings of a reply stand below the page's own h1 and the message's h2.
  heading: (block) => withInline(h(`h${Math.min(6, block.level + 2)}`, { class: `level${block.level}` }), block.lines),
  rule: () => h("hr"),
  quote: (block) => h("blockquote", {}, block.children.map(render)),
  code,
  list,
  table,
};

function withInline(node, source) {
  inline(node, source);
  return node;
}

function list({ ordered, first, loose, items }) {
  const rows = items.map(({ checked, children }) => {
    const row = h("li", checked === null ? {} : { class: "task" });
    if (checked !== null) row.append(h("span", { class: "box", role: "img", "aria-label": checked ? "done" : "to do" }, checked ? "☑" : "☐"), " ");
    for (const child of children) {
      if (child.type === "paragraph" && !loose) inline(row, child.lines);
      else row.append(render(child));
    }
    return row;
  });
  return h(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {}, rows);
}

function table({ align, head, rows }) {
  const cell = (tag) => (content, i) =>
    withInline(h(tag, { class: align[i] ?? "left", scope: tag === "th" ? "col" : null }), [content]);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {},
      h("thead", {}, h("tr", {}, head.map(cell("th")))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.slice(0, head.length).map(cell("td")))))));
}

function code({ language, lines: source }) {
  const text = source.map((line) => line.text).join("\n");
  const body = h("code");
  for (const [kind, part] of text.length > COLOURED ? [[null, text]] : highlight(text, language)) {
    body.append(kind ? h("span", { class: `code-${kind}` }, part) : part);
  }
  mark(body, source);
  const done = h("span", {}, "Copy");
  const button = h("button", {
    type: "button",
    class: "quiet small",
    onclick: async () => {
      await copy(text);
      done.textContent = "Copied";
      setTimeout(() => (done.textContent = "Copy"), 1500);
    },
  }, icon("copy"), done);
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), button),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Code, ${language || "text"}` }, body));
}

/** Gives each text node of a code block its origin; a node that spans lines is cut at their ends. */
function mark(body, source) {
  if (!source.length) return;
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let [row, column] = [0, 0];
  for (const node of nodes) {
    const pieces = [];
    for (const piece of node.data.split(/(?<=\n)/)) {
      pieces.push(textNode(piece, source[row].at + column));
      if (piece.endsWith("\n")) [row, column] = [row + 1, 0];
      else column += piece.length;
    }
    node.replaceWith(...pieces);
  }
}
