// The form: what may be asked, asking it, and what came back. How results look is in render.js.

import { examplesOf } from "./examples.js";
import { count, el, saysItself, summary, view } from "./render.js";
import { openFile, startFileView } from "./results.js";

const $ = (id) => document.getElementById(id);
const MAX_TEXT_FILE = 4 << 20; // as much as the service takes at a time, unless told otherwise
const COPIED_MS = 2500;
const LONGEST_ARGUMENT = 100_000; // Linux takes 128 KiB in one

// ---- what may be asked --------------------------------------------------------------------------

// Fields of the form. `text`: what people bring, which never goes into the address. `read`: the
// value for the request; undefined: not sent, so that it is as the service was told.
const TEXT = { name: "text", label: "Text", kind: "area", text: true, large: true };
const MIN_SCORE = { name: "min_score", label: "Lowest score", kind: "number", min: 0, max: 1,
  step: 0.05, placeholder: "as recommended" };
const TOP_K = (initial) => ({ name: "top_k", label: "How many", kind: "number", min: 1, step: 1,
  initial });
const choice = (name, label, ...choices) => ({ name, label, kind: "select", choices });

const TASKS = {
  ner: {
    name: "Entities",
    about: "Names of persons, places and organizations, coloured where they stand.",
    inputs: [TEXT],
    options: [
      choice("aggregation_strategy", "Tokens become entities", ["", "as the service is set"],
        ["simple", "simple: neighbours of one kind"], ["first", "first token of a word"],
        ["average", "average of a word"], ["max", "best token of a word"], ["none", "not at all"]),
      MIN_SCORE,
    ],
  },
  extract: {
    name: "Extraction",
    about: "Whatever you name, and what you want to know about each thing found.",
    inputs: [TEXT, { name: "schema", label: "What to extract", kind: "area", code: true,
      hint: "Names with commas, JSON or YAML: {Person: [Employer]} asks about each person.",
      initial: '[{"Person": ["Place of birth"]}, "Location", "Organization"]' }],
    options: [
      { ...choice("schema_lang", "Prompts are in", ["en", "English"], ["zh", "Chinese"]),
        initial: "en" },
      choice("span_pairing", "Starts and ends become spans", ["", "as the service is set"],
        ["nearest", "nearest"], ["nested", "also within each other"], ["all", "all"]),
      MIN_SCORE,
    ],
  },
  classify: {
    name: "Labels",
    about: "The label of a whole text, with the others behind it.",
    inputs: [TEXT],
    options: [
      TOP_K("5"),
      { name: "candidate_labels", label: "Labels to choose from", kind: "line", wide: true,
        hint: "With commas between them; for models that were trained for entailment.",
        read: (value) => (listOf(value).length ? listOf(value) : undefined) },
      { name: "multi_label", label: "Several of them may be true", kind: "check", wide: true,
        read: (on, value) => (on && listOf(value("candidate_labels")).length ? true : undefined) },
    ],
  },
  qa: {
    name: "Answers",
    about: "The answer to a question, where it stands in a text.",
    inputs: [
      { name: "question", label: "Question", kind: "line", text: true },
      { name: "context", label: "Text", kind: "area", text: true, large: true },
    ],
    options: [
      TOP_K("3"),
      { name: "null_threshold", label: "There may be no answer", kind: "check", wide: true,
        read: (on) => (on ? 0 : undefined) },
    ],
  },
  choose: {
    name: "Choices",
    about: "Which of several sentences goes best with a premise.",
    inputs: [
      { name: "premise", label: "Premise", kind: "area", text: true },
      { name: "choices", label: "Choices, one a line", kind: "area", text: true },
      choice("question_kind", "The choice is", ["", "what goes with it"], ["cause", "its cause"],
        ["effect", "its effect"]),
    ],
    options: [],
  },
  embed: {
    name: "Similarity",
    about: "How close two texts are in meaning, also across languages.",
    inputs: [
      { ...TEXT, label: "First text", large: false },
      { name: "second", label: "Second text", kind: "area", text: true, optional: true },
    ],
    // Not pooling: that is decided when a model is loaded.
    options: [{ name: "dimensions", label: "Keep the first numbers only", kind: "number", min: 1,
      step: 1, placeholder: "all" }],
  },
};

const listOf = (value) => value.split(/[,，、\n]/).map((part) => part.trim()).filter(Boolean);

