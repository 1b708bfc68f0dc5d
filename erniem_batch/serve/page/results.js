// Reads the JSONL that a batch run wrote and shows it row by row. All of it happens here: no
// request.

import { count, el, fitting, view } from "./render.js";

const ROWS = 25;
const BROKEN = "broken"; // in the list of labels, which begin with = there
const MAX_SHOWN = 2000;
const SLICE_MS = 25; // so long may work go on before the page gets a turn
const COLUMNS = {
  ner: ["entities"],
  extract: ["extracted"],
  qa: ["predicted_answers", "predicted_answer"],
  choose: ["choice_scores", "predicted_choice"],
  classify: ["label_scores", "predicted_label"],
  embed: ["embedding"],
};
const TEXT_OF = { qa: "context", choose: "premise" };

const $ = (id) => document.getElementById(id);
const isRow = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

// Lines stay text and are parsed again when they are shown: objects take several times the room.
let rows = []; // { line, number, labels, broken }
let matches = [];
let first = 0;
let turn = 0; // of reading and searching: what is out of date stops

/** Makes the controls of the file view work. */
export function startFileView() {
  $("open").addEventListener("change", () => {
    if ($("open").files[0]) openFile($("open").files[0]);
    $("open").value = ""; // so that the same file can be chosen again
  });
  $("close").addEventListener("click", () => {
    close();
    $("file-title").focus();
  });
  let timer;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(select, 200);
  });
  $("filter").addEventListener("change", select);
  for (const id of ["unit", "column"]) $(id).addEventListener("change", show);
  $("previous").addEventListener("click", () => turnTo(first - ROWS));
  $("next").addEventListener("click", () => turnTo(first + ROWS));
}

/** Shows a file. */
export async function openFile(file) {
  close();
  const mine = ++turn;
  $("close").hidden = false;
  $("file-title").focus();
  $("file").scrollIntoView({ block: "start" });
  let empty = 0;
  let part = "";
  try {
    for await (const [line, number, done] of linesOf(file)) {
      if (mine !== turn) return;
      if (!line.trim()) empty += 1;
      else rows.push(rowOf(line, number));
      if (await pause()) $("file-status").textContent = `Reading ${file.name}: ${percent(done)}`;
    }
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof FileError) {
      $("file-status").textContent = `${file.name}: ${error.message}.`;
      return;
    }
    part = "It could not be read to its end. "; // such as a .gz that was cut off
  }
  if (mine !== turn) return;
  const broken = rows.filter((row) => row.broken).length;
  $("file-status").textContent = part + [
    `${file.name}: ${count(rows.length - broken, "row")}`,
    broken ? `${count(broken, "line")} that ${
      broken === 1 ? "is no JSON object" : "are not JSON objects"}` : null,
    empty ? count(empty, "empty line") : null,
  ].filter(Boolean).join(", ");
  fillFilter();
  fillColumns();
  $("file-tools").hidden = rows.length === 0;
  await select();
}

function close() {
  turn += 1;
  rows = [];
  matches = [];
  for (const id of ["close", "file-tools", "pages"]) $(id).hidden = true;
  for (const id of ["file-status", "rows"]) $(id).replaceChildren();
  $("search").value = "";
  $("unit").value = "codepoint"; // as a batch run counts unless told otherwise
}

// ---- reading ------------------------------------------------------------------------------------

class FileError extends Error {}

