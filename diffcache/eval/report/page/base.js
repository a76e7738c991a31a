// Elements, numbers, and what all sections know. Text of the record reaches the page as text nodes and attributes only.
const page = JSON.parse(document.getElementById("record").textContent);
const record = page.record;
const methods = record.methods || [];
const metrics = record.metrics || {};
const ours = methods.filter((m) => m.kind === "ours");
const KINDS = ["ours", "fewer steps", "reuse", "peer", "full"]; // in the order of legends
const KIND_TITLES = { ours: "diffcache", "fewer steps": "fewer steps", reuse: "reuse", peer: "other methods", full: "full run" };

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const put = (element, ...children) => fill(element, null, children); // append, but what is null is left out

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const kindClass = (kind) => "k-" + (KINDS.includes(kind) ? kind : "peer").replace(" ", "-");

function number(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  const text = size < -4 || size >= 6 ? value.toExponential(digits - 1) : value.toFixed(Math.max(0, digits - 1 - size));
  return text.replace("-", "−");
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  return value >= 1e9 ? (value / 1e9).toFixed(2) + " GB" : (value / 1e6).toFixed(1) + " MB";
}

function seconds(value) {
  if (!isNumber(value)) return "–";
  return value < 1 ? number(value * 1000, 3) + " ms" : number(value, 3) + " s";
}

// As diffcache.documents.schedule.decibels: beyond the precision of float32 any number would be made up.
function decibels(db) {
  return !isNumber(db) ? "–" : db >= 20 * Math.log10(2 ** 24) ? "exact" : db.toFixed(1) + "\u00a0dB";
}

const score = (method, metric) => (method.scores || {})[metric] || {};
const clock = (method, part) => (method.seconds || {})[part] || {};
const title = (metric) => metrics[metric].title || metric;
const unit = (metric) => (metrics[metric].unit ? "\u00a0" + metrics[metric].unit : "");
const scored = () => Object.keys(metrics).filter((name) => methods.some((m) => isNumber(score(m, name).mean)));

function computed(method) {
  if (!isNumber(method.computed_steps)) return "–";
  return `${Math.round(method.computed_steps * 10) / 10} of ${method.steps}`;
}

function interval(found, digits) {
  return isNumber(found.low) && isNumber(found.high) ? `${number(found.low, digits)} to ${number(found.high, digits)}` : "";
}

// Buttons of which one is pressed.
function choices(label, options, chosen, pick) {
  const buttons = options.map(([value, text]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), "data-value": value, onclick: press }, text));
  function press(event) {
    for (const b of buttons) b.setAttribute("aria-pressed", String(b === event.currentTarget));
    pick(event.currentTarget.dataset.value);
  }
  return h("div", { class: "choices", role: "group", "aria-label": label }, h("span", { class: "label" }, label), buttons);
}

function select(label, options, pick) {
  const list = h("select", { onchange: () => pick(list.value) }, options.map(([value, text]) => h("option", { value }, text)));
  return h("label", { class: "select" }, h("span", { class: "label" }, label), list);
}

// Calls draw(width) now and whenever the element's width changes.
function whenever(element, draw) {
  let before = 0;
  const again = () => {
    const width = Math.floor(element.clientWidth);
    if (width > 0 && width !== before) draw((before = width));
  };
  new ResizeObserver(() => requestAnimationFrame(again)).observe(element);
  again();
}

function themes() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const wanted = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wanted.matches);
  const say = () => {
    button.textContent = dark() ? "light" : "dark";
    button.setAttribute("aria-label", `Show the page in ${button.textContent} colours`);
  };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; say(); });
  wanted.addEventListener("change", say);
  say();
}
