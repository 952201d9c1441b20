/**
 * Light colours for code: comments, strings, numbers, keywords, names that are called.
 *
 * One scanner for all languages, with each one's comments and keywords; it is a help for the eye, not
 * a parser. Every expression is linear in the text, so that no reply can hang the page.
 */

const WORDS = {
  python: "and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False self",
  js: "as async await break case catch class const continue debugger default delete do else enum export extends false finally for from function if implements import in instanceof interface let new null of private public return static super switch this throw true try type typeof undefined var void while with yield",
  c: "auto bool break case catch char class const constexpr continue default delete do double else enum extern false float for goto if include define inline int long namespace new nullptr null operator private protected public return short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void volatile while import package final boolean byte extends implements interface string var",
  rust: "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while func go defer chan map range select package import interface var nil",
  sh: "if then else elif fi for while until do done case esac in function return export local set unset cd echo exit source sudo pip make git",
  sql: "select from where and or not insert into values update set delete create table drop alter index view join left right inner outer full on group by order having limit offset as distinct union all null is in exists between like case when then else end primary key foreign references",
  data: "true false null yes no on off none",
};
const C_LIKE = { comments: "//|/*", strings: "\"'" };
const FAMILIES = {
  python: { words: WORDS.python, comments: "#", strings: "\"'" },
  js: { words: WORDS.js, comments: "//|/*", strings: "\"'`" },
  c: { words: WORDS.c, ...C_LIKE },
  rust: { words: WORDS.rust, comments: "//|/*", strings: '"' },
  sh: { words: WORDS.sh, comments: "#", strings: "\"'" },
  sql: { words: WORDS.sql, comments: "--|/*", strings: "'\"", fold: true },
  data: { words: WORDS.data, comments: "#", strings: "\"'" },
  css: { words: "", comments: "/*", strings: "\"'" },
  markup: { words: "", comments: "<!--", strings: "\"'" },
};
const NAMES = {
  py: "python", python: "python", python3: "python", pycon: "python",
  js: "js", javascript: "js", jsx: "js", mjs: "js", ts: "js", tsx: "js", typescript: "js",
  c: "c", h: "c", cpp: "c", "c++": "c", cc: "c", cuda: "c", java: "c", cs: "c", kotlin: "c", swift: "c",
  rs: "rust", rust: "rust", go: "rust",
  sh: "sh", bash: "sh", shell: "sh", zsh: "sh", console: "sh", dockerfile: "sh", make: "sh",
  sql: "sql", json: "data", jsonc: "data", yaml: "data", yml: "data", toml: "data", ini: "data",
  css: "css", html: "markup", xml: "markup", svg: "markup",
};
const COMMENTS = { "#": "#[^\\n]*", "//": "//[^\\n]*", "--": "--[^\\n]*", "/*": "/\\*[^]*?(?:\\*/|$)", "<!--": "<!--[^]*?(?:-->|$)" };

function compile({ words, comments, strings, fold }) {
  const rules = [`(?<comment>${comments.split("|").map((mark) => COMMENTS[mark]).join("|")})`];
  const quotes = [...strings].map((q) => `${q}(?:[^${q}\\\\${q === "`" ? "" : "\\n"}]|\\\\[^])*${q}?`);
  if (strings.includes("'")) quotes.unshift('"""[^]*?(?:"""|$)', "'''[^]*?(?:'''|$)");
  rules.push(`(?<string>${quotes.join("|")})`);
  rules.push("(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)");
  rules.push("(?<name>[A-Za-z_$][\\w$]*)");
  const known = new Set(words.split(" "));
  return { scanner: new RegExp(rules.join("|"), "g"), known, fold };
}

const compiled = new Map();

function family(language) {
  const name = NAMES[language.toLowerCase()];
  if (!name) return null;
  if (!compiled.has(name)) compiled.set(name, compile(FAMILIES[name]));
  return compiled.get(name);
}

/** Code -> [[class or null, text]], whose texts joined are the code. */
export function highlight(code, language) {
  const rules = family(language);
  if (!rules) return [[null, code]];
  const parts = [];
  let done = 0;
  for (const match of code.matchAll(rules.scanner)) {
    const kind = kindOf(match, rules, code);
    if (!kind) continue;
    if (match.index > done) parts.push([null, code.slice(done, match.index)]);
    parts.push([kind, match[0]]);
    done = match.index + match[0].length;
  }
  if (done < code.length) parts.push([null, code.slice(done)]);
  return parts;
}

function kindOf({ 0: text, index, groups }, { known, fold }, code) {
  if (groups.name === undefined) return groups.comment ? "comment" : groups.string ? "string" : "number";
  if (known.has(fold ? text.toLowerCase() : text)) return "keyword";
  return code[index + text.length] === "(" ? "call" : null;
}
