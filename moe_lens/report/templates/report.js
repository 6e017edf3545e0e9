"use strict";
// Text from models and corpora is only ever set as textContent; cards come escaped from the templates in the page.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

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

// figures: drawn when they come near, in the colours of the page
const figures = new Map();
const figureOf = (id) => { if (!figures.has(id)) figures.set(id, read("data-" + id)); return figures.get(id); };
const chosen = new Map();
const sixDigits = (colour) => (colour.length === 4 ? "#" + [...colour.slice(1)].map((c) => c + c).join("") : colour);
const hex = (parts) => "#" + parts.map((n) => (+n).toString(16).padStart(2, "0")).join("").toUpperCase();
function inPageColours(value, colours) {
  if (typeof value === "string") {
    if (/^#[0-9a-f]{6}$/i.test(value)) return colours[value.toUpperCase()] || value;
    const faint = /^rgba\((\d+), ?(\d+), ?(\d+), ?([\d.]+)\)$/.exec(value);
    const base = faint && colours[hex(faint.slice(1, 4))];
    if (base) return base + Math.round(255 * faint[4]).toString(16).padStart(2, "0");
    return value.replace(/color: ?(#[0-9a-f]{6})/gi, (all, found) => `color:${colours[found.toUpperCase()] || found}`);
  }
  if (Array.isArray(value)) return value.map((v) => inPageColours(v, colours));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, inPageColours(v, colours)]));
  }
  return value;
}
// five megabytes that only figures need: run when the first one comes near
function plotly() {
  if (!window.Plotly) document.head.append(make("script", document.getElementById("plotly").textContent));
  return window.Plotly;
}
function draw(canvas) {
  const id = canvas.dataset.figure, { plot, choices, picks } = figureOf(id);
  const style = getComputedStyle(document.documentElement), of = (name) => sixDigits(style.getPropertyValue(name).trim());
  const colours = { "#222222": of("--ink"), "#666666": of("--muted"), "#DDDDDD": of("--rule"), "#EEEEEE": of("--faint"),
    "#FFFFFF": of("--ground"), "#0072B2": of("--blue"), "#000000": of("--ink"), "#F4F4F2": of("--mid") };
  const choice = canvas.dataset.choice || chosen.get(id);
  const { data, layout } = inPageColours((choices && choices[choice]) || plot, colours);
  const { width: drawnFor = 700, least = 560 } = layout.meta || {};
  const width = Math.max(Math.min(canvas.parentElement.clientWidth, drawnFor), least);
  plotly().react(canvas, data, { ...layout, width, autosize: false }, { displaylogo: false, displayModeBar: false });
  if (picks && !canvas.classList.contains("drawn")) {
    canvas.on("plotly_click", (event) => {
      const value = event.points[0] && [].concat(event.points[0].customdata)[0];
      if (value !== undefined) pick(picks[0], picks[1], String(value));
    });
  }
  canvas.classList.add("drawn");
}
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "300px" });
document.querySelectorAll(".canvas").forEach((canvas) => near.observe(canvas));
document.querySelectorAll("select[data-choices]").forEach((menu) => menu.addEventListener("change", () => {
  chosen.set(menu.dataset.choices, menu.value);
  draw(document.querySelector(`.canvas[data-figure="${menu.dataset.choices}"]`));
}));
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => document.querySelectorAll(".canvas.drawn").forEach(draw), 150);
});

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
  const url = URL.createObjectURL(new Blob([csv(figureOf(id).columns)], { type: "text/csv" }));
  make("a", "", { href: url, download: `${id}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});

// tables: sort by a heading, search in all cells, filter by a menu
const tables = new Map();
const minus = (text) => text.replace("-", "−");
function shown(value, form) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return Array.isArray(value) ? value.join(", ") : String(value);
  const found = /^([+,]*)(?:\.(\d+)([fe%g]))?$/.exec(form || "");
  if (!found) return minus(String(value));
  const [, flags, digits, kind] = found;
  let text = kind === "e" ? value.toExponential(+digits) : kind === "%" ? (100 * value).toFixed(+digits) + " %"
    : kind === "g" ? String(+value.toPrecision(+digits || 6)) : digits !== undefined ? value.toFixed(+digits)
    : value.toLocaleString("en-US");
  if (flags.includes("+") && value > 0) text = "+" + text;
  return minus(text);
}
function fill(state) {
  const { data, box, order, descending, query, wanted } = state;
  const names = Object.keys(data.columns), n = names.length ? data.columns[names[0]].length : 0;
  let rows = [...Array(n).keys()].filter((i) =>
    Object.entries(wanted).every(([name, value]) => !value || String(data.columns[name][i]) === value) &&
    (!query || names.some((name) => String(data.columns[name][i] ?? "").toLowerCase().includes(query))));
  if (order) {
    const column = data.columns[order], sign = descending ? -1 : 1;
    rows.sort((a, b) => {
      const x = column[a], y = column[b];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" && typeof y === "number" ? x - y
        : String(x).localeCompare(String(y), "en", { numeric: true }));
    });
  }
  const body = make("tbody");
  for (const i of rows) {
    const line = make("tr");
    for (const name of names) {
      const value = data.columns[name][i], isNumber = state.numeric.has(name);
      const cell = make("td", null, { class: isNumber ? "number" : state.long.has(name) ? "text long" : state.short.has(name) ? "text short" : "text", dir: isNumber ? "ltr" : "auto" });
      if (name === data.links && /^L\d+\.E\d+$/.test(value)) cell.append(make("a", value, { href: "#" + value }));
      else if (name === "verdict" && value) cell.append(make("span", value, { class: "verdict " + value }));
      else cell.textContent = shown(value, data.forms[name]);
      line.append(cell);
    }
    body.append(line);
  }
  box.querySelector("tbody").replaceWith(body);
  state.counter.textContent = `${rows.length} of ${n} rows`;
  for (const head of box.querySelectorAll("th")) {
    const sorted = head.dataset.name === order ? (descending ? "descending" : "ascending") : "none";
    head.setAttribute("aria-sort", sorted);
  }
}
function build(holder) {
  const id = holder.dataset.table, data = figureOf(id), names = Object.keys(data.columns);
  const box = holder.querySelector(".scroll"), controls = holder.querySelector(".controls");
  const numeric = new Set(names.filter((name) => data.columns[name].some((v) => typeof v === "number")));
  const short = new Set(names.filter((name) => data.columns[name].every((v) => v === null || String(v).length <= 24)));
  const long = new Set(names.filter((name) => data.columns[name].some((v) => typeof v === "string" && v.length > 40)));
  const state = { data, box, numeric, long, short, order: null, descending: false, query: "", wanted: {}, menus: {},
    counter: make("span", "", { "aria-live": "polite" }) };
  const table = make("table"), head = make("tr");
  for (const name of names) {
    const th = make("th", null, { "data-name": name, scope: "col", class: numeric.has(name) ? "number" : "" });
    const button = make("button", data.headings[name], { type: "button" });
    button.addEventListener("click", () => {
      state.descending = state.order === name ? !state.descending : numeric.has(name);
      state.order = name;
      fill(state);
    });
    th.append(button);
    head.append(th);
  }
  const top = make("thead");
  top.append(head);
  table.append(top, make("tbody"));
  box.append(table);
  if (!controls.hidden) {
    const search = make("input", null, { type: "search", placeholder: "search", "aria-label": "search in this table" });
    search.addEventListener("input", () => { state.query = search.value.trim().toLowerCase(); fill(state); });
    if (data.search) controls.append(search);
    for (const name of data.filters) {
      const label = make("label", data.headings[name] + " "), menu = make("select", null, { "data-filter": name });
      menu.append(make("option", "all", { value: "" }));
      const values = [...new Set(data.columns[name].filter((v) => v !== null).map(String))];
      values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      for (const value of values) menu.append(make("option", value, { value }));
      menu.addEventListener("change", () => { state.wanted[name] = menu.value; fill(state); });
      state.menus[name] = menu;
      label.append(menu);
      controls.append(label);
    }
    controls.append(state.counter);
  }
  tables.set(id, state);
  fill(state);
}
document.querySelectorAll("[data-table]").forEach(build);
function pick(table, name, value) {
  const state = tables.get(table);
  if (!state) return;
  state.wanted[name] = value;
  if (state.menus[name]) state.menus[name].value = value;
  fill(state);
  document.getElementById(table).scrollIntoView({ block: "nearest" });
}

// cards: #L7.E12 opens one
let opener = null; // where the focus goes back to
function closeCard() {
  const article = document.getElementById("card"), address = location.hash;
  article.hidden = true;
  history.replaceState(null, "", "#experts");
  const link = opener && opener.isConnected ? opener : document.querySelector(`#expert-table a[href="${address}"]`);
  (link || document.querySelector("#experts h2")).focus();
}
function openCard() {
  const article = document.getElementById("card");
  if (!article) return;
  const address = location.hash.slice(1);
  if (!/^L\d+\.E\d+$/.test(address)) return;
  const found = document.querySelector(`template[data-card="${CSS.escape(address)}"]`);
  const close = make("button", "Close", { type: "button", style: "float:right" });
  close.addEventListener("click", closeCard);
  article.replaceChildren(close, found ? found.content.cloneNode(true) : make("p", `This run has no card of ${address}.`));
  article.hidden = false;
  const trial = document.getElementById("data-trial-expert") && figureOf("trial-expert");
  if (trial && trial.choices && trial.choices[address]) {
    const holder = make("div", null, { class: "scroll" });
    const canvas = make("div", null, { class: "canvas", "data-figure": "trial-expert", "data-choice": address });
    holder.append(canvas);
    article.append(make("h3", "On trial"), holder);
    draw(canvas);
  }
  article.scrollIntoView({ block: "start" });
  article.focus({ preventScroll: true });
}
addEventListener("hashchange", openCard);
addEventListener("keydown", (event) => {
  const article = document.getElementById("card");
  if (event.key === "Escape" && article && !article.hidden) closeCard();
});
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest('a[href^="#L"]');
  if (!link) return;
  opener = link;
  if (link.hash === location.hash) openCard(); // no change of the fragment, so no event
});
setTheme(theme);
openCard();
