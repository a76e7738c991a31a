// The full run and a method under one movable line, and their difference.
function drawPictures(body) {
  const { full = {}, methods: found = {}, factor, lossless, count, of, note } = page.pictures;
  const names = methods.map((m) => m.name).filter((name) => found[name]);
  if (!names.length) return `No pictures. ${note || "The record names none."}`;
  let method = ours.map((m) => m.name).find((name) => found[name]) || names[0];
  let sample = null;
  const samplesOf = (name) => (record.samples || []).filter((each) => found[name][each.id]);

  const [left, right, apart] = ["full run", "method", "difference"].map((alt) => h("img", { alt, draggable: "false" }));
  const range = h("input", { type: "range", min: 0, max: 100, step: "any", value: 50, "aria-label": "Where the full run ends and the method begins, in percent" });
  const split = h("div", { class: "split" }, right, left, h("div", { class: "handle", "aria-hidden": "true" }), range);
  const caption = h("figcaption", null, h("span", null, "full run"), h("span", { class: "right" }));
  const prompt = h("p", { class: "prompt" });
  const facts = h("p", { class: "facts" });
  const apartCaption = h("figcaption");
  const amplify = (times) => {
    apart.style.filter = `brightness(${times / factor})`;
    apartCaption.textContent = `difference, multiplied by ${times}`;
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
    facts.textContent = [`sample ${sample}`, about.seed === undefined || about.seed === null ? null : `seed ${about.seed}`,
      ...values.map(([name, v]) => `${title(name)} ${number(v)}${unit(name)}`)].filter(Boolean).join(" · ");
    samples.replaceChildren(...here.map((each) => h("button", { type: "button", "aria-pressed": String(each.id === sample),
      "aria-label": `sample ${each.id}`, onclick: () => { sample = each.id; show(); samples.querySelector("[aria-pressed=true]").focus(); } },
    h("img", { src: full[each.id], alt: "" }))));
  };
  left.addEventListener("load", () => {
    // Small pictures are enlarged without being smoothed: what the network drew is what is seen.
    for (const each of [split, apart.parentNode]) each.classList.toggle("pixels", left.naturalWidth < 200);
    split.style.aspectRatio = apart.style.aspectRatio = `${left.naturalWidth} / ${left.naturalHeight}`;
  });
  const chooser = select("method", names.map((name) => [name, name]), (name) => { method = name; show(); });
  chooser.querySelector("select").value = method;
  put(body, h("div", { class: "controls" }, chooser,
    choices("difference", [1, 4, 16].map((k) => [k * factor, `×${k * factor}`]), 4 * factor, (value) => amplify(Number(value))), samples), prompt, facts,
    h("div", { class: "pair" }, h("figure", null, split, caption), h("figure", null, h("div", { class: "apart" }, apart), apartCaption)),
    h("p", { class: "about" }, [
      `Shown are ${count} of ${of} pairs of pictures, the first samples of each method, at most 512 pixels wide.`,
      "The difference was taken before they were made smaller, and is multiplied alike for all methods.",
      lossless ? "The pictures are exact." : "The pictures were compressed to fit into the page; judge fine detail by the files.",
      note ? `${note}.` : ""].join(" ").trim()));
  show();
  slide();
  amplify(4 * factor);
  return undefined;
}
