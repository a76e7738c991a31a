// A strip per method: how much of the network computes at each step; and the map of one method, site by step.
const AGES = 6; // shades of a predicted output: steps since it was computed, the last for all that are older

function drawSchedules(body) {
  const drawn = ours.map((m) => [m, sitesOf(m)]).filter(([, sites]) => sites.length);
  if (!drawn.length) return "No schedules: the record holds none, or none of ours.";
  put(body, h("ul", { class: "legend shades" }, h("li", null, swatch("c-computed"), "computed"),
    h("li", null, Array.from({ length: AGES }, (_, n) => swatch("c-age" + (n + 1))), `predicted, 1 to ${AGES} or more steps after`)));
  const strips = h("div", { class: "strips" });
  put(body, strips);
  for (const [m, sites] of drawn) strips.append(stripOf(m, sites));
  const several = drawn.filter(([, sites]) => sites.length > 1);
  if (!several.length) return;
  const map = h("div", { class: "map" });
  const show = (name) => {
    const [m, sites] = several.find(([each]) => each.name === name);
    map.replaceChildren(mapOf(m, sites));
  };
  put(body, h("h3", null, "Site by step"),
    several.length > 1 ? h("div", { class: "controls" }, select("method", several.map(([m]) => [m.name, m.name]), show)) : null,
    h("p", { class: "how" }, "A row is a place in the network whose output can be kept, here in the order of names."), map);
  show(several[0][0].name);
}

const swatch = (name) => s("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" },
  s("rect", { class: name, width: 14, height: 14 }));

// [{name, compute, store, ages}] of all denoisers.
function sitesOf(m) {
  const denoisers = Object.entries((m.schedule || {}).denoisers || {});
  return denoisers.flatMap(([denoiser, sites]) => Object.entries(sites || {}).map(([site, plan]) => ({
    name: denoisers.length > 1 ? `${denoiser} ${site}` : site,
    compute: plan.compute || [],
    store: plan.store,
    ages: ages(plan.compute || []),
  }))).filter((site) => site.compute.length)
    .sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
}

function ages(compute) {
  let age = 0;
  return compute.map((c) => (age = c ? 0 : age + 1));
}

function stripOf(m, sites) {
  const steps = Math.max(...sites.map((site) => site.compute.length));
  const stores = [...new Set(sites.map((site) => site.store).filter(Boolean))];
  const kept = stores.length ? `kept as ${stores.join(", ")}` : "kept as the network returns it";
  const frame = h("div", { class: "strip" });
  const row = h("figure", null,
    h("figcaption", null, h("strong", null, m.name), h("span", null, `${computed(m)} steps computed · ${kept}`)), frame);
  whenever(frame, (width) => {
    const cell = width / steps, tall = 22;
    const svg = s("svg", { viewBox: `0 0 ${width} ${tall + 16}`, role: "img",
      "aria-label": `${m.name}: ${computed(m)} steps computed` });
    for (let t = 0; t < steps; t++) {
      const here = sites.filter((site) => t < site.compute.length);
      const share = here.filter((site) => site.compute[t]).length / (here.length || 1);
      const age = Math.max(...here.map((site) => site.ages[t]));
      const at = { x: t * cell + 0.5, width: Math.max(0.5, cell - 1) };
      const says = `step ${t}: ${sites.length > 1 ? Math.round(100 * share) + " % of the sites computed" : share ? "computed" : "predicted"}`;
      svg.append(s("g", null, s("title", null, says),
        s("rect", { ...at, y: 0, height: tall, class: share === 1 ? "c-computed" : "c-age" + Math.max(1, Math.min(AGES, age)) }),
        share > 0 && share < 1 ? s("rect", { ...at, y: tall * (1 - share), height: tall * share, class: "c-computed" }) : null));
    }
    svg.append(stepTicks(steps, (t) => (t + 0.5) * cell, tall + 13, width));
    frame.replaceChildren(svg);
  });
  return row;
}

const stepTicks = (steps, x, y, width) => s("g", { "aria-hidden": "true" }, ticks(0, steps - 1, Math.min(10, width / 60))
  .filter(Number.isInteger).map((t) => s("text", { class: "tick", x: x(t), y, "text-anchor": "middle" }, tick(t))));

// What all names begin with, up to a full part.
function prefixOf(names) {
  let shared = 0;
  while (names.length > 1 && names.every((n) => n[shared] !== undefined && n[shared] === names[0][shared])) shared++;
  return names[0].slice(0, Math.max(...[".", ":", " "].map((sign) => names[0].lastIndexOf(sign, shared - 1))) + 1);
}

function mapOf(m, sites) {
  const frame = h("div", { class: "chart" });
  const plot = h("div");
  const prefix = prefixOf(sites.map((site) => site.name));
  put(frame, prefix ? h("p", { class: "about" }, `All names begin with ${prefix}`) : null, plot);
  const note = noteIn(frame);
  whenever(frame, (width) => {
    const stores = sites.some((site) => site.store);
    const longest = Math.max(...sites.map((site) => site.name.length)) - prefix.length;
    const left = Math.min(longest * 7 + 10, 190, width * 0.3), right = stores ? 44 : 4;
    const most = Math.floor((left - 8) / 6.5); // letters
    const names = sites.map((site) => site.name.slice(prefix.length)).map((n) => (n.length > most ? "…" + n.slice(1 - most) : n));
    const steps = Math.max(...sites.map((site) => site.compute.length));
    const cell = (width - left - right) / steps;
    const tall = Math.max(5, Math.min(20, 640 / sites.length));
    const height = tall * sites.length;
    const every = Math.ceil(13 / tall);
    const seam = tall > 8 ? 1 : 0.4;
    const paths = Array(AGES + 1).fill("");
    sites.forEach((site, n) => site.ages.forEach((age, t) => {
      paths[Math.min(age, AGES)] += `M${left + t * cell} ${n * tall}h${Math.max(0.5, cell - seam)}v${tall - seam}h${-Math.max(0.5, cell - seam)}z`;
    }));
    const svg = s("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `${m.name}: ${sites.length} sites by ${steps} steps` },
      paths.map((d, age) => s("path", { class: age ? "c-age" + age : "c-computed", d })),
      sites.map((site, n) => n % every ? null : s("g", { "aria-hidden": "true" },
        s("text", { class: "tick", x: left - 6, y: (n + 0.5) * tall, dy: "0.35em", "text-anchor": "end" }, names[n]),
        site.store ? s("text", { class: "tick", x: width - right + 6, y: (n + 0.5) * tall, dy: "0.35em" }, site.store) : null)),
      stepTicks(steps, (t) => left + (t + 0.5) * cell, height + 14, width));
    const point = (event) => {
      const edge = svg.getBoundingClientRect();
      const [px, py] = [event.clientX - edge.left, event.clientY - edge.top];
      const t = Math.floor((px - left) / cell), site = sites[Math.floor(py / tall)];
      if (!site || t < 0 || t >= site.compute.length) return note.hide();
      const age = site.ages[t];
      note.show(px, py + svg.parentNode.offsetTop, site.name, [["step", String(t)], ["output", age ? `predicted, ${age} after` : "computed"],
        ["kept as", site.store || "returned"]]);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", note.hide);
    plot.replaceChildren(svg);
  });
  return frame;
}
