// Quality against wall-clock, a point per method.
function drawQuality(body) {
  const names = scored();
  const parts = [["loop", "sampling loop"], ["pipeline", "whole pipeline"], ["denoiser", "denoiser"]]
    .filter(([part]) => methods.some((m) => isNumber(clock(m, part).median)));
  if (!names.length) return "No quality against time: the record holds no scores.";
  if (!parts.length) return "No quality against time: the record holds no seconds.";
  let metric = names.includes(page.metric) ? page.metric : names[0];
  let part = parts[0][0];
  const about = h("p", { class: "about" });
  const frame = h("div", { class: "chart" });
  const plot = h("div");
  frame.append(plot);
  const note = noteIn(frame);
  const key = h("ol", { class: "key" });
  const draw = () => {
    const known = methods.filter((m) => isNumber(score(m, metric).mean) && isNumber(clock(m, part).median));
    about.replaceChildren(...aboutMetric(metric, known, part));
    key.replaceChildren();
    plot.replaceChildren(known.length ? qualityPlot(metric, part, known, frame.clientWidth, note, key)
      : h("p", { class: "missing" }, `No method has both a time of the ${part} and a score of ${title(metric)}.`));
  };
  put(body, 
    h("div", { class: "controls" },
      choices("metric", names.map((name) => [name, title(name)]), metric, (value) => { metric = value; note.hide(); draw(); }),
      parts.length > 1 ? choices("time", parts, part, (value) => { part = value; note.hide(); draw(); }) : null),
    about, frame, key, legend(KINDS.filter((kind) => methods.some((m) => m.kind === kind))));
  whenever(frame, draw);
}

function aboutMetric(metric, known, part) {
  const { about, better, floor } = metrics[metric];
  const without = methods.filter((m) => !known.includes(m) && m.kind !== "full").map((m) => m.name);
  const sentences = [
    about ? String(about).trim().replace(/([^.!?])$/, "$1.") : "",
    better === "lower" ? "Lower values are better; the axis is turned over." : "Higher values are better.",
    isNumber(floor) ? `What chance alone leaves is ${number(floor)}${unit(metric)}.` : "",
    without.length ? `Not in it, for want of a score or a time: ${without.join(", ")}.` : "",
  ];
  return [h("strong", null, title(metric)), ": " + sentences.filter(Boolean).join(" ")];
}

