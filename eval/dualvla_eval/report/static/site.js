// Every page: light and dark, sortable tables (the order is part of the address), published rows on and off.
"use strict";

const theme = {
  saved() {
    try { return localStorage.getItem("dualvla-theme"); } catch { return null; } // storage may be forbidden
  },
  apply(name) {
    if (name) document.documentElement.dataset.theme = name;
  },
  toggle() {
    const now = document.documentElement.dataset.theme;
    const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    this.apply(dark ? "light" : "dark");
    try { localStorage.setItem("dualvla-theme", dark ? "light" : "dark"); } catch { /* the choice lasts for this page */ }
  },
};
theme.apply(theme.saved()); // before anything is painted

/** The part of the address after `#`, as parameters. */
function readHash() {
  return new URLSearchParams(location.hash.slice(1));
}

function writeHash(params, push = false) {
  const url = `${location.pathname}${location.search}${params.size ? `#${params}` : ""}`;
  history[push ? "pushState" : "replaceState"](null, "", url);
}

class SortableTable {
  constructor(table) {
    this.table = table;
    this.rows = [...table.tBodies[0].rows];
    this.heads = [...table.tHead.rows[0].cells];
    this.heads.forEach((head, i) => head.querySelector(".sort")?.addEventListener("click", () => this.clicked(i)));
    this.restore();
  }

  /** Numbers start with the largest, words with A; a second click turns the order, a third gives the first one back. */
  clicked(i) {
    const head = this.heads[i];
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const second = first === "descending" ? "ascending" : "descending";
    const now = head.getAttribute("aria-sort");
    const next = now === null ? first : now === first ? second : null;
    this.sort(i, next);
    const params = readHash();
    if (next) params.set(`sort-${this.table.dataset.name}`, `${head.dataset.key}.${next}`);
    else params.delete(`sort-${this.table.dataset.name}`);
    writeHash(params);
  }

  restore() {
    const [key, order] = (readHash().get(`sort-${this.table.dataset.name}`) ?? "").split(".");
    const i = this.heads.findIndex((head) => head.dataset.key === key);
    if (i >= 0 && ["ascending", "descending"].includes(order)) this.sort(i, order);
  }

  sort(i, order) {
    this.heads.forEach((head) => head.removeAttribute("aria-sort"));
    if (order) this.heads[i].setAttribute("aria-sort", order);
    const sign = order === "descending" ? -1 : 1;
    const numeric = this.heads[i].classList.contains("number");
    const value = (row) => row.cells[i].dataset.value;
    const compare = (a, b) => {
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === ""); // absent ones stay last
      return sign * (numeric ? value(a) - value(b) : value(a).localeCompare(value(b)));
    };
    this.table.tBodies[0].append(...(order ? [...this.rows].sort(compare) : this.rows));
  }
}

function setUpPublished(toggle) {
  const section = toggle.closest("section");
  const key = `hide-${section.id}`;
  toggle.checked = !readHash().has(key);
  const show = () => section.classList.toggle("hide-published", !toggle.checked);
  toggle.addEventListener("change", () => {
    const params = readHash();
    if (toggle.checked) params.delete(key);
    else params.set(key, "1");
    writeHash(params);
    show();
  });
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", () => theme.toggle());
  document.querySelectorAll("table[data-name]").forEach((table) => new SortableTable(table));
  document.querySelectorAll("[data-toggles=published]").forEach(setUpPublished);
});
