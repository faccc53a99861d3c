"""The page's script: sort and filter the table of layers. Without it the table is whole, in order.

Empty cells come last whichever way it is sorted. Numbers are read from `data-v` where the text is
not one.
"""

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
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
  };
  const compare = (a, b, numeric) =>
    numeric ? parseFloat(a) - parseFloat(b)
            : a < b ? -1 : a > b ? 1 : 0;
  const sort = (i) => {
    const head = heads[i], numeric = head.classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numeric;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const empty = (text) => text === "" || text === "-";
    rows.sort((x, y) => {
      const a = value(x, i), b = value(y, i);
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      return sign * compare(a, b, numeric);
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
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(i));
  });
  find.addEventListener("input", filter);
  selects.forEach((select) => select.addEventListener("change", filter));
  controls.hidden = false;
  filter();
})();
"""
