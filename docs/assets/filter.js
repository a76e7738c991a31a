// Adds a box above the tables of a page with <div data-filter="label"></div>, which hides rows without the words typed.
// Without JavaScript the page shows all rows.
document.querySelectorAll("[data-filter]").forEach((place) => {
  const box = document.createElement("input");
  box.type = "search";
  box.className = "filter";
  box.placeholder = place.dataset.filter;
  box.setAttribute("aria-label", place.dataset.filter);
  const count = document.createElement("span");
  count.className = "filter-count";
  place.append(box, count);
  const tables = [...place.closest("article").querySelectorAll("table")];
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const table of tables) {
      let here = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        here += !row.hidden;
      }
      (table.closest(".md-typeset__scrollwrap") || table).hidden = !here;
      shown += here;
    }
    count.textContent = words.length ? `${shown} rows` : "";
  });
});
