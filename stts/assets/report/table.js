// The table of a report: accuracy and cost of every method, sorted by any column.

const interval = (value, low, high, write) => (low === null || low === undefined ? [write(value), " ", el("small", {}, "[-]")]
  : [write(value), " ", el("small", {}, `[${write(low)}, ${write(high)}]`)]);
const METHOD = { name: "method", value: (row) => row.method, words: true };
const KEPT = { name: "kept", value: (row) => row.retention_configured, write: short };
const ACCURACY = { name: "accuracy %", value: (row) => row.accuracy,
  cell: (row) => interval(row.accuracy, row.accuracy_low, row.accuracy_high, percent) };
const difference = { get name() { return run.points ? "vs first dense" : "vs dense"; }, value: (row) => row.difference,
  cell: (row) => interval(row.difference, row.difference_low, row.difference_high, signed) };
const WHERE = { name: "drops tokens", value: (row) => (row.kind === "unpruned" ? "nowhere" : row.kind), words: true };
// Where rows differ in frames or parts.
const FRAMES = { name: "frames", value: (row) => (run.points ? row.num_frames : null), optional: true,
  cell: (row) => [row.parts > 1 ? `${row.parts} x ${row.num_frames / row.parts}` : String(row.num_frames)] };
const TOKENS = { name: "tokens", value: (row) => (run.points ? row.tokens : null), write: (value) => value.toFixed(0),
  hint: "visual tokens at the LLM", optional: true };
// While an answer is decoded: a value, and beside it the share of dense.
const decoding = (name, field, size, share, hint) => ({ name, hint, optional: true,
  value: (row) => row.decode?.[field] ?? null,
  cell: (row) => [short(row.decode[field] / size),
    ...(row.decode[share] === undefined ? [] : [" ", el("small", {}, `[${percent(row.decode[share])} %]`)])] });
const COLUMNS = [METHOD, FRAMES, KEPT, ACCURACY, difference, TOKENS,
    { name: "measured", value: (row) => row.retention_measured, write: (value) => value.toFixed(3) },
    { name: "tokens/frame", value: (row) => row.kept_per_frame, write: short },
    { name: "evidence %", value: (row) => row.evidence_kept ?? null, write: percent, optional: true,
      hint: "tokens kept of those that show evidence, beyond the first frame" },
    { name: "distractors %", value: (row) => row.distractors_kept ?? null, write: percent, optional: true,
      hint: "tokens kept of those that show what no question is about, beyond the first frame" },
    { name: "FLOPs", value: (row) => row.flops_total, write: scaled },
    { name: "of dense", value: (row) => row.flops_share, write: (value) => `${percent(value)} %` },
    { name: "ms/sample", value: (row) => row.ms_per_sample, write: (value) => value.toFixed(1) },
    { name: "TTFT ms", value: (row) => row.time_ms?.ttft ?? null, write: (value) => value.toFixed(1),
      hint: "time to first token: ViT, pruner, connector and prefill", optional: true },
    decoding("decode MFLOPs", "flops", 1e6, "flops_share",
      "attention to the videos for each new token, per video; in brackets: share of dense"),
    decoding("cache MiB", "cache_bytes", 2 ** 20, "cache_share",
      "keys and values of a video that stay in memory; in brackets: share of dense"),
    { name: "peak GiB", value: (row) => row.peak_gib ?? null, write: (value) => value.toFixed(2), optional: true },
    { name: "retained %", value: (row) => row.retained, write: percent, hint: "mean headline score over that of dense", optional: true },
    { name: "p", value: (row) => row.p_value, write: (value) => (value < 0.001 ? "<0.001" : value.toFixed(3)),
      hint: "exact McNemar test against dense, same questions", optional: true },
    { name: "unparsed", value: (row) => row.num_unparsed || null, hint: "answers without an option: counted as wrong", optional: true },
    WHERE];
const shownColumns = (rows) => COLUMNS.filter(
  (column) => !column.optional || rows.some((row) => (column.value(row) ?? null) !== null));

// What the table and the plots show: all questions, those of one task or those of one family; FLOPs by one formula.
function shownRows() {
  const [kind, name] = [$("part").value.slice(0, 1), $("part").value.slice(1)], formula = $("formula").value;
  return run.rows.map((row) => {
    let part = row;
    if (kind && row.reason === null) {
      const found = (kind === "t" ? row.tasks : row.families)?.[name];
      part = { ...row, accuracy: null, difference: null, retained: null, num_unparsed: null, p_value: null, ...found };
    }
    const counted = part.flops?.[formula];
    return counted ? { ...part, flops_total: counted.total, flops_share: counted.share ?? null } : part;
  });
}

