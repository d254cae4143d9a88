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
const signed = (value) => (value > 0 ? "+" : "") + percent(value);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

function scaled(value) {
  const [size, unit] = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"]].find(([s]) => value >= s) ?? [1, ""];
  return `${Number((value / size).toPrecision(3))} ${unit}`;
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
  $("summary").textContent = run.summary;
  $("results").hidden = $("plots").hidden = !run.rows.length;
  $("notes").replaceChildren(...run.notes.map((note) => el("li", {}, note)));
  table();
  legend();
  panels();
  openSamples();
}

// --- table -----------------------------------------------------------------------------------------------------------

const interval = (value, low, high, write) => [write(value), " ", el("small", {}, `[${write(low)}, ${write(high)}]`)];
const COLUMNS = [
  { name: "method", value: (row) => row.method, words: true },
  { name: "kept", value: (row) => row.retention_configured, write: (value) => String(value) },
  { name: "accuracy %", value: (row) => row.accuracy,
    cell: (row) => interval(row.accuracy, row.accuracy_low, row.accuracy_high, percent) },
  { name: "vs dense", value: (row) => row.difference,
    cell: (row) => interval(row.difference, row.difference_low, row.difference_high, signed) },
  { name: "measured", value: (row) => row.retention_measured, write: (value) => value.toFixed(3) },
  { name: "tokens/frame", value: (row) => row.kept_per_frame, write: (value) => String(Number(value.toPrecision(3))) },
  { name: "FLOPs", value: (row) => row.flops_total, write: scaled },
  { name: "of dense", value: (row) => row.flops_share, write: (value) => `${percent(value)} %` },
  { name: "ms/sample", value: (row) => row.ms_per_sample, write: (value) => value.toFixed(1) },
  { name: "drops tokens", value: (row) => (row.kind === "unpruned" ? "nowhere" : row.kind), words: true },
];

function table() {
  const head = el("tr", {}, ...COLUMNS.map((column) => el("th", {
    scope: "col", class: column.words ? "words" : null,
    "aria-sort": order.column === column ? (order.down ? "descending" : "ascending") : null,
  }, el("button", { type: "button", onclick: () => sortBy(column) }, column.name))));
  const rows = [...run.rows];
  if (order.column) rows.sort((a, b) => compare(order.column.value(a), order.column.value(b)));
  $("table").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows.map(line)));
}

function compare(a, b) {  // what has no value stands last, whichever way
  if (a === null || b === null) return (a === null) - (b === null);
  const up = typeof a === "string" ? a.localeCompare(b) : a - b;
  return order.down ? -up : up;
}

function sortBy(column) {
  const same = order.column === column;
  order = { column, down: same ? !order.down : !column.words };
  table();
  $("table").querySelectorAll("thead button")[COLUMNS.indexOf(column)].focus();
}

function line(row) {
  const name = el("th", { scope: "row" }, row.method);
  if (row.reason !== null)
    return el("tr", {}, name, el("td", {}, String(row.retention_configured)),
      el("td", { colspan: COLUMNS.length - 2, class: "reason" }, `not run: ${row.reason}`));
  const cells = COLUMNS.slice(1).map((column) => {
    const value = column.value(row);
    const shown = value === null ? ["-"] : column.cell ? column.cell(row) : [column.write ? column.write(value) : value];
    return el("td", { class: column.words ? "words" : null }, ...shown);
  });
  return el("tr", {}, name, ...cells);
}

// --- plots -----------------------------------------------------------------------------------------------------------

const PANELS = [
  { title: "tokens per frame (mean over LLM layers)", value: (row) => row.kept_per_frame, beside: true,
    write: (value) => `${Number(value.toPrecision(3))}` },
  { title: "FLOPs per video (% of dense)", value: (row) => row.flops_share && 100 * row.flops_share,
    write: (value) => `${Number(value.toPrecision(3))}` },
  { title: "ms per sample", value: (row) => row.ms_per_sample, write: (value) => `${Number(value.toPrecision(3))}` },
];
const BOX = { width: 420, height: 330, left: 44, right: 14, top: 28, bottom: 46 };

