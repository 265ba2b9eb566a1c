// The page: which slide, which map, in which colours, and where; an address says all of it.

import { readTables, said } from "./colours.js";
import { listen } from "./keys.js";
import { MapLayer, SlideLayer } from "./layers.js";
import { PlacePanel } from "./place.js";
import { SlideTable } from "./table.js";

const byId = (id) => document.getElementById(id);
const state = { index: -1, slide: null, which: 0, map: null, colours: {} };
let run, tables, table, board, slideLayer, mapLayer, marker, asked = 0;
const place = new PlacePanel();

async function ask(address) {
  const answer = await fetch(address);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

const address = (rest) => `/api/slides/${state.index}/${rest}?v=${run.start}`;

function tell(sentence) {
  byId("problem").textContent = sentence;
  byId("problem").hidden = !sentence;
}

async function start() {
  run = await ask("/api/run");
  tables = readTables(run.colours);
  for (const kind of Object.keys(tables)) state.colours[kind] = Object.keys(tables[kind])[0];
  byId("title").textContent = run.title;
  const crs = L.extend({}, L.CRS.Simple, { transformation: new L.Transformation(1, 0, 1, 0) });
  board = L.map("map", {
    crs, minZoom: -20, maxZoom: 3, attributionControl: true, zoomControl: true,
    keyboardPanDelta: 120, maxBoundsViscosity: 0.8, fadeAnimation: false,
  });
  board.attributionControl.setPrefix("");
  board.attributionControl.addAttribution("Leaflet");
  board.on("moveend", () => { remember(); drawScale(); });
  board.on("mousemove", (event) => hover(event.latlng));
  board.on("mouseout", () => { byId("hover").hidden = true; });
  board.on("click", (event) => read(event.latlng.lng, event.latlng.lat));
  table = new SlideTable(byId("table"), byId("filter"), run, (index) => open(index));
  wire();
  window.addEventListener("hashchange", follow);
  await follow();
}

/** Go where the address says. */
async function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const found = run.slides.findIndex((slide) => slide.id === asked.get("slide"));
  const index = found >= 0 ? found : run.first;
  const [x, y, zoom] = ["x", "y", "zoom"].map((name) => Number(asked.get(name) ?? NaN));
  const view = [x, y, zoom].every(Number.isFinite) ? { x, y, zoom } : null;
  await open(index, view, asked.get("map"));
}

/** The address of what is shown now. */
function remember() {
  if (state.slide === null) return;
  const { lat, lng } = board.getCenter();
  const parts = { slide: run.slides[state.index].id, x: Math.round(lng), y: Math.round(lat), zoom: board.getZoom() };
  if (state.map) parts.map = state.slide.maps[state.which];
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}

async function open(index, view = null, mapName = null) {
  const turn = ++asked;
  table.mark(index);
  byId("slide-name").textContent = run.slides[index].id;
  if (index !== state.index || state.slide === null) {
    try {
      const slide = await ask(`/api/slides/${index}`);
      if (turn !== asked) return;
      if (!slide.width) return showNothing(index, slide.problem);
      state.index = index;
      showSlide(slide);
    } catch (error) {
      if (turn === asked) showNothing(index, error.message);
      return;
    }
  }
  if (view) board.setView([view.y, view.x], Math.min(Math.max(view.zoom, board.getMinZoom()), 3), { animate: false });
  const { slide } = state;
  if (slide.maps.length === 0) {
    remember();
  } else {
    const wanted = slide.maps.indexOf(mapName ?? slide.prediction);
    await choose(wanted >= 0 ? wanted : 0);
  }
  if (turn === asked) setTimeout(() => openAhead(turn), 1500);
}

/** Have the server open the next slide while this one is looked at. */
function openAhead(turn) {
  const next = table.beside(1);
  if (turn === asked && next !== state.index) fetch(`/api/slides/${next}`).catch(() => {});
}

