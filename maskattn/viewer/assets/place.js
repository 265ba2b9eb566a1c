// What is known of a place: the tile's pixels, its token map, and the values of both in every map.

import { colouring, said } from "./colours.js";

const byId = (id) => document.getElementById(id);

export class PlacePanel {
  constructor() {
    this.about = null;
    this.box = byId("place");
  }

  /** Show what the server knows of a place. */
  show(about, slide, imageAddress, style, which) {
    this.about = about;
    this.slide = slide;
    const image = byId("tile-image");
    image.onload = () => this.paint(style(), which());
    image.src = imageAddress;
    const token = about.token;
    const where = `Tile ${about.tile} at x ${about.corner[0]}, y ${about.corner[1]}, ${about.side} px wide.`;
    const which_token = token ? ` Token in row ${token.row + 1}, column ${token.column + 1}` : "";
    byId("place-said").textContent = where + which_token + (token ? (token.kept ? "." : ", background.") : "");
    const rows = slide.maps.map((name, index) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = token ? said(token.values[index]) : "–";
      row.insertCell().textContent = said(about.values[index]);
      return row;
    });
    byId("values").tBodies[0].replaceChildren(...rows);
    this.box.hidden = false;
  }

  /** Draw the token map of the tile over its pixels in grey. */
  paint(style, which) {
    if (this.about === null || style === null) return;
    const canvas = byId("tile-map");
    const context = canvas.getContext("2d");
    context.filter = "grayscale(1)";
    context.drawImage(byId("tile-image"), 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    const tokens = this.about.tokens ?? { rows: 1, columns: 1, values: this.about.values.map((value) => [value]) };
    const image = new ImageData(tokens.columns, tokens.rows);
    const colour = colouring(style);
    tokens.values[which].forEach((value, index) => colour(value ?? NaN, image.data, 4 * index));
    const small = Object.assign(document.createElement("canvas"), { width: tokens.columns, height: tokens.rows });
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  close() {
    this.about = null;
    this.box.hidden = true;
  }
}
