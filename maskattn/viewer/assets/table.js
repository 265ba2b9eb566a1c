// The table of slides: sorted by any column, searched, a button in each row opens its slide.

const VERDICTS = new Set(["ok", "failed", "passed", "weak", "contradicts"]);

export class SlideTable {
  constructor(table, filter, run, onOpen) {
    this.body = table.tBodies[0];
    this.head = table.tHead;
    this.run = run;
    this.onOpen = onOpen;
    this.sorted = { column: null, down: false };
    this.current = -1;
    this.order = run.slides.map((_, index) => index);
    this.filter = filter;
    filter.addEventListener("input", () => this.arrange());
    this.drawHead();
    this.rows = run.slides.map((slide, index) => this.drawRow(slide, index));
    this.arrange();
  }

  drawHead() {
    const row = this.head.insertRow();
    this.heads = this.run.columns.map((column) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.ariaSort = "none";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = column.replaceAll("_", " ");
      button.addEventListener("click", () => this.sortBy(column));
      cell.append(button);
      row.append(cell);
      return { column, cell, button };
    });
  }

  drawRow(slide, index) {
    const row = document.createElement("tr");
    this.run.columns.forEach((column, position) => {
      const cell = row.insertCell();
      const text = slide.row[column] ?? "";
      if (position === 0) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = text;
        button.addEventListener("click", () => this.onOpen(index));
        cell.append(button);
      } else if (text.length > 60) {
        const long = document.createElement("span");
        long.className = "long";
        long.textContent = text;
        long.title = text;
        cell.append(long);
      } else {
        cell.textContent = text;
        if (text !== "" && Number.isFinite(Number(text))) cell.className = "number";
        if (VERDICTS.has(text)) cell.className = text;
      }
    });
    return row;
  }

  sortBy(column) {
    this.sorted = { column, down: this.sorted.column === column && !this.sorted.down };
    for (const head of this.heads) {
      const here = head.column === column;
      head.cell.ariaSort = here ? (this.sorted.down ? "descending" : "ascending") : "none";
      const arrow = here ? (this.sorted.down ? " ▼" : " ▲") : "";
      head.button.textContent = head.column.replaceAll("_", " ") + arrow;
    }
    this.arrange();
  }

  arrange() {
    const asked = this.filter.value.toLowerCase();
    const text = (index, column) => this.run.slides[index].row[column] ?? "";
    this.order = this.run.slides.map((_, index) => index);
    const { column, down } = this.sorted;
    if (column !== null) {
      this.order.sort((one, other) => compared(text(one, column), text(other, column), down));
    }
    if (asked) {
      this.order = this.order.filter((index) =>
        this.run.columns.some((name) => text(index, name).toLowerCase().includes(asked)),
      );
    }
    this.body.replaceChildren(...this.order.map((index) => this.rows[index]));
  }

  /** Mark the slide that is shown. */
  mark(index) {
    if (this.current >= 0) this.rows[this.current].removeAttribute("aria-current");
    this.current = index;
    this.rows[index].setAttribute("aria-current", "true");
    this.rows[index].scrollIntoView({ block: "nearest" });
  }

  /** The slide so many rows on, as the table stands. */
  beside(steps) {
    if (this.order.length === 0) return this.current;
    const at = this.order.indexOf(this.current);
    return this.order[(at + steps + this.order.length) % this.order.length];
  }

  focus() {
    (this.rows[this.current] ?? this.rows[0])?.querySelector("button").focus();
  }
}

/** Which of two texts comes first; empty ones come last either way. */
function compared(one, other, down) {
  if (one === "" || other === "") return (one === "") - (other === "");
  const [first, second] = [Number(one), Number(other)];
  const both = Number.isFinite(first) && Number.isFinite(second);
  return (down ? -1 : 1) * (both ? first - second : one.localeCompare(other, "en", { numeric: true }));
}
