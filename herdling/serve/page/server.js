/**
 * The server's HTTP interface, and what can go wrong with it in words that a user can act on.
 *
 * Every failure is a ServerError with a `kind`: gone, loading, key, busy, refused, broken.
 */

const ROOT = new URL("./", document.baseURI);
const KEY = "herdling.key";

export class ServerError extends Error {
  constructor(kind, message, retryAfter = 0) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY),
  set(value, remember) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
  },
};

async function send(path, body, signal) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(new URL(path, ROOT), options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("gone", `The server at ${ROOT.host} does not answer.`);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const said = await answer.json().then((body) => body.error?.message ?? body.detail, () => null);
  const wait = Number(answer.headers.get("Retry-After")) || 0;
  const text = typeof said === "string" && said ? said : `The server answered ${answer.status} ${answer.statusText}.`;
  if (answer.status === 401) return new ServerError("key", text);
  if (answer.status === 503) return new ServerError("loading", text, wait);
  if (answer.status === 429) return new ServerError("busy", wait ? `${text} Try again in ${wait} s.` : text, wait);
  return new ServerError(answer.status >= 500 ? "broken" : "refused", text);
}

const patience = () => AbortSignal.timeout(8000);

async function read(path) {
  try {
    return await (await send(path, null, patience())).json();
  } catch (error) {
    if (error instanceof ServerError) throw error;
    throw new ServerError("gone", `The server at ${ROOT.host} does not answer.`);
  }
}

export const models = async () => (await read("v1/models")).data;
export const status = () => read("herdling/status");

/** The chunks of one streamed chat completion. Aborting `signal` ends it on both sides. */
export async function* chat(body, signal) {
  const answer = await send("v1/chat/completions", body, signal);
  // Decoded here: a stream between would drop what it holds when the connection breaks.
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await piece(reader, signal);
      text += decoder.decode(value, { stream: !done });
      const events = text.split(/\r?\n\r?\n/);
      text = done ? "" : events.pop();
      for (const event of events) {
        const data = payload(event);
        if (data === "[DONE]") return;
        if (data) yield chunk(data);
      }
      if (done) throw new ServerError("broken", "The reply broke off: the connection ended before it was complete.");
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed
  }
}

async function piece(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("gone", "The reply broke off: the connection to the server was lost.");
  }
}

function payload(event) {
  const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return data.map((line) => line.slice(5).trimStart()).join("\n");
}

function chunk(data) {
  let found;
  try {
    found = JSON.parse(data);
  } catch {
    throw new ServerError("broken", "The reply broke off: the server sent a line that is not JSON.");
  }
  if (found.error) throw new ServerError("broken", found.error.message ?? "The server stopped the reply.");
  return found;
}
