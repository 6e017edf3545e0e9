"use strict";
// Text from models and corpora is only ever set as textContent; cards come escaped from the page.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const parts = new Map();
const partOf = (id) => { if (!parts.has(id)) parts.set(id, read("data-" + id)); return parts.get(id); };
// parts of the page are made when they come near: figures and tables are most of the work
function whenNear(selector, room, then) {
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); then(entry.target); }
  }, { rootMargin: room });
  document.querySelectorAll(selector).forEach((element) => near.observe(element));
}

// boxes that scroll: a fading edge where more is hidden, and a stop of the Tab key only then
function edges(box) {
  const hold = box.parentElement;
  const across = box.scrollWidth > box.clientWidth + 1, down = box.scrollHeight > box.clientHeight + 1;
  hold.classList.toggle("more-left", across && box.scrollLeft > 2);
  hold.classList.toggle("more-right", across && box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  hold.classList.toggle("more-below", down && box.scrollTop + box.clientHeight < box.scrollHeight - 2);
  if (box.closest("nav")) return;
  if (across || down) box.tabIndex = 0; else box.removeAttribute("tabindex");
}
const sized = new ResizeObserver((entries) => entries.forEach((entry) => edges(entry.target)));
function watchEdges(box) {
  box.addEventListener("scroll", () => edges(box), { passive: true });
  sized.observe(box);
  edges(box);
}
document.querySelectorAll(".edge > *").forEach(watchEdges);

// the section that is read, in the bar of links
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const link = links.get(target.id), bar = link.closest("ul");
    if (!isIntersecting) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    const { left, right } = link.getBoundingClientRect(), box = bar.getBoundingClientRect();
    if (left < box.left || right > box.right) bar.scrollLeft += (left + right - box.left - box.right) / 2;
  }
}, { rootMargin: "-25% 0px -74% 0px" });
document.querySelectorAll("main > section").forEach((section) => reading.observe(section));

// rows as CSV
function csv(columns) {
  const names = Object.keys(columns), n = names.length ? columns[names[0]].length : 0;
  const cell = (v) => {
    const text = v === null ? "" : Array.isArray(v) ? JSON.stringify(v) : String(v);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [names.map(cell).join(",")];
  for (let i = 0; i < n; i++) lines.push(names.map((name) => cell(columns[name][i])).join(","));
  return lines.join("\n") + "\n";
}
document.addEventListener("click", (event) => {
  const id = event.target.dataset && event.target.dataset.rows;
  if (!id) return;
  const url = URL.createObjectURL(new Blob([csv(partOf(partOf(id).rows_of || id).columns)], { type: "text/csv" }));
  make("a", "", { href: url, download: `${id}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});

// colour scheme: as the system, light, dark
const themes = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
let theme = "system";
try { theme = localStorage.getItem("moe-lens-theme") || "system"; } catch { /* a page from a file may have no storage */ }
function setTheme(name) {
  theme = themes.includes(name) ? name : "system";
  if (theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = theme;
  themeButton.setAttribute("aria-label", `Colour scheme: ${theme === "system" ? "as the system" : theme}`);
  themeButton.title = themeButton.getAttribute("aria-label");
  try { localStorage.setItem("moe-lens-theme", theme); } catch { /* see above */ }
  document.querySelectorAll(".canvas.drawn").forEach(draw);
}
themeButton.addEventListener("click", () => setTheme(themes[(themes.indexOf(theme) + 1) % themes.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(theme));
