// The slide and a map over it, as layers of Leaflet: both are cut into squares of a pyramid whose zoom 0 is level 0.

import { colouring } from "./colours.js";

const MOST_CHUNKS = 160;

/** The slide's pixels. A square at its edge is smaller than the others, so that it is not stretched. */
export const SlideLayer = L.GridLayer.extend({
  initialize(slide, address, options) {
    L.GridLayer.prototype.initialize.call(this, { className: "slide-layer", ...options });
    this.slide = slide;
    this.address = address;
  },
  createTile(coords, done) {
    const box = L.DomUtil.create("div", "square");
    const level = this.slide.levels - 1 + coords.z;
    const shrink = 2 ** -coords.z;
    const [width, height] = [Math.ceil(this.slide.width / shrink), Math.ceil(this.slide.height / shrink)];
    const side = this.options.tileSize;
    const columns = Math.ceil(width / side);
    const rows = Math.ceil(height / side);
    if (level < 0 || coords.x < 0 || coords.y < 0 || coords.x >= columns || coords.y >= rows) {
      setTimeout(() => done(null, box), 0);
      return box;
    }
    const image = L.DomUtil.create("img", "", box);
    image.alt = "";
    image.style.width = `${(100 * Math.min(side, width - coords.x * side)) / side}%`;
    image.style.height = `${(100 * Math.min(side, height - coords.y * side)) / side}%`;
    image.onload = () => done(null, box);
    image.onerror = () => done(new Error("not loaded"), box);
    image.src = this.address(`squares/${level}/${coords.x}_${coords.y}.jpg`);
    return box;
  },
});

/** The chunks of a map's values that were asked for last. */
class Chunks {
  constructor(address, side) {
    this.address = address;
    this.side = side;
    this.kept = new Map();
  }

  get(level, column, row) {
    const name = `${level}/${column}_${row}.f32`;
    let chunk = this.kept.get(name);
    if (chunk === undefined) {
      chunk = { values: null, drawn: null, drawnFor: null };
      chunk.ready = fetch(this.address(name))
        .then((answer) => (answer.ok ? answer.arrayBuffer() : Promise.reject(new Error("no values"))))
        .then((data) => {
          chunk.values = new Float32Array(data);
          return chunk;
        });
      chunk.ready.catch(() => this.kept.delete(name));
    } else {
      this.kept.delete(name);
    }
    this.kept.set(name, chunk);
    if (this.kept.size > MOST_CHUNKS) this.kept.delete(this.kept.keys().next().value);
    return chunk;
  }
}

/** A map, a value per token, in colours that change without asking the server again. */
export const MapLayer = L.GridLayer.extend({
  initialize(map, address, chunkSide, options) {
    L.GridLayer.prototype.initialize.call(this, { className: "map-layer", ...options });
    this.values = map; // { step, levels, limits, kind }
    this.chunks = new Chunks(address, chunkSide);
    this.version = 0;
    this.squares = new Map();
    this.on("tileunload", (event) => this.squares.delete(event.tile));
  },
  /** Take other colours: { table, opacity, threshold, fade }. */
  paint(style) {
    this.style = style;
    this.version += 1;
    this.colour = colouring({ ...style, limits: this.values.limits });
    for (const [canvas, coords] of this.squares) this.draw(canvas, coords);
  },
  createTile(coords, done) {
    const canvas = L.DomUtil.create("canvas", "map-square");
    canvas.width = this.options.tileSize;
    canvas.height = this.options.tileSize;
    this.squares.set(canvas, coords);
    this.draw(canvas, coords).then(() => done(null, canvas), (error) => done(error, canvas));
    return canvas;
  },
  /** The value at a place, where it is there already. */
  at(x, y, zoom) {
    const { level, step } = this.levelFor(2 ** -Math.min(zoom, 0));
    const [column, row] = [Math.floor(x / step), Math.floor(y / step)];
    const [columns, rows] = this.values.levels[level];
    if (column < 0 || row < 0 || column >= columns || row >= rows) return NaN;
    const side = this.chunks.side;
    const chunk = this.chunks.get(level, Math.floor(column / side), Math.floor(row / side));
    return chunk.values === null ? NaN : chunk.values[(row % side) * side + (column % side)];
  },
  /** The coarsest level whose values are no larger than a pixel of the screen. */
  levelFor(perPixel) {
    const wanted = Math.floor(Math.log2(perPixel / this.values.step));
    const level = Math.min(Math.max(wanted, 0), this.values.levels.length - 1);
    return { level, step: this.values.step * 2 ** level };
  },
  async draw(canvas, coords) {
    const perPixel = 2 ** -coords.z;
    const { level, step } = this.levelFor(perPixel);
    const cell = this.chunks.side * step; // of a chunk, in level-0 pixels
    const extent = this.options.tileSize * perPixel;
    const [left, top] = [coords.x * extent, coords.y * extent];
    const [columns, rows] = this.values.levels[level];
    const wanted = [];
    for (let row = Math.max(0, Math.floor(top / cell)); row * cell < top + extent; row += 1) {
      for (let column = Math.max(0, Math.floor(left / cell)); column * cell < left + extent; column += 1) {
        if (column * this.chunks.side < columns && row * this.chunks.side < rows) {
          wanted.push({ column, row, chunk: this.chunks.get(level, column, row) });
        }
      }
    }
    const version = this.version;
    await Promise.all(wanted.map(({ chunk }) => chunk.ready));
    if (version !== this.version) return; // painted anew meanwhile
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    for (const { column, row, chunk } of wanted) {
      const size = cell / perPixel;
      context.drawImage(this.drawn(chunk), (column * cell - left) / perPixel, (row * cell - top) / perPixel, size, size);
    }
  },
  drawn(chunk) {
    if (chunk.drawnFor !== this.version) {
      const side = this.chunks.side;
      chunk.drawn ??= Object.assign(document.createElement("canvas"), { width: side, height: side });
      const image = new ImageData(side, side);
      for (let index = 0; index < chunk.values.length; index += 1) {
        this.colour(chunk.values[index], image.data, 4 * index);
      }
      chunk.drawn.getContext("2d").putImageData(image, 0, 0);
      chunk.drawnFor = this.version;
    }
    return chunk.drawn;
  },
});