function openChoices() {
  const done = run.rows.filter((row) => row.reason === null);
  const names = (field) => [...new Set(done.flatMap((row) => Object.keys(row[field] ?? {})))];
  const tasks = names("tasks"), families = names("families"), formulas = names("flops");
  const group = (label, mark, found) => (found.length < 2 ? []
    : [el("optgroup", { label }, ...found.map((name) => el("option", { value: mark + name }, name)))]);
  $("part").replaceChildren(el("option", { value: "" }, tasks.length > 1 ? "mean of tasks" : "all"),
    ...group("one task", "t", tasks), ...group("one family", "f", families));
  $("part").parentElement.hidden = $("part").options.length < 2;
  $("formula").replaceChildren(...formulas.map((name) => el("option", {}, name)));
  $("formula").parentElement.hidden = formulas.length < 2;
  $("choices").hidden = $("part").parentElement.hidden && $("formula").parentElement.hidden;
}

function table() {
  const rows = shownRows(), columns = shownColumns(rows);
  const head = el("tr", {}, ...columns.map((column) => el("th", {
    scope: "col", class: column.words ? "words" : null,
    "aria-sort": order.column === column ? (order.down ? "descending" : "ascending") : null,
  }, el("button", { type: "button", title: column.hint ?? null, onclick: () => sortBy(column) }, column.name))));
  if (order.column) rows.sort((a, b) => compare(order.column.value(a) ?? null, order.column.value(b) ?? null));
  $("table").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows.map((row) => line(row, columns))));
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
  $("table").querySelectorAll("thead button")[shownColumns(shownRows()).indexOf(column)].focus();
}

function line(row, columns) {
  const name = el("th", { scope: "row" }, row.method,
    ...(row.equal_flops_to ? [el("small", {}, ` at the FLOPs of ${row.equal_flops_to}`)] : []));
  const known = columns.findIndex((column) => column === ACCURACY);  // what is told of a row that was not run
  const told = row.reason === null ? columns : columns.slice(0, known);
  const cells = told.slice(1).map((column) => {
    const value = column.value(row) ?? null;
    const shown = value === null ? ["-"] : column.cell ? column.cell(row) : [column.write ? column.write(value) : value];
    return el("td", { class: column.words ? "words" : null }, ...shown);
  });
  if (row.reason !== null)
    cells.push(el("td", { colspan: columns.length - told.length, class: "reason" }, `not run: ${row.reason}`));
  return el("tr", {}, name, ...cells);
}

// --- where the time goes ---------------------------------------------------------------------------------------------

const PHASES = { video: "read video", preprocess: "preprocess", vit: "ViT", prune: "pruner", connect: "connector",
  prefill: "prefill", decode: "decode", generate: "generate" };
// Where the parts of `generate` were not timed one by one, it is one bar.
const phase = (row, name) => row.time_ms?.[name] ?? (name === "generate" && !row.time_ms?.prefill ? row.ms_per_sample : null) ?? 0;

function times() {
  const total = (row) => Object.keys(PHASES).reduce((sum, name) => sum + phase(row, name), 0);
  const rows = run.rows.filter((row) => row.reason === null && total(row));
  const present = Object.keys(PHASES).filter((name) => rows.some((row) => phase(row, name)));
  $("times").hidden = present.length < 2;
  if (present.length < 2) return;
  const longest = Math.max(...rows.map(total));
  $("phases").replaceChildren(...present.map((name) => el("span", {}, el("i", { class: `phase ${name}` }), ` ${PHASES[name]}`)));
  $("bars").replaceChildren(...rows.map((row) => {
    const told = present.map((name) => `${PHASES[name]} ${phase(row, name).toFixed(1)} ms`).join(", ");
    const bar = el("div", { class: "stack", role: "img", "aria-label": told, title: told },
      ...present.map((name) => el("i", { class: `phase ${name}` })));
    present.forEach((name, place) => { bar.children[place].style.width = `${(100 * phase(row, name)) / longest}%`; });
    return el("tr", {}, el("th", { scope: "row" }, label(row)), el("td", { class: "wide" }, bar), el("td", {}, `${total(row).toFixed(1)} ms`));
  }));
}
