// Samples of a report: the frames of a question with what each method kept, and the answers.

const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const pictures = new Map();  // data URI -> Image
const FRAME_MS = 300;
let found = [], cards = [], timer = null;

function openSamples() {
  const tasks = [...new Set(run.samples.map((sample) => sample.task))];
  $("task").replaceChildren(el("option", { value: "" }, "all"), ...tasks.map((name) => el("option", {}, name)));
  $("task").parentElement.hidden = tasks.length < 2;
  const families = [...new Set(run.samples.map((sample) => sample.family))].filter(Boolean).sort();
  $("family").replaceChildren(el("option", { value: "" }, "all"), ...families.map((name) => el("option", {}, name)));
  $("family").parentElement.hidden = !families.length;
  const ratios = [...new Set(run.cells.filter((cell) => cell.kind !== "unpruned").map(budgetOf))];
  $("ratio").replaceChildren(...ratios.map((ratio) => el("option", {}, ratio)));
  $("ratio-choice").hidden = ratios.length < 2;
  $("filters").hidden = $("walk").hidden = run.samples.length < 2;
  $("wrong").checked = $("differ").checked = false;
  $("samples").hidden = !run.samples.length;
  pause();
  filter();
  if (chosen) goTo(Math.floor(chosen.grid[0] / 2));  // the first frame shows little: most methods keep all of it
}

const budgetOf = (cell) => (cell.equal_flops_to ? `FLOPs of ${cell.equal_flops_to}` : String(cell.ratio));
const shownCells = () => run.cells.filter((cell) => cell.kind === "unpruned" || budgetOf(cell) === $("ratio").value);

function filter() {
  const keys = shownCells().map((cell) => cell.key);
  const before = chosen;
  found = run.samples.filter((sample) => {
    const answers = keys.map((key) => sample.outcomes[key]).filter(Boolean);
    return (!$("family").value || sample.family === $("family").value) && (!$("task").value || sample.task === $("task").value)
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
  if (!chosen) return pause();
  $("sample").value = String(place);
  const facts = [["Question", chosen.question || "(not stored)"], ["Expected", chosen.answer], ["Family", chosen.family]];
  $("asked").replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
  const [t] = chosen.grid;
  $("frame").max = String(t - 1);
  if (Number($("frame").value) > t - 1) $("frame").value = "0";
  const kept = Object.values(chosen.kept), overlay = kept.length > 0;
  $("heat-choice").hidden = !kept.some((one) => one.scores);
  $("film").hidden = !overlay && chosen.frames === null;
  $("play").hidden = t < 2;
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
  const name = cell.kind === "unpruned" ? cell.title : `${cell.title} ${short(cell.ratio)}`;
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

function play() {
  timer = setInterval(() => goTo((Number($("frame").value) + 1) % chosen.grid[0]), FRAME_MS);
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-pressed", "true");
}

function pause() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", "false");
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
    const rank = heat ? one.scores[frame * one.per + cell] : 0;  // 0: gone before the stage that scored
    if (rank) {
      pen.fillStyle = colour((rank - 1) / 254, 0.62);
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

for (const id of ["part", "formula"]) $(id).addEventListener("change", redrawNumbers);
for (const id of ["task", "family", "wrong", "differ", "ratio"]) $(id).addEventListener("change", filter);
$("sample").addEventListener("change", () => choose(Number($("sample").value)));
$("previous").addEventListener("click", () => choose(found.indexOf(chosen) - 1));
$("next").addEventListener("click", () => choose(found.indexOf(chosen) + 1));
$("frame").addEventListener("input", () => { pause(); redraw(); });
$("play").addEventListener("click", () => (timer === null ? play() : pause()));
$("heat").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
$("run").append(...runs.map((one, place) => el("option", { value: place }, one.points ? `${one.name}, by frames` : one.name)));
$("run").addEventListener("change", () => show(Number($("run").value)));
$("run-choice").hidden = runs.length < 2;
show(0);