function showNothing(index, sentence) {
  clear();
  state.index = index;
  state.slide = null;
  byId("map-controls").hidden = true;
  byId("strongest").hidden = true;
  byId("about").replaceChildren();
  tell(sentence);
}

function clear() {
  place.close();
  for (const layer of [slideLayer, mapLayer, marker]) if (layer) layer.remove();
  slideLayer = mapLayer = marker = undefined;
  state.map = null;
}

function showSlide(slide) {
  clear();
  state.slide = slide;
  document.title = `${slide.id}: ${run.title}`;
  tell(slide.problem);
  const bounds = L.latLngBounds([0, 0], [slide.height, slide.width]);
  const lowest = 1 - slide.levels;
  slideLayer = new SlideLayer(slide, address, {
    bounds, tileSize: run.square_px, minNativeZoom: lowest, maxNativeZoom: 0, minZoom: lowest, maxZoom: 3,
    keepBuffer: 1, updateWhenZooming: false,
  }).addTo(board);
  board.setMinZoom(lowest);
  board.setMaxBounds(bounds.pad(0.5));
  fit();
  board.setMinZoom(Math.max(lowest, board.getBoundsZoom(bounds) - 1));
  describe(slide);
  byId("map-controls").hidden = slide.maps.length === 0;
  byId("strongest").hidden = slide.maps.length === 0;
  byId("which").replaceChildren(...slide.maps.map((name, index) => {
    const score = index < slide.maps.length - 1 ? slide.scores[name] : undefined;
    return new Option(score === undefined ? name : `${name} (${score.toFixed(3)})`, index);
  }));
  drawScale();
}

function fit() {
  board.fitBounds([[0, 0], [state.slide.height, state.slide.width]], { animate: false });
}

/** Show another map. */
async function choose(which) {
  const turn = asked;
  state.which = which;
  byId("which").value = which;
  const name = state.slide.maps[which];
  const verdict = state.slide.verdicts[name] ?? "";
  byId("verdict").textContent = verdict ? `Map check: ${verdict}.` : "";
  byId("verdict").className = verdict;
  let found;
  try {
    found = await ask(address(`maps/${which}`));
  } catch (error) {
    return tell(error.message);
  }
  if (turn !== asked || state.which !== which) return;
  if (mapLayer) mapLayer.remove();
  state.map = found;
  byId("colours").replaceChildren(...Object.keys(tables[found.kind]).map((one) => new Option(one)));
  byId("colours").value = state.colours[found.kind];
  mapLayer = new MapLayer(found, (rest) => address(`maps/${which}/${rest}`), run.chunk, {
    tileSize: run.square_px, minNativeZoom: 1 - state.slide.levels, maxNativeZoom: 0, minZoom: -20, maxZoom: 3,
    bounds: [[0, 0], [state.slide.height, state.slide.width]], keepBuffer: 1, updateWhenZooming: false, zIndex: 2,
  });
  paint();
  if (byId("shown").checked) mapLayer.addTo(board);
  listStrongest(found.strongest, name);
  remember();
}

/** The colours as they are set now; none where there is no map. */
function style() {
  if (state.map === null) return null;
  const { kind, limits } = state.map;
  return {
    table: tables[kind][state.colours[kind]],
    limits,
    opacity: byId("opacity").value / 100,
    threshold: byId("threshold").value / 100,
    fade: byId("fade").checked,
  };
}

function paint() {
  byId("opacity-said").textContent = `${byId("opacity").value} %`;
  byId("threshold-said").textContent = `${byId("threshold").value} % of the scale`;
  const now = style();
  if (now === null) return;
  mapLayer.paint(now);
  place.paint(now, state.which);
  const context = byId("legend").getContext("2d");
  const image = new ImageData(256, 10);
  for (let index = 0; index < 2560; index += 1) {
    image.data.set([...now.table.subarray(3 * (index % 256), 3 * (index % 256) + 3), 255], 4 * index);
  }
  context.putImageData(image, 0, 0);
  const [low, high] = now.limits;
  const ends = byId("legend-ends").children;
  [low, low < 0 ? 0 : high / 4, high].forEach((value, index) => { ends[index].textContent = said(value); });
}

