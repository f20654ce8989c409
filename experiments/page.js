"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const ENDS = 15, FOLD_FROM = 40, SLOTS = 6;

// Which rows are shown: those that match; of many, the first and the last unless all are asked for.
const unfolded = new Set();
function show() {
  const text = (document.getElementById("find")?.value || "").toLowerCase();
  const kinds = all(".kinds [aria-pressed=true]").map(b => b.dataset.kind);
  const free = !text && !kinds.length;
  for (const table of all("table[data-fold]")) {
    const rows = all("tbody tr:not(.fold)", table);
    const match = rows.filter(row =>
      (!text || row.querySelector("th").textContent.toLowerCase().includes(text)) &&
      (!kinds.length || kinds.includes(row.dataset.kind) || row.dataset.kind === "baseline"));
    const fold = free && rows.length > FOLD_FROM && !unfolded.has(table);
    const kept = new Set(fold ? match.filter((_, i) => i <= ENDS || i >= match.length - ENDS) : match);
    rows.forEach(row => { row.hidden = !kept.has(row); });
    let more = table.querySelector("tr.fold");
    if (more) more.remove();
    if (!fold) continue;
    more = document.createElement("tr");
    more.className = "fold";
    const cell = more.appendChild(document.createElement("td"));
    cell.colSpan = 99;
    const button = cell.appendChild(document.createElement("button"));
    button.type = "button";
    button.className = "more";
    button.textContent = `show the ${match.length - kept.size} in between`;
    button.onclick = () => { unfolded.add(table); show(); };
    match[ENDS].after(more);
  }
}

function sort(button) {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  all("th[aria-sort]", table).forEach(th => th.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.children[column].dataset.v ?? row.children[column].textContent.trim().toLowerCase();
  const numbers = body.rows[0].children[column].dataset.v !== undefined;
  const rows = all("tr:not(.fold)", body).map(row => [row, value(row)]);
  rows.sort(([, a], [, b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numbers ? a - b : a.localeCompare(b, undefined, {numeric: true});
    return down ? -order : order;
  });
  body.append(...rows.map(([row]) => row));
  show();
}

// Which curves stand out: each has a slot, which is a colour and a dash.
const slots = new Map();
function paint() {
  const names = new Map(all(".name").map(b => [b.closest("tr").dataset.i, b.textContent]));
  for (const item of all(".curve, tr[data-i]")) {
    const slot = slots.get(item.dataset.i);
    item.classList.remove("on", ...Array.from({length: SLOTS}, (_, s) => "s" + s));
    if (slot !== undefined) item.classList.add("on", "s" + slot);
    if (item.tagName === "g" && slot !== undefined) item.parentNode.append(item);
    const button = item.querySelector("button.name");
    if (button) button.setAttribute("aria-pressed", slot !== undefined);
  }
  const keys = document.querySelector(".keys");
  if (!keys) return;
  const swatch = keys.querySelector("svg") || swatch0;
  keys.replaceChildren(...[...slots].sort((a, b) => a[1] - b[1]).map(([i, slot]) => {
    const item = document.createElement("li");
    item.className = "s" + slot;
    item.append(swatch.cloneNode(true), names.get(i));
    return item;
  }));
}

function toggle(i) {
  if (slots.has(i)) slots.delete(i);
  else {
    const taken = new Set(slots.values());
    let slot = [0, 1, 2, 3, 4, 5].find(s => !taken.has(s) && s > 0) ?? SLOTS - 1;
    for (const [other, s] of slots) if (s === slot) slots.delete(other);
    slots.set(i, slot);
  }
  paint();
}

const swatch0 = document.querySelector(".keys svg");
for (const item of all(".keys li")) slots.set(item.dataset.i, +item.className.slice(1));
all(".controls").forEach(box => { box.hidden = all("table.forest tbody tr").length < 8; });
document.getElementById("find")?.addEventListener("input", show);
document.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches(".sort")) sort(button);
  if (button.matches(".kinds button")) {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    show();
  }
  if (button.matches(".name") && document.querySelector(".keys")) toggle(button.closest("tr").dataset.i);
});
document.addEventListener("pointerover", event => {
  const row = event.target.closest("tr[data-i]");
  all(".curve.hot").forEach(curve => curve.classList.remove("hot"));
  if (row) all(`.curve[data-i="${row.dataset.i}"]`).forEach(curve => curve.classList.add("hot"));
});
paint();
show();
