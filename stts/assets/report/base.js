// What the other scripts of a report share: its data, colours and marks of methods, numbers as text, elements.
"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
// Hues by where a method drops tokens; methods of one place share a range and differ in the mark too.
const HUES = { "learned": [4, 16], "in the ViT": [28, 46], "before the LLM": [165, 265], "inside the LLM": [300, 335] };
const MARKS = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.5,-4.5h9v9h-9z", "M0,-6L5.5,4.5H-5.5z", "M0,-6L6,0L0,6L-6,0z",
  "M0,6L5.5,-4.5H-5.5z", "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z", "M-6,0L4.5,-5.5V5.5z", "M6,0L-4.5,-5.5V5.5z",
  "M0,-6L6,-1.5L3.7,5H-3.7L-6,-1.5z", "M-5.5,-3L0,-6L5.5,-3V3L0,6L-5.5,3z", "M-6,-2.5h12v5h-12z",
];

let run, styles, order, hidden, chosen;

// --- small helpers ---------------------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const percent = (value, digits = 1) => (100 * value).toFixed(digits);
const signed = (value) => percent(value).replace(/^-?0\.0$/, "0.0").replace(/^(?=[1-9]|0\.[1-9])/, "+");
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

const unitOf = (value) => [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"]].find(([size]) => value >= size) ?? [1, ""];
const short = (value) => String(Number(value.toPrecision(3)));

function scaled(value) {
  const [size, unit] = unitOf(value);
  return `${short(value / size)} ${unit}`;
}

function paint(node, method) {
  const style = styles.get(method);
  node.classList.add("method", style.unpruned ? "k-unpruned" : "k-pruned");
  node.style.setProperty("--hue", style.hue);
  return node;
}

// --- one comparison --------------------------------------------------------------------------------------------------

function show(number) {
  run = runs[number];
  styles = new Map();
  hidden = new Set();
  order = { column: null, down: true };
  const pruned = {};
  const known = [...run.rows.map((row) => [row.method, row.kind]), ...run.cells.map((cell) => [cell.title, cell.kind])];
  for (const [method, kind] of known) {
    if (styles.has(method)) continue;
    if (kind === "unpruned") { styles.set(method, { hue: 0, mark: 3, unpruned: true }); continue; }
    (pruned[kind] ??= []).push(method);
    styles.set(method, {});
  }
  for (const [kind, methods] of Object.entries(pruned)) {
    const [low, high] = HUES[kind];
    methods.forEach((method, place) => {
      const hue = low + (high - low) * (methods.length > 1 ? place / (methods.length - 1) : 0);
      styles.set(method, { hue, mark: place % MARKS.length, unpruned: false });
    });
  }
  $("headline").textContent = run.headline;
  $("summary").textContent = run.summary;
  $("results").hidden = $("plots").hidden = !run.rows.length;
  $("notes").replaceChildren(...run.notes.map((note) => el("li", {}, note)));
  openChoices();
  redrawNumbers();
  legend();
  times();
  openSamples();
}

function redrawNumbers() {
  table();
  panels();
}

const label = (row) => (row.kind === "unpruned" ? row.method : `${row.method} ${short(row.retention_configured)}`);


