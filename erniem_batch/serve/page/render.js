// How results look, here and in files of batch runs. Everything becomes text nodes: what stands in
// a document or an answer is never read as HTML.

/** An element. Attributes that are null or false are left out. */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(key, value === true ? "" : value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const count = (n, one, many = `${one}s`) =>
  `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const score = (value) => (isNumber(value) ? value.toFixed(2) : "–");
const list = (value) => (Array.isArray(value) ? value.filter((v) => v !== null) : []);
const isObject = (value) => typeof value === "object" && value !== null;

// ---- places in a text ---------------------------------------------------------------------------

/** From places counted in `unit` to places in a JavaScript string; -1: there is no such. */
export function placesIn(text, unit) {
  const isPlace = (place) => Number.isInteger(place) && place >= 0;
  // Where each code point is one UTF-16 unit, as most texts are, no table is needed.
  if (unit === "utf16" || (unit === "codepoint" && !/[\ud800-\udfff]/.test(text))) {
    return (place) => (isPlace(place) && place <= text.length ? place : -1);
  }
  const places = new Map();
  let at = 0;
  let index = 0;
  for (const point of text) {
    places.set(at, index);
    at += unit === "byte" ? bytesOf(point.codePointAt(0)) : 1;
    index += point.length;
  }
  places.set(at, index);
  return (place) => places.get(place) ?? -1;
}

const bytesOf = (code) => (code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4);

/** The spans that fit the text, with places in the string, and how many do not fit. */
export function fitting(text, spans, unit) {
  const placeOf = placesIn(text, unit);
  const good = [];
  let misfits = 0;
  for (const span of spans) {
    const start = placeOf(span.start);
    const end = placeOf(span.end);
    const fits = start >= 0 && end > start;
    // An entity says what it is: if other words stand there, the unit is wrong, or the text.
    const same = typeof span.text !== "string" || text.slice(start, end) === span.text;
    if (fits && same) good.push({ ...span, start, end });
    else misfits += 1;
  }
  return { good, misfits };
}

// ---- labels and marks ---------------------------------------------------------------------------

// The usual ones look the same everywhere; others get colours in the order in which they come.
const USUAL = [["LOC", "Location", "地点"], ["ORG", "Organization", "组织机构"],
  ["PER", "Person", "人物"]];
const HUES = 10;
const hues = new Map(USUAL.flatMap((names, hue) => names.map((name) => [name, hue])));
let others = 0;

function hueOf(label) {
  const kind = label.replace(/^[BIES]-/, "");
  if (!hues.has(kind)) hues.set(kind, USUAL.length + (others++ % (HUES - USUAL.length)));
  return `hue c${hues.get(kind)}`;
}

function tag(span) {
  // Isolated, so that a Latin label does not reorder the Arabic around it. The marked text is not:
  // it belongs to its line, and isolated words of a right-to-left run would change places.
  const spoken = isNumber(span.score) ? `, score ${score(span.score)}) ` : ") ";
  return el("bdi", { class: "tag" }, el("span", { class: "hidden" }, " ("), span.label,
    el("span", { class: "hidden" }, spoken));
}

/** A text with marked spans, which may lie within each other or overlap. */
export function marked(text, spans) {
  const root = el("div", { class: "text", dir: "auto" });
  const order = [...spans].sort((a, b) => a.start - b.start || b.end - a.end);
  const stops = new Set([0, text.length, ...order.flatMap((span) => [span.start, span.end])]);
  const open = [];
  let next = 0;
  const enter = (span) => {
    const title = `${span.label} ${score(span.score)}`;
    const node = el("mark", { class: hueOf(span.label), title });
    (open.at(-1)?.node ?? root).append(node);
    open.push({ span, node });
  };
  const places = [...stops].sort((a, b) => a - b);
  places.forEach((place, i) => {
    const lowest = open.findIndex(({ span }) => span.end === place);
    if (lowest >= 0) {
      // Elements cannot cross: what is open above a span that ends is cut, and goes on behind it.
      const ending = open.splice(lowest);
      for (const { span, node } of ending) if (span.end === place) node.append(tag(span));
      for (const { span } of ending) if (span.end > place) enter(span);
    }
    while (next < order.length && order[next].start === place) enter(order[next++]);
    const piece = text.slice(place, places[i + 1] ?? place);
    if (piece) (open.at(-1)?.node ?? root).append(piece);
  });
  // An outer mark reaches further down, so that its line is seen below those within.
  for (const node of root.querySelectorAll("mark")) {
    let depth = 0;
    for (let inner = node; (inner = inner.querySelector("mark")); ) depth += 1;
    if (depth) node.style.setProperty("--lift", depth);
  }
  return root;
}

/** Labels with their colours and how often each is there. */
function legend(spans) {
  const counts = Map.groupBy(spans, (span) => span.label);
  return el("ul", { class: "legend", "aria-label": "Labels" }, ...[...counts].map(([label, of]) =>
    el("li", {}, chip(label, el("b", {}, ` ${of.length}`)))));
}

const chip = (label, ...more) => el("bdi", { class: `chip ${hueOf(label)}` }, label, ...more);

/** The marked text with its legend, and a word on spans that do not fit. */
function spansView(text, spans, unit, brief = false) {
  const { good, misfits } = fitting(text, spans, unit);
  // Equal spans under one label are one mark, such as the birthplace of two persons.
  const seen = new Set();
  const once = good.filter(({ start, end, label }) => {
    const key = JSON.stringify([start, end, label]);
    return !seen.has(key) && seen.add(key);
  });
  return [misfits ? misfitsView(text, spans, unit, misfits) : null, marked(text, once),
    good.length && !brief ? legend(good) : null].filter(Boolean);
}

function misfitsView(text, spans, unit, misfits) {
  const other = ["codepoint", "utf16", "byte"].find(
    (name) => name !== unit && fitting(text, spans, name).misfits === 0);
  const names = { codepoint: "code points", utf16: "UTF-16 units", byte: "bytes" };
  const advice = other ? ` They do fit when offsets count ${names[other]}.`
    : " Is this the column that was read?";
  return el("p", { class: "warn" }, `${misfits} of ${count(spans.length, "span")} `
    + `${misfits === 1 ? "does" : "do"} not fit the text with offsets in ${names[unit]}.${advice}`);
}

// ---- the tasks ----------------------------------------------------------------------------------

function table(spans) {
  const head = ["Text", "Label", "Score", "Place"].map((name) => el("th", { scope: "col" }, name));
  const rows = spans.map((span) => el("tr", {},
    el("td", {}, el("bdi", {}, String(span.text))), el("td", {}, el("bdi", {}, String(span.label))),
    el("td", { class: "number" }, score(span.score)),
    el("td", { class: "number" }, `${span.start}–${span.end}`)));
  const inner = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  return el("details", {}, el("summary", {}, "As a table"),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Entities" }, inner));
}

function nerView(text, entities, unit, brief) {
  const spans = list(entities).filter(isObject)
    .map((entity) => ({ ...entity, label: String(entity.label) }));
  const none = spans.length ? [] : [el("p", { class: "hint" }, "No entities found.")];
  const more = spans.length && !brief ? [table(spans)] : [];
  return [...spansView(text, spans, unit, brief), ...none, ...more];
}

function extractView(text, extracted, unit, brief) {
  const items = list(extracted).filter(isObject);
  const spans = items.filter((item) => item.start !== null && item.start !== undefined)
    .map((item) => ({ ...item, label: String(item.name), score: item.probability }));
  const tree = items.length ? extractTree(items) : el("p", { class: "hint" }, "Nothing found.");
  return [...spansView(text, spans, unit, brief), tree];
}

/** Items under their parents. An item stands behind its parent, so that there are no circles. */
function extractTree(items) {
  const root = el("ul", { class: "tree", "aria-label": "What was found" });
  const nodes = new Map();
  for (const item of items) {
    const node = el("li", {}, chip(String(item.name)), " ", el("bdi", {}, String(item.text)), " ",
      el("span", { class: "number" }, score(item.probability)));
    const parent = nodes.get(item.parent);
    if (parent && !parent.inner) parent.node.append(parent.inner = el("ul"));
    (parent ? parent.inner : root).append(node);
    nodes.set(item.id, { node, inner: null });
  }
  return root;
}

/** Things with scores, as bars. */
function bars(name, rows) {
  const known = rows.map((row) => row.score).filter(isNumber);
  // Probabilities are parts of 1; other numbers, as of a regression, parts of the largest.
  const full = known.every((s) => s >= 0 && s <= 1) ? 1 : Math.max(...known.map(Math.abs)) || 1;
  return el("ol", { class: "bars", "aria-label": name }, ...rows.map((row) => {
    const inner = el("i");
    inner.style.width = `${(100 * Math.abs(row.score ?? 0)) / full}%`;
    return el("li", { class: row.best && "best" },
      el("bdi", {}, row.label, row.best ? el("span", { class: "hidden" }, " (best)") : null),
      el("span", { class: "number" }, score(row.score)),
      el("div", { class: "meter", role: "meter", "aria-label": row.label, "aria-valuemin": 0,
        "aria-valuemax": full, "aria-valuenow": isNumber(row.score) ? Math.abs(row.score) : 0 },
      inner));
  }));
}

function classifyView(result) {
  const best = result.predicted_label;
  const rows = list(result.label_scores).filter(isObject).map(({ label, score: value }) =>
    ({ label: String(label), score: value, best: label === best }));
  const title = best ?? "No label scores high enough";
  return [el("p", { class: "big" }, el("bdi", {}, String(title))),
    ...(rows.length ? [bars("Labels by score", rows)] : [])];
}

function chooseView(result, choices, premise) {
  const scores = list(result.choice_scores);
  const rows = list(choices).map((label, i) =>
    ({ label: String(label), score: scores[i], best: i === result.predicted_choice }));
  const none = result.predicted_choice === null && el("p", {}, "No choice scores high enough.");
  return [el("p", { class: "text", dir: "auto" }, premise), ...(none ? [none] : []),
    bars("Choices", rows)];
}

function qaView(result, context, question, unit) {
  const answers = list(result.predicted_answers).filter(isObject);
  const [best, ...others] = result.predicted_answer === null ? [null, ...answers] : answers;
  const nodes = [];
  if (question) nodes.push(el("p", { class: "hint", dir: "auto" }, question));
  nodes.push(el("p", { class: "big" }, el("bdi", {},
    result.predicted_answer ?? best?.text ?? "No answer in this text"),
  best ? el("span", { class: "hint" }, ` ${score(best.score)}`) : null));
  nodes.push(...spansView(context, best ? [{ ...best, label: "answer" }] : [], unit, true));
  if (others.length) {
    nodes.push(el("h3", {}, "Other answers"),
      bars("Other answers", others.map((a) => ({ label: String(a.text), score: a.score }))));
  }
  if (isNumber(result.null_score)) {
    nodes.push(el("p", { class: "hint" }, `Score of “no answer”: ${score(result.null_score)}`));
  }
  return nodes;
}

const SHOWN = 64;

/** The first numbers of a vector, up and down from a line in the middle. */
function strip(vector, name) {
  const some = vector.slice(0, SHOWN);
  const largest = Math.max(...some.map(Math.abs)) || 1;
  return svg("svg", { class: "strip", viewBox: `0 0 ${SHOWN} 20`, preserveAspectRatio: "none",
    role: "img", "aria-label": `${name}: the first ${some.length} of ${vector.length} numbers` },
  ...some.map((value, i) => {
    const height = (9.5 * Math.abs(value)) / largest;
    return svg("rect", { x: i + 0.15, width: 0.7, y: value > 0 ? 10 - height : 10, height });
  }));
}

export function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

function embedView(vectors, texts) {
  const nodes = [];
  if (vectors.length === 2) {
    const value = cosine(...vectors);
    nodes.push(el("p", { class: "big" }, value.toFixed(3)), el("p", { class: "hint" },
      "Cosine of the two vectors: 1 is the same direction, 0 nothing in common."));
  }
  vectors.forEach((vector, i) => {
    const name = vectors.length > 1 ? `Text ${i + 1}` : "Vector";
    nodes.push(el("h3", {}, `${name} · ${count(vector.length, "number")}`));
    if (texts[i]) nodes.push(el("p", { class: "hint", dir: "auto" }, texts[i]));
    nodes.push(strip(vector, name));
  });
  return nodes;
}

/** The nodes for a result. `row` has the inputs and the result under their column names. `brief`:
 *  no legend and no table, as where there are many rows. */
export function view(task, row, unit, brief = false) {
  const string = (value) => (typeof value === "string" ? value : "");
  switch (task) {
    case "ner": return nerView(string(row.text), row.entities, unit, brief);
    case "extract": return extractView(string(row.text), row.extracted, unit, brief);
    case "classify": return classifyView(row);
    case "choose": return chooseView(row, row.choices, string(row.premise));
    case "qa": return qaView(row, string(row.context), string(row.question), unit);
    default: return embedView(row.embeddings ?? [row.embedding], row.texts ?? [row.text]);
  }
}

/** What was found, in a few words, for those who do not see it. */
export function summary(task, row) {
  switch (task) {
    case "ner": return `Found: ${count(list(row.entities).length, "entity", "entities")}`;
    case "extract": return `Found: ${count(list(row.extracted).length, "item")}`;
    case "classify": return `Label: ${row.predicted_label ?? "none"}`;
    case "choose": return `Choice: ${row.choices[row.predicted_choice] ?? "none"}`;
    case "qa": return `Answer: ${row.predicted_answer ?? "none"}`;
    default: return row.embeddings.length < 2 ? "One vector"
      : `Cosine: ${cosine(...row.embeddings).toFixed(3)}`;
  }
}

/** Whether the result itself begins with what the summary says. */
export const saysItself = (task) => task !== "ner" && task !== "extract";
