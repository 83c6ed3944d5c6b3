"""The style sheet and the script of a report. The script only sorts: without it nothing is missing."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #f6f7f8; --card: #fff; --text: #1b2127; --muted: #56616b; --line: #d8dde1;
  --first: #1f5fa8; --second: #b04a00; --soft: #e8eff7; --warn: #8a3a00; --warn-soft: #fdf1e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121517; --card: #1b1f23; --text: #e7eaed; --muted: #a3adb7; --line: #343b42;
    --first: #82b4f5; --second: #ffab66; --soft: #212d3b; --warn: #ffbd80; --warn-soft: #33261a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 1.3rem; margin: 44px 0 10px; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 75ch; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
code[title] { text-decoration: underline dotted var(--muted) 1px; text-underline-offset: 3px; cursor: help; }
.muted { color: var(--muted); }
.small { font-size: .875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.group { border-left: 4px solid var(--first); margin: 0 0 22px; }
.group > header { margin-bottom: 12px; }
.warn { color: var(--warn); background: var(--warn-soft); border-radius: 6px; padding: 8px 12px; }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.cards, .plots { list-style: none; margin: 0; padding: 0; }
.plots { display: grid; gap: 18px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
figcaption span { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 6px 0 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--card) 30%, transparent) local 0 / 40px 100%
  no-repeat, linear-gradient(to left, var(--card) 30%, transparent) local 100% / 40px 100% no-repeat,
  linear-gradient(to left, var(--line), transparent) 100% / 14px 100% no-repeat; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-size: .8125rem; font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
th small { display: block; color: var(--muted); font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
td.value { font-weight: 700; }
td.note { min-width: 12rem; overflow-wrap: anywhere; }
.notes { margin: 6px 0 14px; padding-left: 1.2em; max-width: 90ch; }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible, summary:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
svg { display: block; width: 100%; max-width: 420px; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--muted); }
svg text.value { fill: var(--text); font-weight: 600; }
svg path { fill: none; stroke: none; }
svg .axis, svg .frame { stroke: var(--muted); }
svg .frame { stroke-opacity: .4; }
svg .grid { stroke: var(--line); }
svg .fill { fill: var(--first); fill-opacity: .75; }
svg .median { stroke: var(--second); stroke-width: 2; stroke-dasharray: 5 3; }
svg .bar { stroke: var(--first); stroke-width: 5; stroke-opacity: .5; }
svg .whisker { stroke: var(--first); stroke-width: 2; }
svg .dot { fill: var(--first); }
svg .circles { stroke: var(--first); stroke-width: 6; stroke-linecap: round; stroke-opacity: .55; }
svg .crosses { stroke: var(--second); stroke-width: 1.5; }
.key { display: inline-block; margin-right: 14px; }
.key svg { display: inline-block; width: 12px; vertical-align: -1px; }
.clip { display: flex; flex-direction: column; gap: 8px; }
.clip > * { margin: 0; max-width: none; }
.clip h3 { font-size: 1rem; line-height: 1.35; }
.rank { font-size: .8125rem; font-weight: 600; color: var(--first); }
.clip dl { font-variant-numeric: tabular-nums; }
.clip dd { font-weight: 600; }
.picture { position: relative; }
.picture img { display: block; width: 100%; height: 128px; border-radius: 6px; }
.picture span { position: absolute; left: 4px; transform: translateY(50%); padding: 0 4px; border-radius: 3px;
  font-size: .6875rem; line-height: 1.3; color: #fff; background: rgb(0 0 0 / .65); }
audio { width: 100%; height: 40px; }
select { font: inherit; padding: 4px 8px; border-radius: 6px; border: 1px solid var(--muted); color: inherit;
  background: var(--card); max-width: 100%; }
summary { cursor: pointer; }
details { margin-top: 10px; }
.order { margin-bottom: 14px; }
@media (max-width: 480px) {
  main { padding: 12px 12px 40px; }
  .card { padding: 14px; }
  h2 { margin-top: 32px; }
  th, td { padding: 7px 8px; }
  th small { white-space: normal; }
}
"""

SCRIPT = """\
"use strict";
const compare = (a, b, sign) => {  // what is empty comes last, in either direction
  const x = Number(a), y = Number(b);
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
};
const key = (cell) => cell.dataset.value ?? cell.textContent.trim();
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(key(a.cells[column]), key(b.cells[column]), down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}
const order = document.getElementById("order");
if (order) {
  const list = document.getElementById("clips"), cards = [...list.children];
  order.parentElement.hidden = false;
  order.addEventListener("change", () => {
    const [column, sign] = order.value.split(" ");
    const value = (card) => card.getAttribute("data-" + column) ?? "";
    const sorted = [...cards];
    if (column !== "place") sorted.sort((a, b) => compare(value(a), value(b), Number(sign)));
    list.append(...sorted);
  });
}
"""