function legend() {
  const rows = run.rows.filter((row) => row.accuracy !== null);
  const parts = [];
  let kind = null;
  for (const method of new Set(["unpruned", ...Object.keys(HUES)].flatMap(
    (name) => rows.filter((row) => row.kind === name).map((row) => row.method)))) {
    const found = rows.find((row) => row.method === method).kind;
    if (found !== kind) parts.push(el("span", { class: "head" }, `${(kind = found)}:`));
    const mark = svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" },
      svg("path", { d: MARKS[styles.get(method).mark], class: "mark" }));
    parts.push(paint(el("button", { type: "button", "aria-pressed": "true", onclick: (event) => {
      const off = !hidden.delete(method) && hidden.add(method);
      event.currentTarget.setAttribute("aria-pressed", String(!off));
      panels();
    } }, mark, method), method));
  }
  const all = el("button", { type: "button", onclick: () => {
    const off = !hidden.size;
    hidden = new Set(off ? rows.map((row) => row.method).filter((method) => !styles.get(method).unpruned) : []);
    for (const one of $("legend").querySelectorAll("[aria-pressed]"))
      one.setAttribute("aria-pressed", String(!hidden.has(one.textContent)));
    panels();
  } }, "all / none");
  $("legend").replaceChildren(...parts, all);
}

function panels() {
  const rows = run.rows.filter((row) => row.accuracy !== null && !hidden.has(row.method));
  $("panels").replaceChildren(...PANELS.map((panel) => draw(panel, rows.filter((row) => panel.value(row) !== null))));
}

function steps(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) ticks.push(Number(value.toPrecision(6)));
  return ticks;
}

