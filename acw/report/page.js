"use strict";

// A click on a column's head sorts by it, best or first letter first, then the other way round. Each group of rows is
// sorted by itself, and what has no value stays last.
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const table = head.closest("table");
    const first = head.dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [u, v] = [a, b].map((row) => row.cells[head.cellIndex]);
      if ("number" in u.dataset && "number" in v.dataset) return sign * (u.dataset.number - v.dataset.number);
      if ("number" in u.dataset || "number" in v.dataset) return "number" in u.dataset ? -1 : 1;
      return sign * u.textContent.localeCompare(v.textContent, undefined, { numeric: true });
    };
    for (const body of table.tBodies) {
      body.append(...[...body.rows].filter((row) => !row.classList.contains("group")).sort(compare));
    }
  });
}

// All switches of one name go together, where they have the choice; each part is shown for its own.
function show(name, choice) {
  for (const box of document.querySelectorAll("[data-switched]")) {
    const parts = [...box.children];
    if (box.dataset.switched !== name || !parts.some((part) => part.dataset.choice === choice)) continue;
    for (const part of parts) part.hidden = part.dataset.choice !== choice;
  }
  for (const select of document.querySelectorAll("select")) {
    if (select.name === name && [...select.options].some((one) => one.value === choice)) select.value = choice;
  }
}
for (const select of document.querySelectorAll("select")) {
  select.addEventListener("change", () => show(select.name, select.value));
}