// Each takes the function that gives the value of a field.
const INPUTS = {
  ner: (value) => ({ text: value("text") }),
  classify: (value) => ({ text: value("text") }),
  extract: (value) => ({ text: value("text") }),
  qa: (value) => ({ question: value("question"), context: value("context") }),
  choose: (value) => ({
    premise: value("premise"),
    choices: value("choices").split("\n").map((line) => line.trim()).filter(Boolean),
    ...(value("question_kind") ? { question: value("question_kind") } : {}),
  }),
  embed: (value) => [value("text"), value("second")].filter((text, i) => i === 0 || text)
    .map((text) => ({ text })),
};
// JavaScript's strings are UTF-16: with other units, colours move after the first emoji.
const WITH_PLACES = new Set(["ner", "extract", "qa"]);

// ---- state --------------------------------------------------------------------------------------

const values = new Map(); // of fields, kept while another task is looked at
let models = [];
let task = "ner";
let running = null; // the AbortController of the request on the way
let last = null; // the request that was answered last, for the copies

// Texts are one for all tasks that have them; options are of one task.
const keyOf = (field) => (field.text ? field.name : `${task}.${field.name}`);
const fieldsOf = (name) => [...TASKS[name].inputs, ...TASKS[name].options];
const initialOf = (field) => field.initial ?? (field.kind === "check" ? false : "");
const valueOf = (field) => values.get(keyOf(field)) ?? initialOf(field);
const isInitial = (field) => valueOf(field) === initialOf(field);
const valueNamed = (name) => valueOf(fieldsOf(task).find((field) => field.name === name));

/** Task, model and options in the address, so that it can be passed on; never a text. */
function writeAddress() {
  const state = new URLSearchParams({ task });
  if (models.length > 1) state.set("model", $("model").value);
  for (const field of fieldsOf(task)) {
    if (!field.text && !isInitial(field)) state.set(field.name, String(valueOf(field)));
  }
  history.replaceState(null, "", `#${state}`);
}

function readAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  if (served().includes(state.get("task"))) task = state.get("task");
  for (const field of fieldsOf(task)) {
    const value = state.get(field.name);
    if (field.text || !state.has("task")) continue;
    const known = field.kind !== "select" || field.choices.some(([name]) => name === value);
    if (value === null || !known) values.delete(keyOf(field));
    else values.set(keyOf(field), field.kind === "check" ? value === "true" : value);
  }
  return state.get("model");
}

// ---- the form -----------------------------------------------------------------------------------

const served = () =>
  Object.keys(TASKS).filter((name) => models.some((model) => model.tasks.includes(name)));

function showForm(wanted) {
  $("tasks").replaceChildren(...served().map((name) => {
    const radio = el("input", { class: "hidden", type: "radio", name: "task", value: name });
    radio.checked = name === task;
    radio.addEventListener("change", () => chooseTask(name));
    return el("label", {}, radio, el("span", {}, TASKS[name].name));
  }));
  showTask(wanted);
  $("form").hidden = false;
}

function chooseTask(name) {
  running?.abort(); // its answer would stand under another task
  running = null;
  setBusy(false);
  task = name;
  clearResult();
  showTask($("model").value);
  writeAddress();
}

function showTask(wanted) {
  const able = models.filter((model) => model.tasks.includes(task)).map((model) => model.id);
  $("model").replaceChildren(...able.map((id) => el("option", {}, id)));
  if (able.includes(wanted)) $("model").value = wanted;
  $("model-field").hidden = models.length < 2;
  $("about").textContent = TASKS[task].about;
  $("inputs").replaceChildren(...TASKS[task].inputs.map(fieldNode));
  $("options").replaceChildren(...TASKS[task].options.map(fieldNode));
  $("more").hidden = TASKS[task].options.length === 0;
  // Options that are not as they were at first are not to be overlooked.
  if (!TASKS[task].options.every(isInitial)) $("more").open = true;
  $("examples").replaceChildren(...examplesOf(task).map((example) => {
    const button = el("button", { type: "button", lang: example.lang },
      el("bdi", {}, example.name));
    button.addEventListener("click", () => runExample(example));
    return el("li", {}, button);
  }));
}

const idOf = (name) => `field-${name}`;