function draw(panel, rows) {
  const holder = el("div", { class: "panel" });
  if (!rows.length) {
    holder.append(el("p", { class: "hint" }, `${panel.title}: nothing to show`));
    return holder;
  }
  const xs = rows.map(panel.value);
  const log = Math.max(...xs) / Math.min(...xs) > 4;
  const pad = log ? [1 / 1.2, 1.2] : [0, 0];
  const spread = (Math.max(...xs) - Math.min(...xs)) || Math.max(...xs) || 1;
  const [x0, x1] = log ? [Math.min(...xs) * pad[0], Math.max(...xs) * pad[1]]
    : [Math.max(0, Math.min(...xs) - 0.12 * spread), Math.max(...xs) + 0.12 * spread];
  const y0 = Math.max(0, Math.floor(20 * Math.min(...rows.map((row) => row.accuracy_low)) - 0.2) / 20);
  const y1 = Math.min(1, Math.ceil(20 * Math.max(...rows.map((row) => row.accuracy_high)) + 0.2) / 20);
  const across = BOX.width - BOX.left - BOX.right, down = BOX.height - BOX.top - BOX.bottom;
  const share = (x) => (log ? Math.log(x / x0) / Math.log(x1 / x0) : (x - x0) / (x1 - x0));
  const X = (x) => BOX.left + across * share(x);
  const Y = (y) => BOX.top + down * (1 - (y - y0) / (y1 - y0));

  const picture = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "group",
    "aria-label": `accuracy over ${panel.title}` });
  for (const tick of steps(100 * y0, 100 * y1, 5))
    picture.append(svg("line", { class: "grid", x1: BOX.left, x2: BOX.left + across, y1: Y(tick / 100), y2: Y(tick / 100) }),
      svg("text", { class: "axis", x: BOX.left - 6, y: Y(tick / 100) + 4, "text-anchor": "end" }, `${tick}`));
  const logTicks = [1, 2, 5].flatMap((n) => [-3, -2, -1, 0, 1, 2, 3, 4, 5].map((power) => n * 10 ** power)).sort((a, b) => a - b);
  for (const tick of log ? logTicks.filter((x) => x >= x0 && x <= x1) : steps(x0, x1, 5))
    picture.append(svg("line", { class: "grid", x1: X(tick), x2: X(tick), y1: BOX.top, y2: BOX.top + down }),
      svg("text", { class: "axis", x: X(tick), y: BOX.top + down + 18, "text-anchor": "middle" }, `${Number(tick.toPrecision(3))}`));
  picture.append(svg("text", { x: BOX.left + across / 2, y: BOX.height - 8, "text-anchor": "middle" },
    panel.title + (log ? ", log scale" : "")), svg("text", { x: BOX.left, y: 17 }, "accuracy %"));

  const dense = rows.find((row) => row.method === "dense");
  if (dense)
    picture.append(
      svg("rect", { class: "band", x: BOX.left, width: across, y: Y(dense.accuracy_high),
        height: Y(dense.accuracy_low) - Y(dense.accuracy_high) }),
      svg("line", { class: "dense", x1: BOX.left, x2: BOX.left + across, y1: Y(dense.accuracy), y2: Y(dense.accuracy) }));
  // Methods at one budget would cover each other: where x is a budget, each is moved a little to the side.
  const methods = [...new Set(rows.filter((row) => row.kind !== "unpruned").map((row) => row.method))];
  const shift = (row) => (!panel.beside || row.kind === "unpruned" || methods.length < 2 ? 0
    : (methods.indexOf(row.method) / (methods.length - 1) - 0.5) * Math.min(36, 7 * (methods.length - 1)));
  const at = (row) => [X(panel.value(row)) + shift(row), Y(row.accuracy)];
  picture.append(svg("path", { class: "front", d: front(rows, panel, at) }));
  for (const method of methods) {
    const curve = rows.filter((row) => row.method === method).sort((a, b) => panel.value(a) - panel.value(b));
    picture.append(paint(svg("path", { class: "curve", d: "M" + curve.map(at).join("L") }), method));
  }
  const tip = el("div", { class: "tip", hidden: true });
  const points = [...rows].sort((a, b) => at(a)[0] - at(b)[0]).map((row) => point(row, at(row), panel, Y, methods.length));
  picture.append(...points);
  holder.append(picture, tip);
  walkable(holder, picture, points, tip);
  return holder;
}

function front(rows, panel, at) {
  let best = -1, path = "";
  for (const row of [...rows].sort((a, b) => panel.value(a) - panel.value(b) || b.accuracy - a.accuracy)) {
    if (row.accuracy <= best) continue;
    path += path ? `H${at(row)[0]}V${at(row)[1]}` : `M${at(row)}`;
    best = row.accuracy;
  }
  return path;
}

function point(row, [x, y], panel, Y, crowd) {
  const text = [
    row.kind === "unpruned" ? row.method : `${row.method}, kept ${row.retention_configured}`,
    `accuracy ${percent(row.accuracy)} % [${percent(row.accuracy_low)}, ${percent(row.accuracy_high)}]`,
    ...(row.difference === null ? [] : [`vs dense ${signed(row.difference)} [${signed(row.difference_low)}, ${signed(row.difference_high)}]`]),
    `${panel.title}: ${panel.write(panel.value(row))}`,
  ].join("\n");
  const bar = panel.beside ? [svg("line", { class: "bar", opacity: Math.min(0.55, 4 / (crowd || 1)),  // many bars fade
    x1: 0, x2: 0, y1: Y(row.accuracy_low) - y, y2: Y(row.accuracy_high) - y })] : [];
  return paint(svg("g", { class: "point", role: "img", tabindex: "-1", transform: `translate(${x},${y})`, "aria-label": text },
    ...bar, svg("circle", { class: "halo", r: 11 }), svg("path", { class: "mark", d: MARKS[styles.get(row.method).mark] })), row.method);
}