// In a narrow window, a point has a number and the key below the chart its name.
function qualityPlot(metric, part, known, width, note, key) {
  const narrow = width < 560;
  const height = Math.max(330, Math.min(520, width * 0.55));
  const box = { left: 52, right: width - 14, top: 34, bottom: height - 44 };
  const time = (m) => clock(m, part).median;
  const value = (m) => score(m, metric).mean;
  const ends = (m) => [score(m, metric).low, value(m), score(m, metric).high].filter(isNumber);
  const full = methods.find((m) => m.kind === "full" && isNumber(clock(m, part).median));
  const rest = known.filter((m) => m.kind !== "full");
  const inside = rest.length ? rest : known;
  let [low, high] = [Math.min(...inside.flatMap(ends)), Math.max(...inside.flatMap(ends))];
  // The full run, or a floor, far off would squeeze all else into a line; then it is told in words.
  const span = high - low || Math.abs(high) || 1;
  const [least, most] = [low - span, high + span];
  const near = (v) => isNumber(v) && v >= least && v <= most;
  const floor = metrics[metric].floor;
  for (const v of [...known.filter((m) => m.kind === "full").map(value), floor].filter(near))
    [low, high] = [Math.min(low, v), Math.max(high, v)];
  const points = known.filter((m) => m.kind !== "full" || near(value(m)));
  const pad = (high - low || span) * 0.08;
  const times = [...points, ...(full ? [full] : [])].map(time);
  const log = Math.max(...times) / Math.min(...times) > 3;
  const [first, last] = [Math.min(...times), Math.max(...times)];
  const room = log ? (last / first) ** 0.06 : 1;
  const x = log ? scale(first / room, last * room, box.left, box.right, true)
    : scale(Math.max(0, first - (last - first || first) * 0.1), last + (last - first || last) * 0.1, box.left, box.right);
  const lower = metrics[metric].better === "lower";
  const y = scale(low - pad, high + pad, lower ? box.top : box.bottom, lower ? box.bottom : box.top);
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "data-metric": metric, "data-part": part,
    "aria-label": `${title(metric)} against seconds, ${points.length} methods` });
  const which = { loop: "sampling loop", pipeline: "whole pipeline", denoiser: "denoiser" }[part];
  svg.append(axes(box, x, y, `seconds, ${which}${log ? " (log scale)" : ""}`,
    `${title(metric)}${metrics[metric].unit ? `, ${metrics[metric].unit}` : ""}${lower ? " (turned over: lower is better)" : ""}`));
  if (near(floor)) svg.append(
    s("line", { class: "floor", x1: box.left, x2: box.right, y1: y(floor), y2: y(floor) }),
    s("text", { class: "tick", x: box.right, y: y(floor) - 6, "text-anchor": "end" }, "floor"));
  if (full && !points.includes(full)) svg.append(
    s("line", { class: "floor", x1: x(time(full)), x2: x(time(full)), y1: box.top, y2: box.bottom }),
    s("text", { class: "tick", x: x(time(full)) - 6, y: box.top + 10, "text-anchor": "end" }, "full run"));
  svg.append(frontier(points, time, value, x, y, lower, box));
  const spots = points.map((m) => ({ m, x: x(time(m)), y: y(value(m)), r: 8 }));
  const order = [...points].sort((a, b) => KINDS.indexOf(b.kind) - KINDS.indexOf(a.kind)); // ours on top
  const drawn = order.map((m) => point(m, metric, part, x, y, note));
  svg.append(...drawn.map((each) => each.element));
  const place = labels(box, spots, drawn.flatMap((each) => each.bars));
  const named = order.reverse();
  named.forEach((m, n) => svg.append(...[place(narrow ? String(n + 1) : m.name, x(time(m)), y(value(m)), kindClass(m.kind),
    m.kind === "ours" ? 600 : 400)].filter(Boolean)));
  // A finger is wider than a mark: what counts is the mark next to it.
  svg.addEventListener("click", (event) => {
    const edge = svg.getBoundingClientRect();
    const away = (spot) => Math.hypot(spot.x - event.clientX + edge.left, spot.y - event.clientY + edge.top);
    const nearest = spots.reduce((a, b) => (away(b) < away(a) ? b : a));
    if (away(nearest) < 32) drawn.find((each) => each.m === nearest.m).show();
    else note.hide();
  });
  if (narrow) key.replaceChildren(...named.map((m, n) => h("li", { class: kindClass(m.kind) }, h("button", { type: "button", class: "quiet",
    onclick: () => drawn.find((each) => each.m === m).show() }, h("b", null, n + 1), h("span", null, m.name),
  h("small", null, `${number(value(m), 3)}${unit(metric)}, ${seconds(time(m))}`)))));
  return svg;
}

// The best value to be had up to each time.
function frontier(points, time, value, x, y, lower, box) {
  let path = "", best = null;
  for (const m of [...points].sort((a, b) => time(a) - time(b))) {
    if (best !== null && (lower ? value(m) >= best : value(m) <= best)) continue;
    path += best === null ? `M${x(time(m))} ${y(value(m))}` : `H${x(time(m))}V${y(value(m))}`;
    best = value(m);
  }
  return s("path", { class: "frontier", d: path ? path + `H${box.right}` : "" });
}

function point(m, metric, part, x, y, note) {
  const found = score(m, metric), spent = clock(m, part);
  const [px, py] = [x(spent.median), y(found.mean)];
  const bars = []; // in px
  if (isNumber(found.low) && isNumber(found.high))
    bars.push({ x1: px, x2: px, y1: y(found.low), y2: y(found.high) });
  if (isNumber(spent.low) && isNumber(spent.high))
    bars.push({ y1: py, y2: py, x1: x(Math.max(spent.low, x.low)), x2: x(Math.min(spent.high, x.high)) });
  const rows = [
    [title(metric), number(found.mean) + unit(metric)], ["interval", interval(found) || "–"],
    ["seconds", number(spent.median, 3)], ["spread", interval(spent, 3) || "–"],
    ["computed steps", computed(m)], ["speed-up", isNumber((m.speedup || {})[part]) ? number(m.speedup[part], 3) + "×" : "–"],
  ];
  const show = () => note.show(px, py, m.name, rows);
  const element = s("g", { class: "point " + kindClass(m.kind), tabindex: 0, role: "img", "data-method": m.name,
    "aria-label": `${m.name}: ${rows.map((r) => r.join(" ")).join(", ")}`,
    onpointerenter: show, onpointerleave: note.hide, onfocus: show, onblur: note.hide },
  s("circle", { class: "reach", cx: px, cy: py, r: 14 }), bars.map((at) => s("line", { class: "bar", ...at })), mark(m.kind, px, py));
  return { m, element, bars, show };
}
