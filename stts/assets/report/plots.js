// Plots of a report: accuracy over tokens, FLOPs and time, with what belongs to each point.

const PANELS = {
  ratios: [
    { title: "tokens per frame (mean over LLM layers)", value: (row) => row.kept_per_frame, beside: true },
    { title: "FLOPs per video (% of dense)", value: (row) => row.flops_share && 100 * row.flops_share },
    { title: "ms per sample", value: (row) => row.ms_per_sample },
  ],
  points: [
    { title: "visual tokens at the LLM", value: (row) => row.tokens, beside: true },
    { title: "FLOPs per question", value: (row) => row.flops_total, units: true },
    { title: "ms per sample", value: (row) => row.ms_per_sample },
  ],
};
// Ends of an interval, for places on an axis; a single video has none and gives the point itself.
const ends = (row) => [row.accuracy_low ?? row.accuracy, row.accuracy_high ?? row.accuracy];
const range = (low, high, write) => (low === null || low === undefined ? "[-]" : `[${write(low)}, ${write(high)}]`);
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
  const rows = shownRows().filter((row) => row.accuracy !== null && !hidden.has(row.method));
  $("panels").replaceChildren(...PANELS[run.points ? "points" : "ratios"].map((panel) => draw(panel, rows.filter((row) => panel.value(row) !== null))));
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
  const [size, unit] = panel.units ? unitOf(Math.max(...rows.map(panel.value))) : [1, ""];
  const value = (row) => panel.value(row) / size, title = unit + panel.title;
  const xs = rows.map(value);
  const log = Math.max(...xs) / Math.min(...xs) > 4;
  const pad = log ? [1 / 1.2, 1.2] : [0, 0];
  const spread = (Math.max(...xs) - Math.min(...xs)) || Math.max(...xs) || 1;
  const [x0, x1] = log ? [Math.min(...xs) * pad[0], Math.max(...xs) * pad[1]]
    : [Math.max(0, Math.min(...xs) - 0.12 * spread), Math.max(...xs) + 0.12 * spread];
  const y0 = Math.max(0, Math.floor(20 * Math.min(...rows.map((row) => ends(row)[0])) - 0.2) / 20);
  const y1 = Math.min(1, Math.ceil(20 * Math.max(...rows.map((row) => ends(row)[1])) + 0.2) / 20);
  const across = BOX.width - BOX.left - BOX.right, down = BOX.height - BOX.top - BOX.bottom;
  const share = (x) => (log ? Math.log(x / x0) / Math.log(x1 / x0) : (x - x0) / (x1 - x0));
  const X = (x) => BOX.left + across * share(x);
  const Y = (y) => BOX.top + down * (1 - (y - y0) / (y1 - y0));

  const picture = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "group",
    "aria-label": `accuracy over ${title}` });
  for (const tick of steps(100 * y0, 100 * y1, 5))
    picture.append(svg("line", { class: "grid", x1: BOX.left, x2: BOX.left + across, y1: Y(tick / 100), y2: Y(tick / 100) }),
      svg("text", { class: "axis", x: BOX.left - 6, y: Y(tick / 100) + 4, "text-anchor": "end" }, `${tick}`));
  const logTicks = [1, 2, 5].flatMap((n) => [-3, -2, -1, 0, 1, 2, 3, 4, 5].map((power) => n * 10 ** power)).sort((a, b) => a - b);
  for (const tick of log ? logTicks.filter((x) => x >= x0 && x <= x1) : steps(x0, x1, 5))
    picture.append(svg("line", { class: "grid", x1: X(tick), x2: X(tick), y1: BOX.top, y2: BOX.top + down }),
      svg("text", { class: "axis", x: X(tick), y: BOX.top + down + 18, "text-anchor": "middle" }, `${Number(tick.toPrecision(3))}`));
  picture.append(svg("text", { x: BOX.left + across / 2, y: BOX.height - 8, "text-anchor": "middle" },
    title + (log ? ", log scale" : "")), svg("text", { x: BOX.left, y: 17 }, "accuracy %"));

  const dense = rows.find((row) => row.method === "dense");
  if (dense)
    picture.append(
      svg("rect", { class: "band", x: BOX.left, width: across, y: Y(ends(dense)[1]),
        height: Y(ends(dense)[0]) - Y(ends(dense)[1]) }),
      svg("line", { class: "dense", x1: BOX.left, x2: BOX.left + across, y1: Y(dense.accuracy), y2: Y(dense.accuracy) }));
  // Methods at one budget would cover each other: where x is a budget, each is moved a little to the side.
  const methods = [...new Set(rows.filter((row) => row.kind !== "unpruned").map((row) => row.method))];
  const shift = (row) => (!panel.beside || row.kind === "unpruned" || methods.length < 2 ? 0
    : (methods.indexOf(row.method) / (methods.length - 1) - 0.5) * Math.min(36, 7 * (methods.length - 1)));
  const at = (row) => [X(value(row)) + shift(row), Y(row.accuracy)];
  picture.append(svg("path", { class: "front", d: front(rows, panel, at) }));
  for (const [, curve] of curves(rows, panel))
    picture.append(paint(svg("path", { class: "curve", d: "M" + curve.map(at).join("L") }), curve[0].method));
  const tip = el("div", { class: "tip", hidden: true });
  const points = [...rows].sort((a, b) => at(a)[0] - at(b)[0]).map((row) => point(row, at(row), panel, Y, methods.length));
  picture.append(...points);
  holder.append(picture, tip);
  walkable(holder, picture, points, tip);
  return holder;
}

// A line joins what differs in budget: ratios of a method or, where rows differ in frames, frames of a method at one ratio.
function curves(rows, panel) {
  const found = new Map();
  for (const row of [...rows].sort((a, b) => panel.value(a) - panel.value(b))) {
    if (!run.points && (row.kind === "unpruned" || row.equal_flops_to)) continue;
    const name = !run.points || run.budget ? row.method : label(row);
    found.set(name, [...(found.get(name) ?? []), row]);
  }
  return found;
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
    (row.kind === "unpruned" ? row.method : `${row.method}, kept ${short(row.retention_configured)}`)
      + (run.points ? `, ${row.num_frames} frames` : "") + (row.equal_flops_to ? `\nat the FLOPs of ${row.equal_flops_to}` : ""),
    `accuracy ${percent(row.accuracy)} % ${range(row.accuracy_low, row.accuracy_high, percent)}`,
    ...(row.difference === null ? [] : [`vs ${run.points ? "first " : ""}dense ${signed(row.difference)} ${range(row.difference_low, row.difference_high, signed)}`]),
    `${panel.title}: ${(panel.units ? scaled : short)(panel.value(row))}`,
  ].join("\n");
  const bar = panel.beside ? [svg("line", { class: "bar", opacity: Math.min(0.55, 4 / (crowd || 1)),  // many bars fade
    x1: 0, x2: 0, y1: Y(ends(row)[0]) - y, y2: Y(ends(row)[1]) - y })] : [];
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

