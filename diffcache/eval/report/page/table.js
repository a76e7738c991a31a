// All numbers, in an order that the reader chooses.
function drawTable(body) {
  if (!methods.length) return "No table: the record holds no methods.";
  const columns = columnsOf();
  const rows = methods.map((m, n) => ({ m, n, cells: columns.map((c) => c.cell(m)) }));
  const lines = h("tbody");
  const heads = columns.map((c, n) => h("th", { scope: "col", class: c.text ? "text" : null, "aria-sort": "none" },
    h("button", { type: "button", onclick: () => sort(n) }, c.head,
      h("span", { class: "arrow", "aria-hidden": "true" }),
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
  put(body, 
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All numbers" },
      h("table", null, h("thead", null, h("tr", null, heads)), lines)),
    methods.some((m) => Object.values(m.scores || {}).some((found) => (found.verdicts || []).length))
      ? h("p", { class: "about" }, "A verdict here compares ours with the best other method of no more work, whatever its time " +
        "(the sentence at the top: of no more time), and scores that need no full run with the full run's.") : null,
    floors.length ? h("p", { class: "about" }, `Floors, what chance alone leaves at this number of samples: ${floors.join(", ")}.`) : null,
    ...methods.filter((m) => m.note).map((m) => h("p", { class: "about" }, h("strong", null, m.name), ": " + m.note)));
}

function columnsOf() {
  const plain = (value, shown) => ({ value: isNumber(value) ? value : null, shown });
  const spread = (value, found, digits) => plain(value, [number(value, digits), interval(found, digits) ? h("small", null, interval(found, digits)) : null]);
  const columns = [
    { head: "method", text: true, cell: (m) => ({ value: m.name, shown: h("div", null,
      s("svg", { width: 16, height: 16, viewBox: "0 0 18 18", "aria-hidden": "true" }, mark(m.kind, 9, 9, 5.5)),
      h("span", null, m.name, m.detail ? h("small", null, m.detail) : null)) }) },
    { head: "computed steps", cell: (m) => plain(m.computed_steps, computed(m)) },
    { head: "speed-up", cell: (m) => {
      const value = (m.speedup || {}).loop;
      return plain(value, isNumber(value) ? [value.toFixed(2) + "×", value < 0.995 && m.kind !== "full" ? h("small", { class: "worse" }, "slower") : null] : "–");
    } },
    { head: "seconds (loop)", cell: (m) => spread(clock(m, "loop").median, clock(m, "loop"), 3) },
    { head: "seconds (pipeline)", cell: (m) => spread(clock(m, "pipeline").median, clock(m, "pipeline"), 3) },
    ...scored().map((name) => ({
      head: `${title(name)}${metrics[name].unit ? ` (${metrics[name].unit})` : ""}`,
      better: metrics[name].better || "higher",
      cell: (m) => {
        const found = score(m, name);
        const cell = spread(found.mean, found, 4);
        for (const { verdict, against } of found.verdicts || [])
          cell.shown.push(h("small", { class: verdict.replace(" ", "-") },
            `${verdict} ${verdict === "no difference" ? "from" : "than"} ${against}`));
        return cell;
      },
    })),
    { head: "promised / measured (state, dB)", cell: (m) => {
      const promised = (m.promised || {}).mean_db, measured = score(m, "state").mean;
      if (!isNumber(promised)) return plain(null, "–");
      // As diffcache.schedule.decibels: beyond the precision of float32 any number would be made up.
      const decibels = (db) => !isNumber(db) ? "–" : db >= 20 * Math.log10(2 ** 24) ? "exact" : db.toFixed(1);
      return { value: promised, shown: [`${decibels(promised)} / ${decibels(measured)}`,
        h("small", null, `${m.promised.samples} ${m.promised.origin} sample${m.promised.samples > 1 ? "s" : ""}`)] };
    } },
    { head: "operations", cell: (m) => plain(m.flops_fraction, isNumber(m.flops_fraction) ? (100 * m.flops_fraction).toFixed(1) + " %" : "–") },
    { head: "cache", cell: (m) => plain(m.cache_bytes, bytes(m.cache_bytes)) },
    { head: "peak memory", cell: (m) => plain(m.peak_bytes, bytes(m.peak_bytes)) },
  ];
  return columns.filter((c) => c.text || methods.some((m) => c.cell(m).value !== null));
}
