"use strict";
// Conveniences alone: without this script the page is whole.
(() => {
  const root = document.documentElement;

  const button = document.querySelector("button.theme");
  if (button) {
    const system = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      show();
    });
    system.addEventListener("change", show);
    show();
    button.hidden = false;
  }

  // What is folded away on the screen is open on paper.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  // "−0.012 to +0.030", "< 0.001", "1 234" and "at least 12" are sorted by their first number.
  const number = (text) => {
    const found = text.replace(/\u2212/g, "-").replace(/(\d)[\u202f\u00a0,](?=\d{3})/g, "$1").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? Number(found[0]) - (/^\s*</.test(text) ? 1e-12 : 0) : NaN;
  };
  const ordered = (first, second) => {
    const [one, two] = [number(first), number(second)];
    if (Number.isNaN(one) || Number.isNaN(two)) return Number.isNaN(one) - Number.isNaN(two);
    return one - two;
  };
  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const press = document.createElement("button");
      press.type = "button";
      press.append(...head.childNodes);
      head.append(press);
      press.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        const isText = head.classList.contains("text");
        const text = (row) => row.cells[column].textContent.trim();
        const compare = isText ? (a, b) => a.localeCompare(b, "en", { numeric: true }) : ordered;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const unknown = !isText && (Number.isNaN(number(text(a))) || Number.isNaN(number(text(b))));
          const way = down && !unknown ? -1 : 1; // what has no number stays at the end
          return way * compare(text(a), text(b));
        });
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        table.classList.add("sorted");
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
