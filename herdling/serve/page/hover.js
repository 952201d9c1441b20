/**
 * Probabilities on hover over a reply as it is read, without a single extra element: the text node
 * under the pointer knows its place in the source (`inline.origins`), and that place its token.
 */

import { origins } from "./inline.js";
import { tokenRanges } from "./reply.js";
import { hidePeek, peekAt } from "./tokens.js";

const PAUSE = 300; // ms that the pointer rests before the card shows

/** Watches `node`, where `message` is rendered; `facts()` gives the model's. */
export function watch(node, message, facts) {
  let ranges = null;
  let timer;
  let shown = null;
  const hide = () => {
    clearTimeout(timer);
    shown = null;
    CSS.highlights?.delete("token");
    hidePeek();
  };
  node.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch" || event.buttons || !message.tokens?.length) return;
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (ranges?.length !== message.tokens.length) ranges = tokenRanges(message.tokens);
      const found = tokenAt(event.clientX, event.clientY, ranges);
      if (!found) hide();
      else if (found.index !== shown) {
        shown = found.index;
        CSS.highlights?.set("token", new Highlight(found.range));
        peekAt(message.tokens[found.index], facts(), found.range.getBoundingClientRect());
      }
    }, PAUSE);
  });
  node.addEventListener("pointerleave", hide);
}

function caret(x, y) {
  if (document.caretPositionFromPoint) {
    const found = document.caretPositionFromPoint(x, y);
    return found && { node: found.offsetNode, offset: found.offset };
  }
  const range = document.caretRangeFromPoint?.(x, y);
  return range && { node: range.startContainer, offset: range.startOffset };
}

function tokenAt(x, y, ranges) {
  const place = caret(x, y);
  const origin = place && origins.get(place.node);
  if (origin === undefined || origin === null) return null;
  // The caret falls on either side of a character; it is the one whose box holds the pointer.
  for (const offset of [place.offset, place.offset - 1]) {
    if (offset < 0 || offset >= place.node.length) continue;
    const range = document.createRange();
    range.setStart(place.node, offset);
    range.setEnd(place.node, offset + 1);
    const box = range.getBoundingClientRect();
    if (x < box.left - 1 || x > box.right + 1 || y < box.top - 2 || y > box.bottom + 2) continue;
    const index = search(ranges, origin + offset);
    if (index < 0) return null;
    const [from, to] = ranges[index];
    range.setStart(place.node, Math.max(0, from - origin));
    range.setEnd(place.node, Math.min(place.node.length, to - origin));
    return { index, range };
  }
  return null;
}

/** The index of the range that holds `at`, or -1. */
function search(ranges, at) {
  let [low, high] = [0, ranges.length - 1];
  while (low <= high) {
    const middle = (low + high) >> 1;
    const [from, to] = ranges[middle];
    if (at < from) high = middle - 1;
    else if (at >= to) low = middle + 1;
    else return middle;
  }
  return -1;
}