function fieldNode(field) {
  const id = idOf(field.name);
  const hint = field.hint ? `${id}-hint` : null;
  const control = controlOf(field, { id, "aria-describedby": hint });
  if (field.kind === "check") control.checked = valueOf(field);
  else control.value = valueOf(field);
  control.addEventListener("input", () => {
    values.set(keyOf(field), field.kind === "check" ? control.checked : control.value);
    control.removeAttribute("aria-invalid");
    if (!field.text) writeAddress();
  });
  const label = el("label", { for: id }, field.label);
  const wide = field.wide ? " wide" : "";
  if (field.kind === "check") return el("div", { class: `check${wide}` }, control, label);
  return el("div", { class: `field${wide}` }, label, control,
    hint ? el("p", { class: "hint", id: hint }, field.hint) : null);
}

function controlOf(field, attributes) {
  const { min, max, step, placeholder } = field;
  switch (field.kind) {
    case "area": return el("textarea", { ...attributes, dir: "auto", spellcheck: "false",
      class: [field.large && "large", field.code && "code"].filter(Boolean).join(" ") });
    case "select": return el("select", attributes,
      ...field.choices.map(([value, name]) => el("option", { value }, name)));
    case "check": return el("input", { ...attributes, type: "checkbox" });
    case "number":
      return el("input", { ...attributes, type: "number", min, max, step, placeholder });
    default: return el("input", { ...attributes, type: "text", dir: "auto", autocomplete: "off" });
  }
}

function runExample(example) {
  for (const field of fieldsOf(task)) {
    if (field.name in example.values) values.set(keyOf(field), example.values[field.name]);
  }
  showTask($("model").value);
  writeAddress();
  run();
}

// ---- asking -------------------------------------------------------------------------------------

/** An error that is shown, perhaps at a field. */
class Refusal extends Error {
  constructor(message, { field = null, small = "" } = {}) {
    super(message);
    this.field = field;
    this.small = small;
  }
}

/** The body of the request; raises a Refusal where it is clear that there is nothing to ask. */
function requestBody() {
  for (const field of fieldsOf(task)) {
    if (field.text && !field.optional && !valueOf(field).trim()) {
      throw new Refusal(`“${field.label}” is empty.`, { field: field.name });
    }
    if ($(idOf(field.name)).validity.badInput) {
      throw new Refusal(`“${field.label}” is not a number.`, { field: field.name });
    }
  }
  const options = WITH_PLACES.has(task) ? { offset_unit: "utf16" } : {};
  for (const field of TASKS[task].options) {
    const value = sentValue(field);
    if (value !== undefined) options[field.name] = value;
  }
  if (task === "extract" && valueNamed("schema").trim()) options.schema = schemaOf();
  const body = { inputs: INPUTS[task](valueNamed), options };
  if (models.length > 1) body.model = $("model").value;
  return body;
}

function sentValue(field) {
  const value = valueOf(field);
  if (field.read) return field.read(value, valueNamed);
  if (value === "" || value === false) return undefined;
  return field.kind === "number" ? Number(value) : value;
}

/** JSON as such; all else as text, which the service reads as YAML or names with commas. */
function schemaOf() {
  const text = valueNamed("schema");
  try {
    const value = JSON.parse(text);
    return typeof value === "object" ? value : text;
  } catch {
    return text;
  }
}

async function run() {
  running?.abort();
  const mine = (running = new AbortController());
  let body;
  try {
    body = requestBody();
  } catch (error) {
    clearResult();
    showRefusal(error);
    return;
  }
  const asked = { task, body, text: JSON.stringify(body), url: addressOf(`v1/${task}`) };
  setBusy(true);
  try {
    const answer = await ask(asked.url, { method: "POST", body: asked.text,
      headers: { "Content-Type": "application/json" }, signal: mine.signal });
    if (mine === running) showAnswer(asked, answer);
  } catch (error) {
    if (mine === running) {
      clearResult();
      showCopies({ ...asked, content: error.content });
      showRefusal(error);
    }
  } finally {
    if (mine === running) setBusy(false);
  }
}