function walkable(holder, picture, points, tip) {
  points[0].setAttribute("tabindex", "0");  // one stop per plot; arrows go on from there
  const mark = (target) => {
    for (const one of points) one.classList.toggle("on", one === target);
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.getAttribute("aria-label");
    const box = target.querySelector(".mark").getBoundingClientRect(), frame = holder.getBoundingClientRect();
    const middle = box.left + box.width / 2 - frame.left;
    tip.style.left = `${clamp(middle - tip.offsetWidth / 2, 4, Math.max(4, frame.width - tip.offsetWidth - 4))}px`;
    const above = box.top - frame.top - tip.offsetHeight - 8;
    tip.style.top = `${above > 0 ? above : box.bottom - frame.top + 8}px`;
  };
  const go = (target) => {
    for (const one of points) one.setAttribute("tabindex", one === target ? "0" : "-1");
    target.focus();
  };
  points.forEach((one, place) => {
    one.addEventListener("focus", () => mark(one));
    one.addEventListener("blur", () => mark(null));
    one.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = { Home: 0, End: points.length - 1 }[event.key] ?? (move && clamp(place + move, 0, points.length - 1));
      if (next === undefined) return;
      event.preventDefault();
      go(points[next]);
    });
  });
  picture.addEventListener("pointermove", (event) => {  // the nearest, because marks may cover each other
    const distance = (one) => {
      const box = one.querySelector(".mark").getBoundingClientRect();
      return Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
    };
    const nearest = points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    mark(distance(nearest) < 24 ? nearest : null);
  });
  picture.addEventListener("pointerleave", () => mark(null));
}

// --- samples ---------------------------------------------------------------------------------------------------------

const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const pictures = new Map();  // data URI -> Image
let found = [], cards = [];

function openSamples() {
  const families = [...new Set(run.samples.map((sample) => sample.family))].filter(Boolean).sort();
  $("family").replaceChildren(el("option", { value: "" }, "all"), ...families.map((name) => el("option", {}, name)));
  $("family").parentElement.hidden = !families.length;
  const ratios = [...new Set(run.cells.filter((cell) => cell.kind !== "unpruned").map((cell) => cell.ratio))];
  $("ratio").replaceChildren(...ratios.map((ratio) => el("option", { value: ratio }, String(ratio))));
  $("ratio-choice").hidden = ratios.length < 2;
  $("filters").hidden = $("walk").hidden = run.samples.length < 2;
  $("wrong").checked = $("differ").checked = false;
  $("samples").hidden = !run.samples.length;
  filter();
}

const shownCells = () => run.cells.filter((cell) => cell.kind === "unpruned" || String(cell.ratio) === $("ratio").value);

function filter() {
  const keys = shownCells().map((cell) => cell.key);
  const before = chosen;
  found = run.samples.filter((sample) => {
    const answers = keys.map((key) => sample.outcomes[key]).filter(Boolean);
    return (!$("family").value || sample.family === $("family").value)
      && (!$("wrong").checked || answers.some((answer) => answer.right === false))
      && (!$("differ").checked || new Set(answers.map((answer) => answer.said.trim())).size > 1);
  });
  $("sample").replaceChildren(...found.map((sample, place) => el("option", { value: place }, [sample.uid, sample.question].filter(Boolean).join(": "))));
  choose(Math.max(0, found.indexOf(before)));
}

