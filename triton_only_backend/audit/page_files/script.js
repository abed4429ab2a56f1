"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table");
    const column = heading.cellIndex, numeric = button.dataset.sort === "number";
    const now = heading.getAttribute("aria-sort");
    const sign = now ? (now === "ascending" ? -1 : 1) : numeric ? -1 : 1;
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.cells[column];
      const text = cell.dataset.value ?? cell.textContent.trim();
      return numeric ? parseFloat(text) || 0 : text.toLowerCase();
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => sign * (numeric ? a - b : a.localeCompare(b)));
    body.append(...rows.map(([, row]) => row));
  });
}
for (const input of document.querySelectorAll("[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
  });
}
const svg = document.getElementById("timeline");
if (svg) {
  const span = Number(svg.dataset.span), height = svg.viewBox.baseVal.height;
  const kernels = JSON.parse(document.getElementById("kernels").textContent);
  const ends = document.querySelectorAll(".axis span"), launch = document.getElementById("launch");
  let start = 0, width = span;
  const show = (from, wide) => {
    width = Math.min(span, Math.max(wide, span / 5000));
    start = Math.min(span - width, Math.max(0, from));
    svg.setAttribute("viewBox", `${start} 0 ${width} ${height}`);
    const digits = width < 100 ? 2 : 0;
    ends[0].textContent = `${start.toFixed(digits)} µs`;
    ends[1].textContent = `${(start + width).toFixed(digits)} µs`;
  };
  const moves = {
    in: () => show(start + width / 4, width / 2), out: () => show(start - width / 2, width * 2),
    left: () => show(start - width / 4, width), right: () => show(start + width / 4, width),
    all: () => show(0, span),
  };
  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" };
  svg.addEventListener("keydown", (event) => {
    if (event.key in keys) { moves[keys[event.key]](); event.preventDefault(); }
  });
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", moves[button.dataset.zoom]);
  }
  document.querySelector(".controls").hidden = false;
  svg.addEventListener("pointerover", (event) => {
    const bar = event.target;
    if (bar.dataset.kernel === undefined) return;
    const at = bar.x.baseVal.value.toFixed(1), took = bar.width.baseVal.value.toFixed(1);
    launch.textContent = `${kernels[bar.dataset.kernel]}: at ${at} µs, ${took} µs long`;
  });
}