// Relative to the page, so that the service may stand behind a path of a proxy.
const addressOf = (path) => new URL(path, document.baseURI.replace(/#.*/, "")).href;

/** What the service answers; raises a Refusal if it is an error. */
async function ask(url, init = {}) {
  const headers = { ...init.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const started = performance.now();
  let response;
  let content;
  try {
    response = await fetch(url, { ...init, headers });
    content = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service does not answer.", { small: "Is it still running?" });
  }
  const ms = performance.now() - started;
  try {
    content = JSON.parse(content);
  } catch {
    throw new Refusal(`The service answered ${response.status}, and not in JSON.`);
  }
  if (response.ok) return { content, ms, timing: response.headers.get("Server-Timing") ?? "" };
  throw Object.assign(refusalOf(response, content?.error ?? {}), { content });
}

function refusalOf(response, error) {
  const message = [error.message ?? "The service refused."];
  const retry = retryTime(response.headers.get("Retry-After"));
  if (retry) message.push(retry);
  if (response.status === 401) askForToken();
  const small = [`${response.status} ${error.code ?? ""}`, error.param && `field ${error.param}`,
    error.request_id && `request ${error.request_id}`].filter(Boolean).join(" · ");
  return new Refusal(message.join(" "), { field: fieldOf(error), small });
}

/** When to try again, from a number of seconds or a date. */
function retryTime(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  if (!Number.isFinite(seconds)) return null;
  const at = new Date(Date.now() + 1000 * Math.max(0, seconds)).toLocaleTimeString();
  return `Try again in ${Math.max(0, Math.ceil(seconds))} s, at ${at}.`;
}

/** The field of the form that the service complains of. */
function fieldOf(error) {
  const names = fieldsOf(task).map((field) => field.name);
  const param = String(error.param ?? "");
  if (param.startsWith("inputs.1") && names.includes("second")) return "second";
  if (/\.question$/.test(param) && names.includes("question_kind")) return "question_kind";
  const place = param.split(".").reverse().find((part) => names.includes(part));
  if (place || param !== "options") return place ?? null;
  // Options that do not go together are named in the message.
  return names.find((name) => new RegExp(`\\b${name}\\b`).test(error.message ?? "")) ?? null;
}

// ---- the token ----------------------------------------------------------------------------------

const TOKEN = "erniem-token";
let kept = ""; // where a browser has no storage

function token() {
  try {
    return sessionStorage.getItem(TOKEN) ?? kept;
  } catch {
    return kept;
  }
}

function keepToken(value) {
  kept = value;
  try {
    sessionStorage.setItem(TOKEN, value);
  } catch { /* it is kept until the page goes */ }
}

function askForToken() {
  $("token-form").hidden = false;
  $("token").focus();
}

// ---- what came back -----------------------------------------------------------------------------

function setBusy(busy) {
  $("run").setAttribute("aria-busy", String(busy));
  $("run").textContent = busy ? "Running…" : "Run";
  $("output").setAttribute("aria-busy", String(busy));
}

function clearResult() {
  for (const id of ["alert", "output", "facts", "status"]) $(id).replaceChildren();
  for (const node of $("form").querySelectorAll("[aria-invalid]")) {
    node.removeAttribute("aria-invalid");
    node.removeAttribute("aria-errormessage");
  }
  $("copies").hidden = true;
}

function showRefusal(error) {
  const label = fieldsOf(task).find((field) => field.name === error.field)?.label;
  $("alert").replaceChildren(label && !error.message.includes(label) ? `${label}: ` : "",
    error.message, ...(error.small ? [el("small", {}, error.small)] : []));
  const control = error.field && $(idOf(error.field));
  if (control) {
    if ($("options").contains(control)) $("more").open = true;
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", "alert");
    control.focus();
  }
  $("alert").scrollIntoView({ block: "nearest" });
}

function showAnswer(asked, { content, ms, timing }) {
  clearResult();
  showCopies({ ...asked, content });
  const failed = content.results.find((result) => result.error);
  if (failed) {
    showRefusal(new Refusal(failed.error.message, { field: fieldOf(failed.error) }));
  } else {
    const row = shownRow(asked, content.results);
    $("output").replaceChildren(...view(asked.task, row, "utf16"));
    $("status").className = saysItself(asked.task) ? "hidden" : "hint";
    $("status").textContent = summary(asked.task, row);
  }
  $("facts").replaceChildren(...facts(content, ms, timing));
  if ($("result").getBoundingClientRect().top > innerHeight * 0.7) {
    $("result").scrollIntoView({ block: "start" });
  }
}

/** Inputs and result under the names that rows of a batch run have. */
function shownRow({ task: of, body }, results) {
  if (of !== "embed") return { ...results[0], ...body.inputs };
  return { embeddings: results.map((r) => r.embedding), texts: body.inputs.map((i) => i.text) };
}

function facts(content, ms, timing) {
  const [result] = content.results;
  const pairs = [
    ["model", content.model],
    ["tokens", content.usage.n_tokens.toLocaleString("en")],
    ["windows", content.usage.n_windows.toLocaleString("en")],
    ["truncated", content.results.some((r) => r.truncated) ? "yes, a part went unread" : "no"],
    ...(result.detected_language ? [["language", result.detected_language]] : []),
    ["round trip", `${ms.toFixed(0)} ms`],
    ...[...timing.matchAll(/(\w+)\s*;[^,]*?dur=([\d.]+)/g)]
      .map(([, name, spent]) => [name, `${Number(spent).toFixed(1)} ms`]),
  ];
  return pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
}

// ---- copies -------------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as a command for a shell, with a variable for the token. */
function curlOf({ url, text }) {
  const lines = [`curl -sS ${quoted(url)}`, "-H 'Content-Type: application/json'"];
  if (token()) lines.push('-H "Authorization: Bearer $TOKEN"');
  const isLong = text.length > LONGEST_ARGUMENT;
  lines.push(isLong ? `--data-binary @- <<'END'\n${text}\nEND` : `--data-binary ${quoted(text)}`);
  return lines.join(" \\\n  ");
}

function showCopies(answered) {
  last = answered;
  $("copies").hidden = false;
  $("copy-json").hidden = answered.content === undefined; // there was no answer
}

async function copy(button, text, what) {
  const name = button.textContent;
  const done = await toClipboard(text);
  say(done ? `${what} copied` : "The browser does not allow to copy");
  if (!done || name === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = name; }, COPIED_MS);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not allowed, or not there: pages by plain HTTP from another machine have none */ }
  const area = el("textarea", { class: "hidden", "aria-hidden": "true", tabindex: -1 });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}

let quiet;

function say(text) {
  $("toast").textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => { $("toast").textContent = ""; }, COPIED_MS);
}

