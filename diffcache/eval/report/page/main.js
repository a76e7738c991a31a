// The sections, in their order. Each returns nothing, or a sentence that says why it is left out.
function drawFinding(body) {
  document.querySelector(".lede").textContent = page.sentence;
  if (page.promises) document.querySelector(".lede").after(h("p", { class: "about promises" }, page.promises));
  if (record.warning) document.querySelector(".lede").after(h("p", { class: "about warning" }, record.warning));
  if (!page.findings.length) {
    document.querySelector("#finding .how").remove();
    return undefined;
  }
  const { metric } = page;
  const named = (name) => methods.find((m) => m.name === name);
  put(body, h("ol", { class: "findings" }, page.findings.map(({ ours: name, other, gain, clear }) => {
    const mine = named(name);
    const value = (m) => `${number(score(m, metric).mean)}${unit(metric)} in ${seconds(clock(m, "loop").median)}`;
    const promised = (m) => { const db = (m.promised || {}).mean_db, found = score(m, "state").mean;
      return isNumber(db) && isNumber(found) ? `state PSNR: promised ${decibels(db)}, measured ${decibels(found)}` : null; };
    const state = other === null ? "alone" : !clear ? "even" : gain > 0 ? "ahead" : "behind";
    const sign = gain > 0 ? "+" : "";
    return h("li", { class: state },
      h("span", { class: "speed" }, isNumber((mine.speedup || {}).loop) ? mine.speedup.loop.toFixed(1) + "×" : "–",
        h("small", null, "as fast")),
      h("span", { class: "who" }, h("strong", null, `${name}: ${value(mine)}`),
        h("small", null, other === null ? "no other method is as fast" : `best other: ${other}, ${value(named(other))}`),
        promised(mine) ? h("small", null, promised(mine)) : null),
      h("span", { class: "gain" }, other === null ? "–" : h("b", null, sign + number(gain, 3) + unit(metric)),
        h("small", null, { ahead: "better", behind: "worse", even: "no clear difference", alone: "" }[state])));
  })));
  return undefined;
}

function drawCircumstances(body) {
  const { pipeline = {}, circumstances = {} } = record;
  const { class: pipelineClass, arguments: { num_inference_steps, guidance_scale, ...asked } = {}, ...parts } = pipeline;
  const entries = [["pipeline", pipelineClass], ...Object.entries(parts), ...Object.entries(asked), ["samples", record.count], ...Object.entries(circumstances)]
    .filter(([, value]) => value !== null && value !== undefined && value !== "" && typeof value !== "object");
  if (!Object.keys(pipeline).length && !Object.keys(circumstances).length)
    return "No circumstances: the record does not say what ran, nor on what.";
  const what = [pipelineClass, circumstances.device, isNumber(record.count) ? `${record.count} samples` : null].filter(Boolean).join(", ");
  put(body, h("details", null, h("summary", null, what || "What ran, on what"), h("dl", { class: "facts" }, entries.map(([name, value]) =>
    h("div", null, h("dt", null, name.replaceAll("_", " ")), h("dd", null, String(value)))))));
  return undefined;
}

const SECTIONS = { finding: drawFinding, quality: drawQuality, schedules: drawSchedules,
  trajectory: drawTrajectory, pictures: drawPictures, table: drawTable,
  circumstances: drawCircumstances };

themes();
for (const [id, draw] of Object.entries(SECTIONS)) {
  const section = document.getElementById(id);
  let why;
  try {
    why = draw(section.querySelector(".body"));
  } catch (error) {
    console.error(error);
    why = `The section “${id}” could not be drawn from this record.`;
  }
  if (why) section.replaceWith(h("p", { class: "missing", "data-missing": id }, why));
}
