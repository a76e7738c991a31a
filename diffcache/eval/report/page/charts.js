// Scales, axes, marks, labels that keep out of each other's way, and the note that follows the pointer.
function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (x) => x;
  const span = f(high) - f(low) || 1;
  const at = (x) => from + ((f(x) - f(low)) / span) * (to - from);
  return Object.assign(at, { low, high, log, ticks: (count) => (log ? logTicks : ticks)(low, high, count) });
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((k) => k * power >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function logTicks(low, high, count) {
  for (const digits of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const d of digits) if (d * 10 ** p >= low * 0.999 && d * 10 ** p <= high * 1.001) found.push(d * 10 ** p);
    if (found.length <= count + 2) return found.length > 1 ? found : ticks(low, high, count).filter((t) => t > 0);
  }
  const powers = [];
  const every = Math.ceil(Math.log10(high / low) / count);
  for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high) + 1e-9; p += every) powers.push(10 ** p);
  return powers;
}

const tick = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(0).replace("-", "−").replace("+", "");
  return String(Number(value.toPrecision(6))).replace("-", "−");
};

// box: left, right, top, bottom in px.
function axes(box, x, y, xTitle, yTitle) {
  const wide = box.right - box.left;
  const down = y.ticks(5).map((t) => s("g", null,
    s("line", { class: "grid", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }),
    s("text", { class: "tick", x: box.left - 8, y: y(t), "text-anchor": "end", dy: "0.35em" }, tick(t))));
  const across = x.ticks(Math.max(4, Math.floor(wide / 90))).map((t) => s("g", null,
    s("line", { class: "notch", x1: x(t), x2: x(t), y1: box.bottom, y2: box.bottom + 4 }),
    s("text", { class: "tick", x: x(t), y: box.bottom + 18, "text-anchor": "middle" }, tick(t))));
  return s("g", { "aria-hidden": "true" }, down, across,
    s("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    s("text", { class: "axis", x: box.right, y: box.bottom + 36, "text-anchor": "end" }, xTitle),
    s("text", { class: "axis", x: 0, y: 12 }, yTitle));
}

// A kind has a shape as well as a colour.
function mark(kind, x, y, r = 6) {
  const poly = (points) => s("path", { d: "M" + points.map(([a, b]) => `${x + a * r} ${y + b * r}`).join("L") + "Z" });
  const shape = {
    ours: () => s("circle", { cx: x, cy: y, r }),
    "fewer steps": () => poly([[0, -1.15], [1.1, 0.85], [-1.1, 0.85]]),
    reuse: () => poly([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]),
    full: () => poly([[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]),
  }[kind];
  const peer = () => s("path", { class: "cross", d: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}` });
  const drawn = (shape || peer)();
  drawn.classList.add("mark");
  return drawn;
}

function legend(kinds) {
  return h("ul", { class: "legend" }, kinds.map((kind) => h("li", { class: kindClass(kind) },
    s("svg", { width: 18, height: 18, viewBox: "0 0 18 18", "aria-hidden": "true" }, mark(kind, 9, 9, 5.5)),
    KIND_TITLES[kind] || kind)));
}

// Places a text beside a point where nothing is yet, or nowhere.
function labels(box, taken) {
  const free = (b) => b.l >= box.left && b.r <= box.right && b.t >= box.top && b.b <= box.bottom &&
    taken.every((o) => b.r < o.l || b.l > o.r || b.b < o.t || b.t > o.b);
  return (text, x, y, className) => {
    const wide = text.length * 6.4;
    // Between the two intervals first, which run up and down and to both sides.
    const tries = [[6, -16, "start"], [-6, -16, "end"], [6, 17, "start"], [-6, 17, "end"], [10, 0, "start"], [-10, 0, "end"],
      [0, -16, "middle"], [0, 18, "middle"]];
    for (const [dx, dy, anchor] of tries) {
      const l = x + dx - (anchor === "end" ? wide : anchor === "middle" ? wide / 2 : 0);
      const b = { l, r: l + wide, t: y + dy - 7, b: y + dy + 7 };
      if (!free(b)) continue;
      taken.push(b);
      return s("text", { class: "name " + className, x: x + dx, y: y + dy, dy: "0.35em", "text-anchor": anchor }, text);
    }
    return null;
  };
}

// A note of rows [name, value] over a chart, beside the point (x, y) of its box.
function noteIn(frame) {
  const box = h("div", { class: "note", role: "status", hidden: true });
  frame.append(box);
  return {
    hide: () => { box.hidden = true; },
    show(x, y, head, rows) {
      box.replaceChildren(h("strong", null, head), h("dl", null, rows.map(([a, b]) => [h("dt", null, a), h("dd", null, b)])));
      box.hidden = false;
      const wide = frame.clientWidth, width = box.offsetWidth, height = box.offsetHeight;
      const left = x + 16 + width <= wide ? x + 16 : x - 16 - width;
      box.style.left = Math.max(0, Math.min(left, wide - width)) + "px";
      box.style.top = Math.max(0, Math.min(y - height / 2, frame.clientHeight - height)) + "px";
    },
  };
}