/** Lines with their numbers and how much has been read, while the file is being read. */
async function* linesOf(file) {
  let done = 0;
  const counted = new TransformStream({
    transform(bytes, out) {
      done += bytes.byteLength;
      out.enqueue(bytes);
    },
  });
  let stream = file.stream().pipeThrough(counted);
  if (/\.gz$/i.test(file.name)) stream = stream.pipeThrough(new DecompressionStream("gzip"));
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  const pieces = []; // of a line that has not ended
  let number = 0;
  try {
    for (let part; !(part = await reader.read()).done; ) {
      if (number === 0 && part.value.startsWith("PAR1")) {
        throw new FileError("this is Parquet, which browsers do not read; a run with "
          + "--output-format jsonl writes JSONL");
      }
      const lines = part.value.split("\n");
      for (const line of lines.slice(0, -1)) {
        pieces.push(line);
        yield [pieces.splice(0).join(""), ++number, done / file.size];
      }
      pieces.push(lines.at(-1));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  const last = pieces.join("");
  if (last) yield [last, ++number, 1];
}

let resumed = 0;

/** Now and then gives the page a turn, and says so. */
async function pause() {
  if (performance.now() - resumed < SLICE_MS) return false;
  await new Promise((resume) => setTimeout(resume));
  resumed = performance.now();
  return true;
}

const percent = (part) => `${Math.floor(100 * part)} %`;

/** The value of a line; undefined: it is no JSON object. */
function valueOf(line) {
  try {
    const value = JSON.parse(line);
    return isRow(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

function rowOf(line, number) {
  const value = valueOf(line);
  if (value === undefined) return { line, number, broken: true, labels: [] };
  return { line, number, broken: false, labels: labelsOf(value).map(shared) };
}

// Equal labels of all rows are one string in memory.
const strings = new Map();
function shared(label) {
  if (!strings.has(label)) strings.set(label, label);
  return strings.get(label);
}

const taskOf = (value) =>
  Object.keys(COLUMNS).find((task) => COLUMNS[task].some((name) => name in value));

function labelsOf(value) {
  const names = (items, key) =>
    (Array.isArray(items) ? items : []).map((item) => String(item?.[key]));
  switch (taskOf(value)) {
    case "ner": return [...new Set(names(value.entities, "label"))];
    case "extract": return [...new Set(names(value.extracted, "name"))];
    case "classify": return [String(value.predicted_label ?? "no label")];
    case "choose": return [value.predicted_choice === null ? "no choice"
      : `choice ${value.predicted_choice}`];
    case "qa": return [value.predicted_answer === null ? "no answer" : "answer"];
    default: return [];
  }
}

// ---- choosing -----------------------------------------------------------------------------------

function fillFilter() {
  const counts = new Map();
  for (const { labels } of rows) for (const l of labels) counts.set(l, (counts.get(l) ?? 0) + 1);
  const broken = rows.filter((row) => row.broken).length;
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  $("filter").replaceChildren(el("option", { value: "" }, "all rows"),
    ...(broken ? [el("option", { value: BROKEN }, `not JSON (${broken})`)] : []),
    ...sorted.map(([label, n]) => el("option", { value: `=${label}` }, `${label} (${n})`)));
}

function fillColumns() {
  const names = new Set();
  for (const row of rows.filter(({ broken }) => !broken).slice(0, 100)) {
    const value = valueOf(row.line);
    for (const name of stringColumns(value)) names.add(name);
  }
  $("column").replaceChildren(el("option", { value: "" }, "automatic"),
    ...[...names].map((name) => el("option", { value: name }, name)));
}

/** Columns that hold strings, also within others: doc.body. */
function stringColumns(value, before = "", depth = 3) {
  return Object.entries(value).flatMap(([key, inner]) => {
    if (typeof inner === "string") return [before + key];
    return isRow(inner) && depth > 1 ? stringColumns(inner, `${before}${key}.`, depth - 1) : [];
  });
}

function columnOf(value, name) {
  if (typeof value[name] === "string") return value[name];
  return name.split(".").reduce((inner, key) => (isRow(inner) ? inner[key] : undefined), value);
}

/** Finds the rows that are asked for. */
async function select() {
  const mine = ++turn;
  const label = $("filter").value;
  const words = $("search").value.trim().toLowerCase();
  const found = [];
  for (const row of rows) {
    if (label === BROKEN ? !row.broken : label && !row.labels.includes(label.slice(1))) continue;
    if (!words || contains(row, words)) found.push(row);
    if (words) await pause();
    if (mine !== turn) return;
  }
  matches = found;
  first = 0;
  show();
}

/** Whether a value of the row holds the words; its column names do not count. */
function contains(row, words) {
  const within = (value) => (typeof value === "string" ? value.toLowerCase().includes(words)
    : typeof value === "object" && value !== null && Object.values(value).some(within));
  return within(row.broken ? row.line : valueOf(row.line));
}

// ---- showing ------------------------------------------------------------------------------------

function turnTo(place) {
  first = place;
  show();
  $("file").scrollIntoView({ block: "start" });
}

function show() {
  const some = matches.slice(first, first + ROWS);
  $("rows").replaceChildren(...some.map(card));
  if (rows.length && !some.length) $("rows").append(el("p", { class: "hint" }, "No such lines."));
  $("pages").hidden = some.length === 0;
  $("place").textContent = `${(first + 1).toLocaleString("en")}–`
    + `${(first + some.length).toLocaleString("en")} of ${count(matches.length, "line")}`;
  $("previous").disabled = first === 0;
  $("next").disabled = first + ROWS >= matches.length;
}

function card(row) {
  const value = row.broken ? null : valueOf(row.line);
  const id = typeof value?.id === "string" || typeof value?.id === "number" ? ` · ${value.id}` : "";
  const title = el("h3", {}, `Line ${row.number.toLocaleString("en")}${id}`);
  if (row.broken) {
    return el("article", { class: "item" }, title,
      el("p", { class: "warn" }, "This line is not a JSON object."),
      el("pre", {}, shortened(row.line)));
  }
  return el("article", { class: "item" }, title, ...shownRow(value), allColumns(value));
}

function shownRow(value) {
  const task = taskOf(value);
  if (!task) return [el("p", { class: "hint" }, "This row has no results of a known task.")];
  try {
    const text = textOf(task, value);
    return view(task, { ...value, [TEXT_OF[task] ?? "text"]: text }, $("unit").value, true);
  } catch {
    return [el("p", { class: "warn" }, "This row does not look like one of a batch run.")];
  }
}

/** The text of a row: the column that was chosen, the usual one, or the first in which all fits. */
function textOf(task, value) {
  const chosen = $("column").value;
  if (chosen) return columnOf(value, chosen);
  const usual = value[TEXT_OF[task] ?? "text"];
  if (typeof usual === "string") return usual;
  const { entities, extracted, predicted_answers: answers } = value;
  const spans = [entities, extracted, answers].find(Array.isArray) ?? [];
  const texts = stringColumns(value).map((name) => columnOf(value, name));
  const placed = spans.filter((span) => Number.isInteger(span?.start));
  return texts.find((text) => fitting(text, placed, $("unit").value).misfits === 0) ?? "";
}

function allColumns(value) {
  const node = el("details", {}, el("summary", {}, "All columns"));
  // Filled when it is opened: vectors are long.
  node.addEventListener("toggle", () => {
    if (!node.querySelector("pre")) node.append(el("pre", {}, JSON.stringify(value, null, 2)));
  });
  return node;
}

const shortened = (line) =>
  line.length > MAX_SHOWN ? `${line.slice(0, MAX_SHOWN)}… (${line.length} characters)` : line;