function choose(place) {
  chosen = found[place];
  $("viewer").hidden = !chosen;
  $("sample").disabled = !chosen;
  $("previous").disabled = place <= 0;
  $("next").disabled = place >= found.length - 1;
  const rest = run.samples.length < run.num_samples ? ` (the first ${run.samples.length} of ${run.num_samples} are in this page)` : "";
  $("found").textContent = chosen ? `${place + 1} of ${found.length}${rest}` : `no sample fits${rest}`;
  if (!chosen) return;
  $("sample").value = String(place);
  const facts = [["Question", chosen.question || "(not stored)"], ["Expected", chosen.answer], ["Family", chosen.family]];
  $("asked").replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
  const [t] = chosen.grid;
  $("frame").max = String(t - 1);
  if (Number($("frame").value) > t - 1) $("frame").value = "0";
  const kept = Object.values(chosen.kept), overlay = kept.length > 0;
  $("heat-choice").hidden = !kept.some((one) => one.scores);
  $("film").hidden = !overlay && chosen.frames === null;
  const remarks = [];
  if (chosen.frames === null) remarks.push(`Frames cannot be shown: ${chosen.missing}.`);
  if (!overlay) remarks.push("Which tokens were kept was not written; run compare with --save_kept N.");
  $("remark").textContent = remarks.join(" ");
  cards = shownCells().filter((cell) => chosen.outcomes[cell.key]).map(card);
  $("cards").replaceChildren(...cards.map((one) => one.node));
  redraw();
}

function card(cell) {
  const answer = chosen.outcomes[cell.key], [t, h, w] = chosen.grid, per = h * w;
  const made = chosen.kept[cell.key];
  const everything = cell.kind === "unpruned" && per > 0;
  const mask = made ? bytes(made.mask) : everything ? new Uint8Array(t * per).fill(1) : null;
  const scores = made?.scores ? bytes(made.scores) : null;
  const counts = mask && Array.from({ length: t }, (_, frame) => mask.subarray(frame * per, (frame + 1) * per).reduce((a, b) => a + b, 0));
  const canvas = mask || chosen.frames !== null ? el("canvas", { role: "img" }) : null;
  const caption = el("small", {});
  const bars = counts && budget(counts, per);
  const name = cell.kind === "unpruned" ? cell.title : `${cell.title} ${cell.ratio}`;
  const verdict = answer.right === null ? el("span", {}, answer.said)
    : el("span", { class: answer.right ? "right" : "wrong" }, `${answer.right ? "\u2713" : "\u2717"} ${answer.said || "(nothing)"}`,
      el("span", { class: "unseen" }, answer.right ? " (right)" : " (wrong)"));
  const node = paint(el("article", { class: "card" }, el("h3", {}, name), ...(canvas ? [canvas] : []), el("p", {}, verdict),
    el("p", {}, caption), ...(bars ? [bars] : [])), cell.title);
  return { node, canvas, caption, bars, mask, scores, counts, name, per, answer, inside: cell.kind === "inside the LLM" };
}

function budget(counts, per) {
  const bars = svg("svg", { class: "budget", viewBox: `0 0 ${counts.length} 40`, preserveAspectRatio: "none", role: "img",
    "aria-label": `tokens kept per frame: ${counts.join(", ")}` });
  counts.forEach((count, frame) => bars.append(
    svg("rect", { class: "back", x: frame + 0.08, width: 0.84, y: 0, height: 40 }),
    svg("rect", { class: "level", x: frame + 0.08, width: 0.84, y: 40 - (40 * count) / per, height: (40 * count) / per }),
    svg("rect", { class: "hit", x: frame, width: 1, y: 0, height: 40, onclick: () => goTo(frame) })));
  return bars;
}

function goTo(frame) {
  $("frame").value = String(frame);
  redraw();
}

function redraw() {
  if (!chosen) return;
  const frame = Number($("frame").value), [t] = chosen.grid;
  const spacing = chosen.times.length ? Math.ceil(chosen.times.length / t) : 1;
  const seconds = chosen.times[frame * spacing];
  const text = `${frame + 1} of ${t}${seconds === undefined ? "" : `, ${seconds.toFixed(2)} s`}`;
  $("time").textContent = text;
  $("frame").setAttribute("aria-valuetext", `frame ${text}`);
  $("scale").hidden = !$("heat").checked || $("heat-choice").hidden;
  const uri = chosen.frames === null ? null : run.frames[chosen.frames][frame];
  if (uri && !pictures.has(uri)) {
    const image = new Image();
    image.addEventListener("load", redraw);
    image.src = uri;
    pictures.set(uri, image);
  }
  for (const one of cards) drawCard(one, frame, uri ? pictures.get(uri) : null);
}