function listStrongest(strongest, name) {
  const parts = [];
  for (const [key, tiles] of Object.entries(strongest)) {
    if (tiles.length === 0) continue;
    const head = document.createElement("h3");
    const signed = `${key === "for" ? "For" : "Against"} ${name}`;
    const attended = key === "for" ? "Most attended" : "Most negative attention";
    head.textContent = state.map.of_class ? signed : attended;
    const list = document.createElement("ol");
    for (const tile of tiles) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = said(tile.value);
      button.ariaLabel = `Tile ${tile.tile}, ${said(tile.value)}`;
      button.addEventListener("click", () => goTo(tile));
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
    parts.push(head, list);
  }
  byId("strongest").querySelector("div").replaceChildren(...parts);
}

function goTo(tile) {
  const half = state.slide.tile_lv0 / 2;
  const zoom = Math.max(board.getZoom(), Math.min(0, Math.round(Math.log2(300 / state.slide.tile_lv0))));
  board.setView([tile.y + half, tile.x + half], zoom, { animate: false });
  read(tile.x + half, tile.y + half);
}

/** Values under the pointer, as far as they are here already. */
function hover({ lat, lng }) {
  if (state.slide === null) return;
  const lines = [`x ${Math.floor(lng)}, y ${Math.floor(lat)}`];
  if (mapLayer && byId("shown").checked) {
    const value = mapLayer.at(lng, lat, board.getZoom());
    lines.push(`${state.slide.maps[state.which]}: ${Number.isFinite(value) ? said(value) : "background"}`);
    clearTimeout(hover.later);
    hover.later = setTimeout(() => hoverAll(lng, lat, lines[0]), 60);
  }
  byId("hover").textContent = lines.join("\n");
  byId("hover").hidden = false;
}

async function hoverAll(x, y, where) {
  const { slide } = state;
  let about;
  try {
    about = await ask(address(`at/${x.toFixed(2)}_${y.toFixed(2)}`));
  } catch {
    return; // the slide was closed meanwhile
  }
  if (about.tile === null || slide !== state.slide || !byId("hover").textContent.startsWith(where)) return;
  const values = about.token ? about.token.values : about.values;
  const lines = slide.maps.map((name, index) => `${name}: ${said(values[index])}`);
  if (about.token && !about.token.kept) lines.splice(0, lines.length, "background");
  byId("hover").textContent = [where, ...lines.slice(0, 12)].join("\n");
}

/** Open the tile at a place. */
async function read(x, y) {
  const turn = asked;
  if (state.slide === null || state.slide.maps.length === 0) return;
  const about = await ask(address(`at/${x.toFixed(2)}_${y.toFixed(2)}`)).catch((error) => tell(error.message));
  if (!about || turn !== asked) return;
  if (marker) marker.remove();
  marker = undefined;
  if (about.tile === null) return place.close();
  const [left, top] = about.corner;
  marker = L.layerGroup([["#ffffff", 5], ["#000000", 2]].map(([color, weight]) =>
    L.rectangle([[top, left], [top + about.side, left + about.side]], { color, weight, fill: false, interactive: false }),
  )).addTo(board);
  place.show(about, state.slide, address(`tiles/${about.tile}.jpg`), style, () => state.which);
}

function closePlace() {
  place.close();
  if (marker) marker.remove();
  marker = undefined;
}

function describe(slide) {
  const facts = {
    size: `${slide.width} × ${slide.height} px`,
    spacing: slide.spacing_um ? `${Number(slide.spacing_um.toPrecision(5))} µm per pixel` : "unknown",
    prediction: slide.prediction, model: slide.model, "about the model": slide.model_note, maps: slide.method,
    notes: slide.notes.join("; "),
  };
  const list = document.createElement("dl");
  for (const [name, value] of Object.entries(facts)) {
    if (!value) continue;
    const [term, said] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    said.textContent = value;
    list.append(term, said);
  }
  byId("about").replaceChildren(list);
}

