// The error of the state after each step, a line per method.
const MOST_LINES = 6; // at first; the others wait behind their buttons

function drawTrajectory(body) {
  const lines = [...methods].sort((a, b) => KINDS.indexOf(a.kind) - KINDS.indexOf(b.kind)).map((m) => {
    const { steps = [], measured = [], expected = null } = m.trajectory || {};
    const pairs = (values) => (values || []).map((v, n) => [steps[n] ?? n, v]).filter(([, v]) => isNumber(v));
    return { m, measured: pairs(measured), expected: pairs(expected) };
  }).filter((line) => line.measured.length || line.expected.length);
  if (!lines.length) return "No error along the run: the record holds none.";
  lines.forEach((line, n) => { line.on = n < MOST_LINES; line.nth = lines.slice(0, n).filter((l) => l.m.kind === line.m.kind).length; });
  const frame = h("div", { class: "chart" });
  const plot = h("div");
  frame.append(plot);
  const note = noteIn(frame);
  const draw = () => plot.replaceChildren(trajectoryPlot(lines.filter((l) => l.on), frame.clientWidth, note));
  const buttons = lines.map((line) => h("button", { type: "button", class: kindClass(line.m.kind), "aria-pressed": String(line.on),
    onclick: (event) => { line.on = !line.on; event.currentTarget.setAttribute("aria-pressed", String(line.on)); note.hide(); draw(); } },
  s("svg", { width: 22, height: 8, viewBox: "0 0 22 8", "aria-hidden": "true" },
    s("path", { class: `line ${kindClass(line.m.kind)} n${line.nth % 4}`, d: "M1 4H21" })), line.m.name));
  const dashed = lines.some((l) => l.expected.length) ? h("p", { class: "about" }, "Solid: measured. Dashed: what the schedule expected.") : null;
  put(body, h("div", { class: "controls" }, h("div", { class: "choices chips", role: "group", "aria-label": "lines" },
    h("span", { class: "label" }, "lines"), buttons)), dashed, frame);
  whenever(frame, draw);
}

function trajectoryPlot(lines, width, note) {
  if (!lines.length) return h("p", { class: "missing" }, "No line is switched on.");
  const height = Math.max(280, Math.min(420, width * 0.46));
  const wide = (line) => (line.m.kind === "ours" ? 8.7 : 7.7); // pixels of a letter
  const longest = Math.max(...lines.map((line) => line.m.name.length * wide(line)));
  const box = { left: 56, right: width - Math.min(longest + 20, width * 0.3), top: 34, bottom: height - 44 };
  const values = lines.flatMap((l) => [...l.measured, ...l.expected]);
  const positive = values.map(([, v]) => v).filter((v) => v > 0);
  const log = positive.length > 0 && Math.max(...positive) / Math.min(...positive) > 20;
  const [low, high] = log ? [Math.max(Math.min(...positive), Math.max(...positive) / 1e5), Math.max(...positive)]
    : [0, Math.max(...positive, 0) || 1];
  const x = scale(Math.min(...values.map(([t]) => t)), Math.max(...values.map(([t]) => t)), box.left, box.right);
  const y = scale(log ? low / 1.15 : 0, log ? high * 1.15 : high * 1.06, box.bottom, box.top, log);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Error of the state after each step, ${lines.length} methods; at the end: ` +
      lines.map((l) => `${l.m.name} ${number((l.measured.at(-1) || l.expected.at(-1))[1], 3)}`).join(", ") });
  svg.append(axes(box, x, y, "step", `relative error of the state${log ? " (log scale)" : ""}`));
  const path = (pairs) => pairs.filter(([, v]) => (log ? v >= low : true))
    .map(([t, v], n) => `${n ? "L" : "M"}${x(t).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const names = [];
  for (const line of [...lines].reverse()) {
    const tone = `line ${kindClass(line.m.kind)} n${line.nth % 4}`;
    if (line.expected.length) svg.append(s("path", { class: tone + " expected", d: path(line.expected) }));
    if (line.measured.length) svg.append(s("path", { class: tone, d: path(line.measured) }));
    const [, last] = (line.measured.length ? line.measured : line.expected).at(-1);
    names.push({ line, at: y(log ? Math.max(last, low) : last) });
  }
  names.sort((a, b) => a.at - b.at);
  names.forEach((n, k) => { if (k) n.at = Math.max(n.at, names[k - 1].at + 15); });
  const over = Math.max(0, (names.at(-1)?.at ?? 0) - box.bottom);
  const mostOf = (line) => Math.floor((width - box.right - 10) / wide(line));
  for (const { line, at } of names)
    svg.append(s("text", { class: "name " + kindClass(line.m.kind), x: box.right + 8, y: at - over, dy: "0.35em" },
      line.m.name.length > mostOf(line) ? "…" + line.m.name.slice(1 - mostOf(line)) : line.m.name));
  const cursor = s("line", { class: "cursor", y1: box.top, y2: box.bottom, x1: -9, x2: -9 });
  svg.append(cursor);
  const move = (event) => {
    const px = event.clientX - svg.getBoundingClientRect().left;
    const share = Math.max(0, Math.min(1, (px - box.left) / (box.right - box.left)));
    const step = Math.round(x.low + share * (x.high - x.low));
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    const at = (pairs) => (pairs.find(([t]) => t === step) || [])[1];
    note.show(x(step), box.top + 60, `after step ${step}`, lines.map((l) => [l.m.name,
      number(at(l.measured), 3) + (l.expected.length ? ` (expected ${number(at(l.expected), 3)})` : "")]));
  };
  const leave = () => { note.hide(); cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
  return svg;
}
