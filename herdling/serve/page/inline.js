/**
 * The insides of a paragraph: code, emphasis, links, line breaks. Text only becomes text nodes, and
 * each remembers where in the model's reply it came from (`origins`), which is how hovering finds the
 * token under the pointer.
 *
 * A link works only if it is http or https; a picture is never fetched, its description is shown.
 */

import { h } from "./dom.js";

/** Text node -> offset of its first character in the source. */
export const origins = new WeakMap();

const DEEPEST = 12;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
const PLAIN = /[^\\`*_~[!<&h\n]+|h(?!ttps?:\/\/)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`\]]+/y;
const WORD = /[\p{L}\p{N}]/u;

export function textNode(text, origin) {
  const node = document.createTextNode(text);
  origins.set(node, origin);
  return node;
}

/** Lines [{text, at}] into `parent`; `at` is the offset of the line in the source. */
export function inline(parent, lines) {
  const starts = [];
  let text = "";
  for (const line of lines) {
    starts.push([text.length, line.at]);
    text += line.text + "\n";
  }
  new Inline(text.slice(0, -1), starts).read(parent, 0, Math.max(0, text.length - 1), 0);
}

export function safeAddress(text) {
  try {
    const address = new URL(text);
    return ["http:", "https:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function link(address, title) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title });
}

class Inline {
  constructor(text, starts) {
    this.text = text;
    this.starts = starts;
    this.hopeless = new Map(); // delimiter -> no closer exists from this index on: keeps it linear
  }

  origin(index) {
    let [from, at] = this.starts[0];
    for (const [start, source] of this.starts) {
      if (start > index) break;
      [from, at] = [start, source];
    }
    return at + index - from;
  }

  put(parent, from, to) {
    if (to > from) parent.append(textNode(this.text.slice(from, to), this.origin(from)));
  }

  read(parent, from, to, depth) {
    let i = from;
    while (i < to) {
      PLAIN.lastIndex = i;
      const plain = PLAIN.exec(this.text);
      if (plain) {
        const end = Math.min(to, PLAIN.lastIndex);
        this.put(parent, i, end);
        i = end;
        continue;
      }
      const next = depth < DEEPEST ? this.special(parent, i, to, depth) : 0;
      if (next) i = next;
      else this.put(parent, i, ++i);
    }
  }

  /** The index after what begins at `i`, or 0 if it is only a character. */
  special(parent, i, to, depth) {
    switch (this.text[i]) {
      case "\n": return this.lineEnd(parent, i);
      case "\\": return this.escape(parent, i, to);
      case "`": return this.code(parent, i, to);
      case "*": case "_": case "~": return this.emphasis(parent, i, to, depth);
      case "[": return this.bracket(parent, i, i, to, depth);
      case "!": return this.text[i + 1] === "[" ? this.bracket(parent, i, i + 1, to, depth) : 0;
      case "<": case "h": return this.address(parent, i, to);
      case "&": return this.entity(parent, i);
      default: return 0;
    }
  }

  lineEnd(parent, i) {
    const hard = this.text[i - 1] === "\\" || this.text.slice(i - 2, i) === "  ";
    if (hard) parent.append(h("br"));
    else this.put(parent, i, i + 1);
    return i + 1;
  }

  escape(parent, i, to) {
    if (this.text[i + 1] === "\n") return i + 1;
    if (i + 1 >= to || !/[!-/:-@[-`{-~]/.test(this.text[i + 1])) return 0;
    this.put(parent, i + 1, i + 2);
    return i + 2;
  }

  entity(parent, i) {
    const found = /^&(?:amp|lt|gt|quot|#39|nbsp);/.exec(this.text.slice(i, i + 6));
    if (!found) return 0;
    parent.append(textNode(ENTITIES[found[0]], this.origin(i)));
    return i + found[0].length;
  }

  code(parent, i, to) {
    const ticks = /^`+/.exec(this.text.slice(i, to))[0];
    const end = this.closer(ticks, i + ticks.length, to, (at) => this.text[at - 1] !== "`" && this.text[at + ticks.length] !== "`");
    if (end < 0) {
      this.put(parent, i, i + ticks.length);
      return i + ticks.length;
    }
    let [from, until] = [i + ticks.length, end];
    if (this.text[from] === " " && this.text[until - 1] === " " && until - from > 2) [from, until] = [from + 1, until - 1];
    const code = h("code");
    this.put(code, from, until);
    parent.append(code);
    return end + ticks.length;
  }

  emphasis(parent, i, to, depth) {
    const mark = this.text[i];
    const run = /^(\*+|_+|~+)/.exec(this.text.slice(i, Math.min(to, i + 8)))[0].length;
    const size = mark === "~" ? (run === 2 ? 2 : 0) : Math.min(run, 2);
    const after = this.text[i + size];
    if (!size || i + size >= to || /\s/.test(after)) return 0;
    if (mark === "_" && i > 0 && WORD.test(this.text[i - 1])) return 0;
    const end = this.closer(mark.repeat(size), i + size, to, (at) => this.closes(mark, size, at, to));
    if (end < 0) return 0;
    const node = h(mark === "~" ? "del" : size === 2 ? "strong" : "em");
    this.read(node, i + size, end, depth + 1);
    parent.append(node);
    return end + size;
  }

  closes(mark, size, at, to) {
    if (/\s/.test(this.text[at - 1])) return false;
    const follows = at + size < to && this.text[at + size] === mark;
    if (follows || (size === 1 && this.text[at - 1] === mark)) return false;
    return !(mark === "_" && at + size < to && WORD.test(this.text[at + size] ?? " "));
  }

  closer(delimiter, from, to, fits) {
    const dead = this.hopeless.get(delimiter);
    if (dead && from >= dead.from && to <= dead.to) return -1;
    for (let at = this.text.indexOf(delimiter, from); at >= 0 && at < to; at = this.text.indexOf(delimiter, at + 1)) {
      if (at > from && at + delimiter.length <= to && this.text[at - 1] !== "\\" && fits(at)) return at;
    }
    this.hopeless.set(delimiter, { from, to });
    return -1;
  }

  /** [text](address "title"), and ![description](address), which is never fetched. */
  bracket(parent, start, open, to, depth) {
    const close = this.matching(open, to);
    if (close < 0 || this.text[close + 1] !== "(") return 0;
    const target = /^\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"([^"\n]*)")?\s*\)/.exec(
      this.text.slice(close + 1, Math.min(to, close + 2100)),
    );
    if (!target) return 0;
    const address = safeAddress(target[1]);
    const picture = start !== open;
    const node = picture || !address
      ? h("span", { class: picture ? "picture" : "inert", title: target[1] })
      : link(address, target[2] ?? address);
    if (picture) node.append("Picture: ");
    this.read(node, open + 1, close, depth + 1);
    parent.append(node);
    return close + 1 + target[0].length;
  }

  matching(open, to) {
    let depth = 0;
    for (let i = open; i < Math.min(to, open + 2000); i++) {
      if (this.text[i] === "\\") i++;
      else if (this.text[i] === "[") depth++;
      else if (this.text[i] === "]" && --depth === 0) return i;
    }
    return -1;
  }

  address(parent, i, to) {
    const from = this.text[i] === "<" ? i + 1 : i;
    ADDRESS.lastIndex = from;
    let found = ADDRESS.exec(this.text)?.[0].slice(0, to - from);
    if (!found) return 0;
    if (from === i) {
      found = found.replace(/[.,;:!?*_~]+$/, "");
      if (found.endsWith(")") && !found.includes("(")) found = found.slice(0, -1);
    } else if (this.text[from + found.length] !== ">") return 0;
    const address = safeAddress(found);
    if (!address) return 0;
    const node = link(address);
    this.put(node, from, from + found.length);
    parent.append(node);
    return from + found.length + (from - i);
  }
}
