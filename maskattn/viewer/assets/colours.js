// Values to colours: a square-root scale with zero in the middle of signed maps, as the heat maps have it.

/** Decode the tables of the server: kind → name → 768 bytes. */
export function readTables(colours) {
  const tables = {};
  for (const [kind, names] of Object.entries(colours)) {
    tables[kind] = {};
    for (const [name, text] of Object.entries(names)) {
      tables[kind][name] = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    }
  }
  return tables;
}

const root = (value) => Math.sign(value) * Math.sqrt(Math.abs(value));

/**
 * A function from a value to a colour, written to `out` at `at` as RGBA; a value that is not known is clear.
 * The threshold is a share of the greater limit, and hides what is nearer to zero.
 */
export function colouring({ table, limits, opacity, threshold, fade }) {
  const low = root(limits[0]);
  const span = Math.max(root(limits[1]) - low, 1e-30);
  const least = threshold * Math.max(Math.abs(limits[0]), Math.abs(limits[1]));
  const signed = limits[0] < 0;
  return (value, out, at) => {
    if (!Number.isFinite(value) || Math.abs(value) < least) {
      out[at + 3] = 0;
      return;
    }
    const position = Math.min(1, Math.max(0, (root(value) - low) / span));
    const from = 3 * Math.round(255 * position);
    const far = signed ? Math.abs(2 * position - 1) : position;
    out[at] = table[from];
    out[at + 1] = table[from + 1];
    out[at + 2] = table[from + 2];
    out[at + 3] = Math.round(255 * opacity * (fade ? 0.15 + 0.85 * far : 1));
  };
}

/** Numbers as they are shown: three figures, a true minus. */
export function said(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e4) ? value.toExponential(2) : value.toPrecision(3);
  return text.replaceAll("-", "−");
}