// ---- files --------------------------------------------------------------------------------------

/** A text file goes into the box it is dropped on, or the first; results are shown row by row. */
async function takeFile(file, target) {
  const isResults = /\.(jsonl|ndjson|json|parquet)(\.gz)?$/i.test(file.name);
  const boxes = [...$("inputs").querySelectorAll("textarea")];
  const box = boxes.includes(target) ? target : boxes[0];
  if (isResults || !box || (target !== box && !/\.(txt|md)$/i.test(file.name))) {
    await openFile(file);
    return;
  }
  if (file.size > MAX_TEXT_FILE) {
    say(`${file.name} is too long for one request; a batch run has no limit`);
    return;
  }
  box.value = await file.text();
  box.dispatchEvent(new Event("input"));
  box.focus();
  say(`${file.name} loaded: ${count(box.value.length, "character")}`);
}

function startDrops() {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("veil").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) $("veil").hidden = true; // out of the window
  });
  document.addEventListener("drop", (event) => {
    $("veil").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    const [file, ...others] = event.dataTransfer.files;
    if (others.length) say(`One file at a time: ${file.name}`);
    if (file) takeFile(file, event.target);
  });
}

// ---- the page -----------------------------------------------------------------------------------

function startTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => $("theme").setAttribute("aria-pressed", String(isDark()));
  try {
    const wanted = localStorage.getItem("erniem-theme");
    if (wanted === "dark" || wanted === "light") root.dataset.theme = wanted;
  } catch { /* no storage: as the system is */ }
  system.addEventListener("change", show);
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("erniem-theme", root.dataset.theme);
    } catch { /* until the page goes */ }
    show();
  });
  show();
}

async function loadModels() {
  $("alert").replaceChildren();
  try {
    models = (await ask(addressOf("v1/models"))).content.data;
  } catch (error) {
    showRefusal(error);
    const again = el("button", { type: "button" }, "Try again");
    again.addEventListener("click", loadModels);
    $("alert").append(" ", again);
    return;
  }
  if (!served().includes(task)) [task = task] = served();
  showForm(readAddress());
}

function start() {
  startTheme();
  startFileView();
  startDrops();
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run();
  });
  $("model").addEventListener("change", writeAddress);
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepToken($("token").value.trim());
    $("token").value = "";
    $("token-form").hidden = true;
    if (models.length) run();
    else loadModels();
  });
  $("copy-curl").addEventListener("click", (event) => copy(event.target, curlOf(last), "Command"));
  $("copy-json").addEventListener("click", (event) =>
    copy(event.target, JSON.stringify(last.content, null, 2), "JSON"));
  // The address is the state of the form: a link within the page must not become it.
  $("skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("main").focus();
  });
  addEventListener("hashchange", () => showForm(readAddress()));
  loadModels();
}

start();
