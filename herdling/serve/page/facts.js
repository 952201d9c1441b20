/**
 * What `GET /herdling/status` says, in the page's own terms: the one place that knows its field names.
 * Numbers that the server does not give are null, and the page then leaves their place out.
 */

const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

/** Facts of the model: what a picture is cut into, which layers have experts. */
export function modelFacts(status) {
  const model = status?.model ?? {};
  return {
    name: status?.name ?? "",
    parameters: number(model.parameters),
    context: number(model.context),
    layers: number(model.layers),
    moeLayers: model.moe_layers ?? [],
    experts: number(model.experts),
    perToken: number(model.experts_per_token),
    dtype: model.dtype ?? "",
    device: model.device ?? "",
    image: model.vision
      ? { size: model.tile, maxTiles: model.max_tiles, tokensPerTile: number(model.tokens_per_tile), enlarge: Boolean(model.resize_to_max_canvas) }
      : null,
  };
}

/** The engine at this moment, and its counts since it began. */
export function loadFacts(status) {
  const engine = status?.engine ?? {};
  const [queue, memory, rates] = [status?.queue ?? {}, status?.memory ?? {}, status?.rates ?? {}];
  return {
    uptime: number(status?.uptime_seconds),
    version: status?.version ?? "",
    memory: number(memory.resident_bytes),
    cacheBytes: number(memory.cache_bytes),
    cacheUsed: number(memory.cache_used_bytes),
    running: number(engine.running),
    waiting: number(engine.waiting) ?? number(queue.waiting),
    queueLimit: number(queue.limit),
    newRate: number(rates.new_tokens_per_second),
    promptRate: number(rates.prompt_tokens_per_second),
    pages: number(engine.pages),
    pagesUsed: number(engine.pages_used),
    pagesCached: number(engine.pages_cached),
    promptTokens: number(engine.prompt_tokens),
    cachedTokens: number(engine.cached_tokens),
    newTokens: number(engine.new_tokens),
    steps: number(engine.steps),
    preemptions: number(engine.preemptions),
    finished: number(engine.finished),
    drafted: number(engine.drafted),
    accepted: number(engine.accepted),
    expertLoad: engine.expert_load ?? [],
  };
}

export const plain = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; value >= 1000 && i < units.length - 1; i++) value /= 1000;
  return `${value.toFixed(i && value < 100 ? 1 : 0)} ${units[i]}`;
}

export function count(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} B`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return plain(value);
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}
