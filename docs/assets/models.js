// The filters of the catalogue: plain words and `*` in the name, exact values elsewhere. What is
// chosen is in the page's address, so that it can be sent to somebody. A click on a head sorts.
"use strict";
(() => {
  const form = document.querySelector("form.filters");
  if (!form) return;
  const table = document.querySelector(".models table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const column = Object.fromEntries(heads.map((head, i) => [head.textContent, i]));
  const rows = [...body.rows].map((row) => {
    const text = (name) => row.cells[column[name]].textContent;
    return {
      row,
      name: text("name"),
      family: text("family"),
      of: text("of"),
      licence: text("licence"),
      tasks: text("tasks").split(", "),
      parameters: Number(row.cells[column.parameters].dataset.value),
      commercial: row.dataset.commercial,
    };
  });
  const count = document.querySelector(".count");

  // Every word must be somewhere in the name; dashes and underscores are alike.
  const plain = (text) => text.toLowerCase().replaceAll("-", "_");
  function named(query) {
    const words = plain(query).split(/\s+/).filter(Boolean);
    const patterns = words.map((word) =>
      new RegExp(word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*")));
    return (name) => patterns.every((pattern) => pattern.test(plain(name)));
  }

  function show() {
    const asked = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
    const fits = named(asked.name || "");
    let shown = 0;
    for (const it of rows) {
      const is = fits(it.name)
        && ["family", "of", "licence", "commercial"].every((key) => !asked[key] || asked[key] === it[key])
        && (!asked.task || it.tasks.includes(asked.task))
        && (!asked.parameters || it.parameters <= Number(asked.parameters));
      it.row.hidden = !is;
      shown += is;
    }
    count.textContent = shown === rows.length
      ? `${rows.length} checkpoints` : `${shown} of ${rows.length} checkpoints`;
    const query = new URLSearchParams(asked).toString();
    history.replaceState(null, "", location.pathname + (query ? `?${query}` : "") + location.hash);
  }

  function sort(head, i) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const cell = ({ row }) => row.cells[i];
    const order = "value" in cell(rows[0]).dataset
      ? (a, b) => cell(a).dataset.value - cell(b).dataset.value
      : (a, b) => cell(a).textContent.localeCompare(cell(b).textContent, "en", { numeric: true });
    rows.sort((a, b) => (up ? order(a, b) : order(b, a)));
    body.append(...rows.map(({ row }) => row));
  }

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head, i));
    head.replaceChildren(button);
  });
  for (const [key, value] of new URLSearchParams(location.search)) {
    const field = form.elements.namedItem(key);
    if (field) field.value = value;
  }
  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show)); // once the fields are empty
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
