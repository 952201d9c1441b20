/**
 * From a conversation to a request, and from streamed chunks back to a message.
 *
 * A message's tokens are {text, bytes?, logprob, top: [[text, logprob]], experts: [[id] per layer]}.
 */

/** The body of `POST /v1/chat/completions`. Throws Error if the tools are not JSON. */
export function requestBody({ settings, messages }) {
  const body = {
    model: settings.model,
    messages: [
      ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
      ...messages.filter(spoken).map(wireMessage),
    ],
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_tokens: settings.max_tokens,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (settings.top_k > 0) body.top_k = settings.top_k;
  if (settings.seed !== "") body.seed = settings.seed;
  if (settings.tools.trim()) body.tools = readTools(settings.tools);
  if (settings.probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (settings.experts) body.herdling = { experts: true };
  return body;
}

const spoken = ({ role, text, calls, state }) => role !== "assistant" || Boolean(text || calls?.length) || state === "done";

function wireMessage({ role, text, images, calls, call }) {
  if (role === "tool") return { role, content: text, tool_call_id: call };
  if (role === "assistant") {
    const message = { role, content: text };
    if (calls?.length) message.tool_calls = calls.map(({ id, name, arguments: args }) => ({ id, type: "function", function: { name, arguments: args } }));
    return message;
  }
  if (!images?.length) return { role, content: text };
  const pictures = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role, content: text ? [...pictures, { type: "text", text }] : pictures };
}

/** Tools in OpenAI's form; bare functions are wrapped. */
export function readTools(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools in the settings are not JSON: ${error.message}`);
  }
  const list = Array.isArray(found) ? found : [found];
  return list.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
}

/** Takes chunks into a message. */
export class Reply {
  constructor(message, now = performance.now()) {
    this.message = message;
    this.asked = now;
    this.first = null;
    this.pieces = 0;
  }

  take(chunk, now = performance.now()) {
    const { message } = this;
    const choice = chunk.choices?.[0];
    const fresh = (choice?.logprobs?.content ?? []).map(token);
    const before = chunk.herdling?.previous_experts;
    if (before && message.tokens?.length) message.tokens.at(-1).experts = before;
    if (choice?.delta) this.#delta(choice.delta);
    if (fresh.length) (message.tokens ??= []).push(...fresh);
    if (chunk.herdling?.reply) this.#experts(chunk.herdling.reply);
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (fresh.length || choice?.delta?.content || choice?.delta?.tool_calls) {
      this.first ??= now;
      this.last = now;
      this.pieces += Math.max(1, fresh.length);
    }
    this.#count(chunk.usage);
  }

  #delta({ content, tool_calls: calls }) {
    if (content) this.message.text += content;
    for (const { index, id, function: named } of calls ?? []) {
      const call = ((this.message.calls ??= [])[index] ??= { id: "", name: "", arguments: "" });
      if (id) call.id = id;
      if (named?.name) call.name = named.name;
      if (named?.arguments) call.arguments += named.arguments;
    }
  }

  /** Told of every token at the end, of each before the next as they come; without log-probs these are the tokens. */
  #experts(rows) {
    const tokens = (this.message.tokens ??= rows.map(({ text }) => ({ text, top: [] })));
    tokens.forEach((item, i) => {
      if (rows[i]?.experts) item.experts = rows[i].experts;
    });
  }

  #count(usage) {
    const { message } = this;
    const seconds = (this.last - this.first) / 1000;
    const tokens = usage?.completion_tokens ?? this.pieces;
    message.stats = {
      ...message.stats,
      tokens,
      ...(this.first !== null && { wait: (this.first - this.asked) / 1000 }),
      ...(seconds > 0 && tokens > 1 && { rate: (tokens - 1) / seconds }),
      ...(usage && { prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details?.cached_tokens ?? 0 }),
    };
  }
}

const round = (value) => Math.round(value * 1e4) / 1e4;

function token({ token: text, bytes, logprob, top_logprobs: top }) {
  const found = { text, logprob: round(logprob), top: (top ?? []).map((other) => [other.token, round(other.logprob)]) };
  // Bytes are only worth keeping where the token is not text by itself.
  if (bytes && text.includes("\ufffd")) found.bytes = bytes;
  return found;
}

/** For each token the range of characters of the reply that it completes: [[from, to]]. */
export function tokenRanges(tokens) {
  const [encoder, decoder] = [new TextEncoder(), new TextDecoder()];
  let at = 0;
  return tokens.map(({ text, bytes }) => {
    const from = at;
    const raw = bytes ? Uint8Array.from(bytes) : encoder.encode(text);
    at += decoder.decode(raw, { stream: true }).length;
    return [from, at];
  });
}
