"""The page's style: light and dark from the same variables, one column on a phone; and its script:
sort and filter the table of layers. Without it the table is whole, in order.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --muted: #59616d; --grid: #d5dae1;
  --accent: #1d5fd1; --good: #1a7f37; --bad: #c62828; --mark: #fff4ce;
  --ours: #1d5fd1; --rtn: #8b939e;
  --series-1: #1d5fd1; --series-2: #c2410c; --series-3: #0f766e; --series-4: #a21caf;
  --series-5: #4d7c0f; --series-6: #be123c; --series-7: #6d28d9; --series-8: #57606c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --panel: #1d2128; --ink: #e8ebef; --muted: #a3acb8; --grid: #3a414c;
    --accent: #82b1ff; --good: #56d364; --bad: #ff8a80; --mark: #3d3413;
    --ours: #6ea8ff; --rtn: #8d96a3;
    --series-1: #6ea8ff; --series-2: #ff9d5c; --series-3: #35d0bd; --series-4: #ec8bf5;
    --series-5: #a8dc4c; --series-6: #ff7b93; --series-7: #b49bff; --series-8: #c3cad4;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 78rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "Liberation Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; line-height: 1.3; margin: 0; }
p { margin: .4rem 0; }
.under, figcaption, .hint, .tile small { color: var(--muted); font-size: .875rem; }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.tile { background: var(--panel); border-radius: .6rem; padding: .7rem .9rem; }
.tile dt { color: var(--muted); font-size: .875rem; }
.tile dd { margin: 0; }
.tile strong { display: block; font-size: 1.4rem; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile small { display: block; line-height: 1.4; }
.good { color: var(--good); } .bad { color: var(--bad); }
.list { list-style: none; padding: 0; margin: 1rem 0 0; }
.list li { padding: .45rem .75rem; border-left: .25rem solid var(--grid); margin: .4rem 0;
  background: var(--panel); border-radius: 0 .4rem .4rem 0; }
.list .bad, .list .good { font-weight: 650; }
.list .missed { border-color: var(--bad); } .list .passed { border-color: var(--good); }
.charts { display: grid; gap: 1.75rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.picture { display: block; width: 100%; max-width: 40rem; height: auto; margin: .35rem 0 .25rem;
  overflow: visible; }
.picture * { stroke-linejoin: round; stroke-linecap: butt; }
figure.wide .picture { max-width: none; }
figure.wide .picture.wide { display: none; }
@media (min-width: 48rem) {
  figure.wide .picture.wide { display: block; }
  figure.wide .picture.narrow { display: none; }
}
.controls { display: flex; flex-wrap: wrap; gap: .6rem .9rem; align-items: end; margin: 0 0 .6rem; }
.controls[hidden] { display: none; }
.controls label { font-size: .875rem; color: var(--muted); display: block; flex: 0 1 9rem; }
.controls label:first-child { flex: 1 1 14rem; }
input, select, th button { font: inherit; color: var(--ink); }
input, select { width: 100%; background: var(--paper); border: 1px solid var(--muted);
  border-radius: .4rem; padding: .4rem .55rem; min-height: 2.5rem; }
output { font-size: .875rem; color: var(--muted); flex: 1 0 100%; }
.scroll { overflow-x: auto; border: 1px solid var(--grid); border-radius: .5rem; }
.rows { max-height: 42rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--grid); white-space: nowrap; font-variant-numeric: tabular-nums; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; background: var(--panel); z-index: 2; font-weight: 600;
  vertical-align: bottom; }
th[scope=row] { font-weight: 500; }
.text, .long { text-align: left; }
.name { text-align: left; position: sticky; left: 0; background: var(--paper); z-index: 1;
  white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 22rem; }
thead .name { background: var(--panel); z-index: 3; }
td.long { white-space: normal; min-width: 16rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button::after { content: "\\2195"; color: var(--muted); padding-left: .25rem; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--ink); }
:focus-visible, th button:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px;
  border-radius: .2rem; }
tr.marked > * { background: var(--mark); }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
@media (max-width: 30rem) {
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .tile { padding: .6rem .7rem; } .tile strong { font-size: 1.2rem; }
  .name { max-width: 11rem; }
}
@media print { .controls { display: none; } .rows { max-height: none; } }
"""

# Empty cells come last whichever way it is sorted. Numbers are read from `data-v`.
SCRIPT = """
"use strict";
(() => {
  const table = document.getElementById("layers");
  if (!table) return;
  const body = table.tBodies[0], rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const controls = document.getElementById("controls");
  const count = document.getElementById("count");
  const find = document.getElementById("find");
  const selects = Array.from(controls.querySelectorAll("select"));
  const value = (cell) => cell.dataset.v ?? cell.textContent;
  const sort = (i) => {
    const head = heads[i], numeric = head.classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numeric;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const empty = (text) => text === "" || text === "-";
    rows.sort((x, y) => {
      const a = value(x.cells[i]), b = value(y.cells[i]);
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      return sign * (numeric ? a - b : a < b ? -1 : a > b);
    });
    body.append(...rows);
  };
  const filter = () => {
    const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) &&
        selects.every((s) => !s.value || row.cells[+s.dataset.column].textContent === s.value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} layers shown`;
  };
  heads.forEach((head, i) => {
    head.querySelector("button").addEventListener("click", () => sort(i));
  });
  find.addEventListener("input", filter);
  selects.forEach((select) => select.addEventListener("change", filter));
  controls.hidden = false;
  filter();
})();
"""
