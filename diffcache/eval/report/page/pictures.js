// The full run and a method under one movable line, and their difference.
function drawPictures(body) {
  const { full = {}, methods: found = {}, order = [], named = {}, judged, factor, lossless, count, of, note } = page.pictures;
  const names = methods.map((m) => m.name).filter((name) => found[name]);
  if (!names.length) return `No pictures. ${note || "The record names none."}`;
  let method = [judged, ...ours.map((m) => m.name)].find((name) => found[name]) || names[0];
  let sample = null;
  const samplesOf = (name) => order.filter((id) => found[name][id]).map((id) => (record.samples || []).find((each) => each.id === id));

  const [left, right, apart] = ["full run", "method", "difference"].map((alt) => h("img", { alt, draggable: "false" }));
  const range = h("input", { type: "range", min: 0, max: 100, step: "any", value: 50, "aria-label": "Where the full run ends and the method begins, in percent" });
  const split = h("div", { class: "split" }, right, left, h("div", { class: "handle", "aria-hidden": "true" }), range);
  const caption = h("figcaption", null, h("span", null, "full run"), h("span", { class: "right" }));
  const prompt = h("p", { class: "prompt" });
  const facts = h("p", { class: "facts" });
  const apartCaption = h("figcaption");
  const row = h("div", { class: "row" });
  const rowTitle = h("p", { class: "about" });
  let amplified = 4 * factor;
  const amplify = (times) => {
    amplified = times;
    for (const each of [apart, ...row.querySelectorAll("img.difference")]) each.style.filter = `brightness(${times / factor})`;
    rowTitle.textContent = `All methods on this sample. Below each picture: its difference from the full run, |method − full run| × ${times}.`;
    apartCaption.textContent = `|method − full run|, multiplied by ${times}`;
  };
  const slide = () => {
    split.style.setProperty("--split", range.value + "%");
    range.setAttribute("aria-valuetext", `${Math.round(range.value)} % full run`);
  };
  range.addEventListener("input", slide);
  // A step of "any" leaves the size of an arrow's step to the browser; here it is 2 %, with shift 10 %.
  range.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    range.value = Number(range.value) + way * (event.shiftKey ? 10 : 2);
    slide();
  });

  const samples = h("div", { class: "thumbs", role: "group", "aria-label": "sample" });
  const show = () => {
    const m = methods.find((each) => each.name === method);
    const here = samplesOf(method);
    if (!here.some((each) => each.id === sample)) sample = here[0].id;
    const about = here.find((each) => each.id === sample);
    left.src = full[sample];
    right.src = found[method][sample].found;
    apart.src = found[method][sample].difference;
    right.alt = `${method}, sample ${sample}`;
    caption.lastChild.textContent = method;
    prompt.textContent = about.prompt ? `“${about.prompt}”` : "";
    const values = scored().map((name) => [name, (score(m, name).at || {})[sample]]).filter(([, v]) => isNumber(v));
    facts.textContent = [named[sample] ? `the ${named[sample]} of ${record.count} samples for ${judged}` : null, `sample ${sample}`, about.seed === undefined || about.seed === null ? null : `seed ${about.seed}`,
      ...values.map(([name, v]) => `${title(name)} ${number(v)}${unit(name)}`)].filter(Boolean).join(" · ");
    samples.replaceChildren(...here.map((each) => h("button", { type: "button", "aria-pressed": String(each.id === sample),
      "aria-label": `sample ${each.id}`, onclick: () => { sample = each.id; show(); samples.querySelector("[aria-pressed=true]").focus(); } },
    h("img", { src: full[each.id], alt: "" }), named[each.id] ? h("small", null, named[each.id]) : null)));
    const { metric } = page;
    const at = (each) => metric ? (score(each, metric).at || {})[sample] : null;
    const cell = (name, sources, words, pick) => h("button", { type: "button", class: pick ? kindClass(pick.kind) : "k-full", disabled: !pick,
      "aria-pressed": pick ? String(name === method) : null, onclick: () => { method = name; chooser.querySelector("select").value = name; show(); } },
    sources.map((src, n) => (src ? h("img", { src, alt: n ? "difference" : name, class: n ? "difference" : null }) : h("span", { class: "blank" }))),
    h("strong", null, name), h("small", null, words));
    row.replaceChildren(cell("full run", [full[sample], null], ""), ...methods.filter((each) => (found[each.name] || {})[sample])
      .map((each) => cell(each.name, [found[each.name][sample].found, found[each.name][sample].difference],
        isNumber(at(each)) ? `${title(metric)} ${number(at(each), 3)}${unit(metric)}` : "", each)));
    amplify(amplified);
  };
  left.addEventListener("load", () => {
    // Small pictures are enlarged without being smoothed: what the network drew is what is seen.
    for (const each of [split, apart.parentNode, row]) each.classList.toggle("pixels", left.naturalWidth < 200);
    split.style.aspectRatio = apart.style.aspectRatio = `${left.naturalWidth} / ${left.naturalHeight}`;
  });
  const chooser = select("method", names.map((name) => [name, name]), (name) => { method = name; show(); });
  chooser.querySelector("select").value = method;
  put(body, h("div", { class: "controls" }, chooser,
    choices("difference", [1, 4, 16].map((k) => [k * factor, `×${k * factor}`]), 4 * factor, (value) => amplify(Number(value))), samples), prompt, facts,
    h("div", { class: "pair" }, h("figure", null, split, caption), h("figure", null, h("div", { class: "apart" }, apart), apartCaption)),
    rowTitle, row,
    h("p", { class: "about" }, [
      `Shown are ${count} of ${of} pairs of pictures, at most 512 pixels wide.`,
      "The difference is taken at full size and multiplied alike for all methods.",
      lossless ? "The pictures are exact." : "The pictures are compressed to fit into the page; judge fine detail by the files.",
      note ? `${note}.` : ""].join(" ").trim()));
  show();
  slide();
  amplify(4 * factor);
  return undefined;
}
