// All numbers, in an order that the reader chooses.
function drawTable(body) {
  if (!methods.length) return "No table: the record holds no methods.";
  const columns = columnsOf();
  const rows = methods.map((m, n) => ({ m, n, cells: columns.map((c) => c.cell(m)) }));
  const lines = h("tbody");
  const heads = columns.map((c, n) => h("th", { scope: "col", class: c.text ? "text" : null, "aria-sort": "none" },
    h("button", { type: "button", onclick: () => sort(n) }, c.head,
      h("span", { class: "arrow", "aria-hidden": "true" }),
      c.sub ? h("small", null, c.sub) : null,
      c.better ? h("small", null, c.better === "lower" ? "lower is better" : "higher is better") : null)));
  const sort = (n) => {
    const down = heads[n].getAttribute("aria-sort") === "ascending";
    heads.forEach((head, k) => head.setAttribute("aria-sort", k === n ? (down ? "descending" : "ascending") : "none"));
    const sign = down ? -1 : 1;
    // What is missing stays last in either order.
    rows.sort((a, b) => {
      const [v, w] = [a.cells[n].value, b.cells[n].value];
      const [none, nothing] = [v === null || v === undefined || v === "", w === null || w === undefined || w === ""];
      if (none || nothing) return none - nothing || a.n - b.n;
      return sign * (columns[n].text ? String(v).localeCompare(String(w), "en", { numeric: true }) : v - w) || a.n - b.n;
    });
    fillRows();
  };
  const fillRows = () => lines.replaceChildren(...rows.map(({ m, cells }) => h("tr", { class: kindClass(m.kind) },
    cells.map((cell, n) => h(n ? "td" : "th", { scope: n ? null : "row", class: columns[n].text ? "text" : null }, cell.shown)))));
  fillRows();
  const floors = Object.keys(metrics).filter((name) => isNumber(metrics[name].floor))
    .map((name) => `${title(name)} ${number(metrics[name].floor)}${unit(name)}`);
  const scroll = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All numbers" },
    h("table", null, h("thead", null, h("tr", null, heads)), lines));
  const hint = h("p", { class: "about hint", hidden: true }, "This table is wider than the page: scroll it sideways. →");
  const frame = h("div", { class: "scrolled" }, scroll);
  const more = () => {
    const left = scroll.scrollWidth - scroll.clientWidth;
    hint.hidden = left <= 1;
    frame.classList.toggle("more", left - scroll.scrollLeft > 1);
  };
  scroll.addEventListener("scroll", more, { passive: true });
  new ResizeObserver(more).observe(scroll);
  put(body, hint, frame,
    floors.length ? h("p", { class: "about" }, `Floors, what chance alone leaves at this number of samples: ${floors.join(", ")}.`) : null,
    h("details", null, h("summary", null, "Intervals, verdicts and settings of every method"),
      h("p", { class: "about" }, "An interval holds the mean. A verdict compares diffcache with the best other method of no more work, " +
        "whatever its time (the sentence at the top: of no more time), and scores that need no full run with the full run's."),
      h("dl", { class: "prose" }, methods.map((m) => [h("dt", { class: kindClass(m.kind) }, m.name), wordsOf(m).map((text) => h("dd", null, text))]))));
  more();
}

// What the cells of a method have no place for.
function wordsOf(m) {
  const times = [["loop", "sampling loop"], ["pipeline", "whole pipeline"]].filter(([part]) => interval(clock(m, part), 3))
    .map(([part, words]) => `${words} ${interval(clock(m, part), 3)} s`);
  const scores = scored().filter((name) => interval(score(m, name)))
    .map((name) => `${title(name)} ${interval(score(m, name))}${unit(name)}`);
  const verdicts = scored().flatMap((name) => (score(m, name).verdicts || []).map(({ verdict, against }) =>
    `${title(name)}: ${verdict} ${verdict === "no difference" ? "from" : "than"} ${against}`));
  const promised = m.promised || {};
  return [
    m.detail ? `Settings: ${m.detail}.` : "", times.length ? `Spread of the times: ${times.join("; ")}.` : "",
    scores.length ? `Intervals: ${scores.join("; ")}.` : "", verdicts.length ? `Verdicts: ${verdicts.join("; ")}.` : "",
    isNumber(promised.mean_db) ? `The promise rests on ${promised.samples} ${promised.origin} sample${promised.samples > 1 ? "s" : ""}.` : "",
    m.note || "",
  ].filter(Boolean);
}

function columnsOf() {
  const plain = (value, shown) => ({ value: isNumber(value) ? value : null, shown });
  const columns = [
    { head: "method", text: true, cell: (m) => ({ value: m.name, shown: h("div", null,
      s("svg", { width: 16, height: 16, viewBox: "0 0 18 18", "aria-hidden": "true" }, mark(m.kind, 9, 9, 5.5)),
      h("span", null, m.name)) }) },
    { head: "steps", cell: (m) => plain(m.computed_steps, computed(m)) },
    { head: "speed-up", cell: (m) => {
      const value = (m.speedup || {}).loop;
      return plain(value, isNumber(value) ? value.toFixed(2) + "×" + (value < 0.995 && m.kind !== "full" ? " slower" : "") : "–");
    } },
    { head: "seconds (loop)", cell: (m) => plain(clock(m, "loop").median, number(clock(m, "loop").median, 3)) },
    { head: "seconds (pipeline)", cell: (m) => plain(clock(m, "pipeline").median, number(clock(m, "pipeline").median, 3)) },
    ...scored().map((name) => ({
      head: `${title(name)}${metrics[name].unit ? ` (${metrics[name].unit})` : ""}`,
      better: metrics[name].better || "higher",
      cell: (m) => {
        const found = score(m, name), said = found.verdicts || [];
        const words = said.map(({ verdict, against }) => `${verdict} ${verdict === "no difference" ? "from" : "than"} ${against}`);
        // A loss against any method outweighs a win against another.
        const sign = ["worse", "better"].find((each) => said.some((one) => one.verdict === each));
        return plain(found.mean, h("span", { class: sign || null, title: [interval(found), ...words].filter(Boolean).join("; ") || null },
          number(found.mean)));
      },
    })),
    { head: "promised / measured", sub: "state PSNR, dB", cell: (m) => {
      const promised = (m.promised || {}).mean_db;
      const bare = (db) => decibels(db).replace("\u00a0dB", "");
      return isNumber(promised) ? plain(promised, `${bare(promised)} / ${bare(score(m, "state").mean)}`) : plain(null, "–");
    } },
    { head: "operations", cell: (m) => plain(m.flops_fraction, isNumber(m.flops_fraction) ? (100 * m.flops_fraction).toFixed(1) + " %" : "–") },
    { head: "cache", cell: (m) => plain(m.cache_bytes, bytes(m.cache_bytes)) },
    { head: "peak memory", cell: (m) => plain(m.peak_bytes, bytes(m.peak_bytes)) },
  ];
  return columns.filter((c) => c.text || methods.some((m) => c.cell(m).value !== null));
}
