/**
 * How the model will see a picture: the grid of tiles it is cut into, drawn over it.
 *
 * The rule is `herdling.inputs.images.best_canvas`: of the grids that hold the picture unshrunk the
 * one that enlarges it least, otherwise the one that shrinks it least, then the fewest tiles.
 */

import { h, svg } from "./dom.js";
import { plain } from "./facts.js";

/** {rows, columns, tiles, tokens} for a picture of width x height pixels. */
export function tiling(width, height, { size, maxTiles, tokensPerTile, enlarge }) {
  const grids = [];
  for (let rows = 1; rows <= maxTiles; rows++) {
    for (let columns = 1; columns <= Math.floor(maxTiles / rows); columns++) {
      grids.push({ rows, columns, scale: Math.min((columns * size) / width, (rows * size) / height) });
    }
  }
  const large = grids.filter((grid) => grid.scale >= 1).map((grid) => grid.scale);
  const scale = large.length
    ? (enlarge ? Math.max : Math.min)(...large)
    : Math.max(...grids.map((grid) => grid.scale));
  const [{ rows, columns }] = grids
    .filter((grid) => grid.scale === scale)
    .sort((a, b) => a.rows * a.columns - b.rows * b.columns);
  const tiles = rows * columns > 1 ? rows * columns + 1 : 1;
  return { rows, columns, tiles, tokens: tokensPerTile ? tiles * tokensPerTile : null };
}

/** Width and height that the picture gets within its canvas, aspect kept. */
export function fitted(width, height, { rows, columns }, { size, enlarge }) {
  const across = Math.min(columns * size, enlarge ? Infinity : Math.max(width, size)) / width;
  const down = Math.min(rows * size, enlarge ? Infinity : Math.max(height, size)) / height;
  const scale = Math.min(across, down);
  return [width * scale, height * scale];
}

/** "3 × 2 + 1 tiles": those of the grid, and one of the whole picture. */
export function describe({ rows, columns, tiles, tokens }) {
  const grid = tiles === 1 ? "1 tile" : `${columns} × ${rows} + 1 tiles`;
  return tokens ? `${grid}, ${plain(tokens)} tokens` : grid;
}

/** The picture on its canvas of tiles; what the picture does not fill is black for the model. */
export function tiledPicture(image, vision) {
  const picture = h("img", { src: image.url, alt: image.name, width: image.width, height: image.height });
  if (!vision) return h("div", { class: "tiled" }, picture);
  const grid = tiling(image.width, image.height, vision);
  const [width, height] = fitted(image.width, image.height, grid, vision);
  const [across, down] = [grid.columns * vision.size, grid.rows * vision.size];
  const frame = h("div", { class: "tiled" }, picture, lines(grid));
  frame.style.aspectRatio = `${across} / ${down}`;
  picture.style.width = `${(100 * width) / across}%`;
  picture.style.height = `${(100 * height) / down}%`;
  return frame;
}

function lines({ rows, columns }) {
  let path = "";
  for (let i = 1; i < columns; i++) path += `M${i} 0V${rows}`;
  for (let i = 1; i < rows; i++) path += `M0 ${i}H${columns}`;
  return svg("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { d: path, class: "under" }), svg("path", { d: path, class: "over" }));
}
