/**
 * Conversations from a file are somebody else's text: only known fields of the right kind are taken,
 * and pictures only as data, so that an imported conversation can neither break the page nor make it
 * ask another host for anything.
 */

const PICTURE = /^data:image\/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+$/;
const ROLES = ["user", "assistant", "tool"];
const STATES = ["done", "stopped", "cut", "failed"];
const MOST = 10000;

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const text = (value, otherwise = "") => (typeof value === "string" ? value : otherwise);
const number = (value, otherwise = 0) => (Number.isFinite(value) ? value : otherwise);
const array = (value) => (Array.isArray(value) ? value.slice(0, MOST) : []);
const id = (value) => (/^[\w-]{1,40}$/.test(text(value)) ? value : `in${Math.random().toString(36).slice(2, 12)}`);

export function checkConversation(found) {
  if (!isObject(found) || !Array.isArray(found.messages)) throw new Error("a conversation in the file has no messages");
  return {
    id: id(found.id),
    title: text(found.title).slice(0, 200),
    updated: number(found.updated, Date.now()),
    settings: settings(found.settings),
    messages: array(found.messages).map(message),
  };
}

function settings(found) {
  const kept = {};
  for (const name of ["model", "system", "tools"]) if (typeof found?.[name] === "string") kept[name] = found[name];
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) if (Number.isFinite(found?.[name])) kept[name] = found[name];
  for (const name of ["probabilities", "experts"]) if (typeof found?.[name] === "boolean") kept[name] = found[name];
  if (Number.isInteger(found?.seed)) kept.seed = found.seed;
  return kept;
}

function message(found) {
  if (!isObject(found) || !ROLES.includes(found.role)) throw new Error("a message in the file has no known role");
  return {
    id: id(found.id),
    role: found.role,
    text: text(found.text),
    state: STATES.includes(found.state) ? found.state : "done",
    error: text(found.error) || undefined,
    call: text(found.call) || undefined,
    images: found.images ? array(found.images).filter((image) => PICTURE.test(image?.url)).map(picture) : undefined,
    calls: found.calls ? array(found.calls).filter(isObject).map(call) : undefined,
    tokens: found.tokens ? array(found.tokens).filter(isObject).map(token) : undefined,
    stats: isObject(found.stats) ? numbers(found.stats) : undefined,
  };
}

const picture = ({ url, name, width, height }) => ({ url, name: text(name), width: number(width), height: number(height) });
const call = (found) => ({ id: text(found.id), name: text(found.name), arguments: text(found.arguments) });
const numbers = (found) => Object.fromEntries(Object.entries(found).filter(([, value]) => Number.isFinite(value)));

function token(found) {
  return {
    text: text(found.text),
    bytes: found.bytes ? array(found.bytes).map((byte) => number(byte) & 255) : undefined,
    logprob: Number.isFinite(found.logprob) ? found.logprob : undefined,
    top: array(found.top).filter(Array.isArray).map(([word, value]) => [text(word), number(value)]),
    experts: found.experts ? array(found.experts).map((layer) => array(layer).map((expert) => number(expert))) : undefined,
  };
}
