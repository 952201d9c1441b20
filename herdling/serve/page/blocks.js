/**
 * Markdown's blocks as a tree: headings, paragraphs, lists, tables, quotes, code, rules.
 *
 * Lines are {text, at}, `at` being the offset in the source, and keep it however deep they are
 * nested. Left out: indented code, setext headings, link definitions, raw HTML (shown as text).
 */

const FENCE = /^(\s{0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 10;

export function lines(text, at = 0) {
  const found = [];
  for (const line of text.split("\n")) {
    found.push({ text: line.replace(/\r$/, ""), at });
    at += line.length + 1;
  }
  return found;
}

const blank = (line) => !line.text.trim();
const cut = (line, count) => ({ text: line.text.slice(count), at: line.at + count });
const indent = (text) => text.length - text.trimStart().length;

/** Lines -> [{type, at, ...}], in order. */
export function blocks(source, depth = 0) {
  const found = [];
  let i = 0;
  while (i < source.length) {
    if (blank(source[i])) {
      i++;
      continue;
    }
    const read = depth < DEEPEST ? start(source, i) : paragraph;
    const [block, next] = read(source, i, depth);
    found.push({ at: source[i].at, ...block });
    i = next;
  }
  return found;
}

function start(source, i) {
  const { text } = source[i];
  if (FENCE.test(text)) return fence;
  if (HEADING.test(text)) return heading;
  if (RULE.test(text)) return (_, at) => [{ type: "rule" }, at + 1];
  if (QUOTE.test(text)) return quote;
  if (ITEM.test(text)) return list;
  if (isTable(source, i)) return table;
  return paragraph;
}

const isTable = (source, i) =>
  source[i].text.includes("|") && i + 1 < source.length && source[i + 1].text.includes("-") &&
  DIVIDER.test(source[i + 1].text) && cells(source[i]).length === cells(source[i + 1]).length;

function paragraph(source, i, depth) {
  let end = i + 1;
  while (end < source.length && !blank(source[end]) && (depth >= DEEPEST || !interrupts(source, end))) end++;
  const body = source.slice(i, end).map((line) => cut(line, indent(line.text)));
  return [{ type: "paragraph", lines: body }, end];
}

function interrupts(source, i) {
  const { text } = source[i];
  const item = ITEM.exec(text);
  if (item) return item[3] !== "" && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || isTable(source, i);
}

function fence(source, i) {
  const [, margin, marks, info] = FENCE.exec(source[i].text);
  const isEnd = (text) => text.trim().length >= marks.length && text.trim() === marks[0].repeat(text.trim().length);
  let end = i + 1;
  while (end < source.length && !isEnd(source[end].text)) end++;
  const body = source.slice(i + 1, end).map((line) => cut(line, Math.min(indent(line.text), margin.length)));
  const closed = end < source.length;
  return [{ type: "code", language: info.trim().split(/\s+/)[0], lines: body, closed }, closed ? end + 1 : end];
}

function heading(source, i) {
  const [opening, marks] = HEADING.exec(source[i].text);
  const line = cut(source[i], opening.length);
  return [{ type: "heading", level: marks.length, lines: [{ ...line, text: line.text.replace(/\s+#+\s*$/, "") }] }, i + 1];
}

function quote(source, i, depth) {
  const body = [];
  let end = i;
  for (; end < source.length && !blank(source[end]); end++) {
    const mark = QUOTE.exec(source[end].text);
    if (!mark && interrupts(source, end)) break;
    body.push(cut(source[end], mark ? mark[0].length : 0));
  }
  return [{ type: "quote", children: blocks(body, depth + 1) }, end];
}

function list(source, i, depth) {
  const first = ITEM.exec(source[i].text);
  const [base, ordered] = [first[1].length, /\d/.test(first[2])];
  const items = [];
  let end = i;
  let loose = false;
  let gap = false; // before the item that is read
  while (end < source.length) {
    const mark = ITEM.exec(source[end].text);
    if (!mark || mark[1].length > base + 3 || mark[1].length < base || ordered !== /\d/.test(mark[2])) break;
    if (RULE.test(source[end].text)) break;
    loose ||= gap;
    const read = item(source, end, mark);
    items.push(checkbox(read.body, depth));
    [end, gap] = [read.end, read.gap];
  }
  return [{ type: "list", ordered, first: parseInt(first[2], 10) || 1, loose, items }, end];
}

/** The lines of one item, the line after it, and whether a blank one came before that. */
function item(source, i, mark) {
  const width = mark[3] === "" || mark[3].length > 4 ? mark[1].length + mark[2].length + 1 : mark[0].length;
  const body = [cut(source[i], Math.min(width, source[i].text.length))];
  let end = i + 1;
  let gap = false;
  for (; end < source.length; end++) {
    const line = source[end];
    if (blank(line)) {
      gap = true;
      body.push(cut(line, line.text.length));
    } else if (indent(line.text) >= Math.min(width, mark[1].length + 2)) {
      gap = false;
      body.push(cut(line, Math.min(width, indent(line.text))));
    } else if (gap || ITEM.test(line.text) || interrupts(source, end)) break;
    else body.push(line);
  }
  return { body, end, gap };
}

function checkbox(body, depth) {
  const box = /^\[([ xX])\]\s+/.exec(body[0].text);
  if (box) body[0] = cut(body[0], box[0].length);
  return { checked: box ? box[1] !== " " : null, children: blocks(body, depth + 1) };
}

function table(source, i) {
  const align = cells(source[i + 1]).map(({ text }) =>
    text.endsWith(":") ? (text.startsWith(":") ? "center" : "right") : "left");
  const rows = [];
  let end = i + 2;
  for (; end < source.length && !blank(source[end]) && source[end].text.includes("|"); end++) rows.push(cells(source[end]));
  return [{ type: "table", align, head: cells(source[i]), rows }, end];
}

/** The cells of a row, trimmed; a bar escaped or within code does not divide. */
export function cells(line) {
  const found = [];
  let from = indent(line.text);
  if (line.text[from] === "|") from++;
  let code = false;
  for (let i = from; i <= line.text.length; i++) {
    if (line.text[i] === "`") code = !code;
    if (line.text[i] === "\\") i++;
    else if (i >= line.text.length || (line.text[i] === "|" && !code)) {
      found.push([from, Math.min(i, line.text.length)]);
      from = i + 1;
    }
  }
  const trimmed = found.map(([start, end]) => {
    const raw = line.text.slice(start, end);
    return { text: raw.trim(), at: line.at + start + indent(raw) };
  });
  if (trimmed.length > 1 && !trimmed.at(-1).text) trimmed.pop();
  return trimmed;
}
