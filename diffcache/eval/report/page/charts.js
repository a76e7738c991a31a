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

// Places texts near points. No text lies on another, on a mark, or beyond the box; it may lie on an interval only where
// nothing else is free. A text that is not next to its mark gets a line to it. What fits nowhere is left out.
function labels(box, marks, bars) {
  const taken = marks.map((m) => ({ l: m.x - m.r, r: m.x + m.r, t: m.y - m.r, b: m.y + m.r }));
  const pen = document.createElement("canvas").getContext("2d");
  const lines = [];
  const apart = (a, b) => a.r < b.l || a.l > b.r || a.b < b.t || a.t > b.b;
  const meets = (b, { x1, y1, x2, y2 }) => {
    for (let k = 0; k <= 24; k++) {
      const x = x1 + ((x2 - x1) * k) / 24, y = y1 + ((y2 - y1) * k) / 24;
      if (x > b.l && x < b.r && y > b.t && y < b.b) return true;
    }
    return false;
  };
  const covers = (b, bar) => (bar.x1 === bar.x2
    ? b.l < bar.x1 && b.r > bar.x1 && b.b > Math.min(bar.y1, bar.y2) && b.t < Math.max(bar.y1, bar.y2)
    : b.t < bar.y1 && b.b > bar.y1 && b.r > Math.min(bar.x1, bar.x2) && b.l < Math.max(bar.x1, bar.x2));
  const near = [[6, -16, 0], [-6, -16, 1], [6, 17, 0], [-6, 17, 1], [11, 0, 0], [-11, 0, 1], [0, -16, 0.5], [0, 18, 0.5]];
  const far = [28, 44, 62, 84, 110, 140, 180, 230].flatMap((d) => Array.from({ length: 16 }, (_, k) => {
    const [c, q] = [Math.cos((k * Math.PI) / 8), Math.sin((k * Math.PI) / 8)];
    return [d * c, d * q, c > 0.3 ? 0 : c < -0.3 ? 1 : 0.5];
  }));
  return (text, x, y, className, weight = 400) => {
    pen.font = `${weight} 12.5px ${getComputedStyle(document.body).fontFamily}`;
    const wide = pen.measureText(text).width + 2;
    let best = null;
    [...near, ...far].forEach(([dx, dy, anchor], n) => {
      const l = x + dx - anchor * wide;
      const b = { l, r: l + wide, t: y + dy - 8, b: y + dy + 8 };
      if (b.l < box.left + 2 || b.r > box.right || b.t < box.top || b.b > box.bottom || !taken.every((o) => apart(o, b))) return;
      if (lines.some((line) => meets(b, line))) return;
      let line = null;
      if (n >= near.length) {
        const to = { x: Math.max(b.l, Math.min(x, b.r)), y: y < b.t ? b.t + 1 : y > b.b ? b.b - 1 : y + dy };
        const long = Math.hypot(to.x - x, to.y - y) || 1;
        line = { x1: x + ((to.x - x) / long) * 8, y1: y + ((to.y - y) / long) * 8, x2: to.x, y2: to.y };
        const others = taken.filter((o) => !(x >= o.l && x <= o.r && y >= o.t && y <= o.b));
        if (long < 9 || others.some((o) => meets(o, line))) return;
      }
      const cost = (line ? 12 + Math.hypot(dx, dy) / 2 : n) + 30 * bars.filter((bar) => covers(b, bar)).length;
      if (!best || cost < best.cost) best = { cost, b, line, x: x + dx, y: y + dy, anchor };
    });
    if (!best) return null;
    taken.push(best.b);
    if (best.line) lines.push(best.line);
    return s("g", { class: className }, best.line ? s("line", { class: "leader", ...best.line }) : null,
      s("text", { class: "name " + className, x: best.x, y: best.y, dy: "0.35em",
        "text-anchor": ["start", "middle", "end"][best.anchor * 2] }, text));
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