/** A length of 1, 2 or 5 times a power of ten µm, at most 160 px long. */
function drawScale() {
  const { slide } = state;
  byId("scale-bar").hidden = slide === null || !slide.spacing_um;
  if (byId("scale-bar").hidden) return;
  const perPixel = slide.spacing_um * 2 ** -board.getZoom();
  const power = 10 ** Math.floor(Math.log10(160 * perPixel));
  const length = power * [5, 2, 1].find((factor) => factor * power <= 160 * perPixel);
  const bar = byId("scale-bar").firstElementChild;
  bar.style.width = `${length / perPixel}px`;
  bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(2))} µm`;
}

function nudge(id, steps) {
  byId(id).value = Number(byId(id).value) + steps;
  paint();
}

function turnGrey() {
  byId("map").classList.toggle("grey", byId("grey").checked);
}

function turnTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

function showMap(shown) {
  byId("shown").checked = shown;
  if (!mapLayer) return;
  if (shown) mapLayer.addTo(board);
  else mapLayer.remove();
}

function wire() {
  const nextColours = () => {
    const list = byId("colours");
    list.selectedIndex = (list.selectedIndex + 1) % Math.max(list.length, 1);
    list.dispatchEvent(new Event("change"));
  };
  const toSlides = (shown) => {
    byId("slides").hidden = !shown;
    byId("show-slides").ariaExpanded = String(shown);
    document.querySelector("main").classList.toggle("without-slides", !shown);
    board.invalidateSize();
  };
  byId("which").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("colours").addEventListener("change", (event) => { state.colours[state.map.kind] = event.target.value; paint(); });
  for (const id of ["opacity", "threshold", "fade"]) byId(id).addEventListener("input", paint);
  byId("shown").addEventListener("change", (event) => showMap(event.target.checked));
  byId("grey").addEventListener("change", turnGrey);
  byId("close-place").addEventListener("click", closePlace);
  byId("theme").addEventListener("click", turnTheme);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("show-slides").addEventListener("click", () => toSlides(byId("slides").hidden));
  byId("copy-link").addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href).then(
      () => { byId("copy-link").textContent = "Copied"; },
      () => { byId("copy-link").textContent = "Copy it from the address bar"; },
    );
    setTimeout(() => { byId("copy-link").textContent = "Copy link"; }, 2000);
  });
  const actions = {
    "?": () => byId("keys").showModal(), Home: fit, Escape: closePlace, d: turnTheme, k: nextColours,
    c: () => read(board.getCenter().lng, board.getCenter().lat),
    n: () => open(table.beside(1)), p: () => open(table.beside(-1)), o: () => showMap(!byId("shown").checked),
    g: () => { byId("grey").checked = !byId("grey").checked; turnGrey(); },
    "[": () => nudge("opacity", -10), "]": () => nudge("opacity", 10),
    ",": () => nudge("threshold", -5), ".": () => nudge("threshold", 5),
    f: () => { toSlides(true); byId("filter").focus(); }, s: () => { toSlides(true); table.focus(); }, m: () => byId("map").focus(),
  };
  for (let digit = 0; digit <= 9; digit += 1) {
    actions[digit] = () => {
      const maps = state.slide?.maps ?? [];
      const which = digit === 0 ? maps.length - 1 : digit - 1;
      if (which >= 0 && which < maps.length) choose(which);
    };
  }
  const held = (action) => () => { if (state.slide !== null) action(); };
  for (const key of ["Home", "c"]) actions[key] = held(actions[key]);
  listen(actions);
}

start().catch((error) => tell(`The viewer could not start: ${error.message}`));