function drawCard(one, frame, image) {
  const [t, h, w] = chosen.grid;
  if (one.counts) {
    const total = one.counts.reduce((a, b) => a + b, 0);
    one.caption.textContent = `${one.counts[frame]}/${one.per} here, ${total}/${t * one.per} in all${one.inside ? " behind the last cut" : ""}`;
    for (const kind of [".back", ".level"])
      one.bars.querySelectorAll(kind).forEach((bar, place) => bar.classList.toggle("now", place === frame));
  } else if (one.answer.retention !== null) one.caption.textContent = `kept ${percent(one.answer.retention)} %`;
  if (!one.canvas) return;
  const ready = image && image.complete && image.naturalWidth;
  const ratio = ready ? image.naturalHeight / image.naturalWidth : h / w || 0.75;
  const side = 480, tall = Math.round(side * ratio);
  Object.assign(one.canvas, { width: side, height: tall });
  const pen = one.canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
  if (ready) pen.drawImage(image, 0, 0, side, tall);
  else { pen.fillStyle = css.getPropertyValue("--cell"); pen.fillRect(0, 0, side, tall); }
  one.canvas.setAttribute("aria-label", `${one.name}, frame ${frame + 1}` + (one.counts ? `: ${one.counts[frame]} of ${one.per} tokens kept` : ""));
  if (!one.mask) return;
  const heat = $("heat").checked && one.scores;
  for (let cell = 0; cell < one.per; cell++) {
    const x = Math.round((side * (cell % w)) / w), y = Math.round((tall * Math.floor(cell / w)) / h);
    const wide = Math.round((side * ((cell % w) + 1)) / w) - x, high = Math.round((tall * (Math.floor(cell / w) + 1)) / h) - y;
    const kept = one.mask[frame * one.per + cell];
    if (heat) {
      pen.fillStyle = colour(one.scores[frame * one.per + cell] / 255, 0.62);
      pen.fillRect(x, y, wide, high);
    } else if (!kept) {
      pen.fillStyle = ready ? "rgba(0, 0, 0, 0.78)" : css.getPropertyValue("--gone");
      pen.fillRect(x, y, wide, high);
    }
    pen.lineWidth = 1;
    pen.strokeStyle = "rgba(255, 255, 255, 0.25)";
    pen.strokeRect(x + 0.5, y + 0.5, wide - 1, high - 1);
    if (heat && kept) {
      const inset = Math.max(1.5, Math.min(4, wide / 12));
      pen.lineWidth = inset + 1.5;
      pen.strokeStyle = "#000";
      pen.strokeRect(x + inset, y + inset, wide - 2 * inset, high - 2 * inset);
      pen.lineWidth = inset;
      pen.strokeStyle = "#fff";
      pen.strokeRect(x + inset, y + inset, wide - 2 * inset, high - 2 * inset);
    }
  }
}

function colour(share, alpha) {
  const place = share * (COLOURS.length - 1), low = Math.min(COLOURS.length - 2, Math.floor(place));
  const mixed = COLOURS[low].map((value, part) => Math.round(value + (COLOURS[low + 1][part] - value) * (place - low)));
  return `rgba(${mixed.join(",")},${alpha})`;
}

// --- start -----------------------------------------------------------------------------------------------------------

for (const id of ["family", "wrong", "differ", "ratio"]) $(id).addEventListener("change", filter);
$("sample").addEventListener("change", () => choose(Number($("sample").value)));
$("previous").addEventListener("click", () => choose(found.indexOf(chosen) - 1));
$("next").addEventListener("click", () => choose(found.indexOf(chosen) + 1));
$("frame").addEventListener("input", redraw);
$("heat").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
$("run").append(...runs.map((one, place) => el("option", { value: place }, one.name)));
$("run").addEventListener("change", () => show(Number($("run").value)));
$("run-choice").hidden = runs.length < 2;
$("frame").value = "0";
show(0);
