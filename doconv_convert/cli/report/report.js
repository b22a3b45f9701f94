"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

for (const box of document.querySelectorAll(".search")) {
  const input = box.querySelector("input");
  const count = box.querySelector("output");
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
  box.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      row.hidden = !words.every((word) => texts[index].includes(word));
      shown += !row.hidden;
    });
    count.textContent = `${shown} of ${rows.length}`;
  });
}

// Under a picture: the name and the figure of the bar that is pointed at.
for (const figure of document.querySelectorAll("figure")) {
  const table = document.getElementById(figure.dataset.table);
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.dataset.key === figure.dataset.key);
  const svg = figure.querySelector("svg");
  const mark = svg.querySelector(".mark");
  const told = figure.querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * Number(figure.dataset.slots));
    const row = table.tBodies[0].rows[index];
    mark.setAttribute("visibility", row ? "visible" : "hidden");
    mark.setAttribute("x", index);
    told.textContent = row ? `${row.cells[0].textContent}: ${row.cells[column].textContent}` : "";
  });
  svg.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    told.textContent = "";
  });
}
