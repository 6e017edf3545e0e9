// tables: made when they come near; sorted by a heading, searched in all cells, filtered by menus. Only the rows that
// are scrolled to are elements, before a search of the browser (Ctrl-F) FOUND of them, and in print PRINTED
const CHUNK = 60, FOUND = 3000, PRINTED = 500;
const tables = new Map();
const inOrder = new Intl.Collator("en", { numeric: true }).compare;
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
function ranks(state, name) { // place of every value in the order of its column, taken once
  if (!state.ranks[name]) {
    const column = state.data.columns[name];
    if (state.numeric.has(name)) state.ranks[name] = column.map((v) => (v === null ? NaN : +v));
    else {
      const values = [...new Set(column.filter((v) => v !== null).map(String))].sort(inOrder);
      const place = new Map(values.map((value, i) => [value, i]));
      state.ranks[name] = column.map((v) => (v === null ? NaN : place.get(String(v))));
    }
  }
  return state.ranks[name];
}
function texts(state) { // every row as one text in small letters, for the search
  const columns = Object.values(state.data.columns);
  state.texts ||= Array.from({ length: state.n }, (_, i) => columns.map((column) => column[i] ?? "").join("\n").toLowerCase());
  return state.texts;
}
function fill(state) {
  const { data, box, order, descending, query, n } = state;
  const wanted = Object.entries(state.wanted).filter(([, value]) => value).map(([name, value]) => [data.columns[name], value]);
  const text = query && texts(state);
  state.rows = [...Array(n).keys()].filter((i) =>
    wanted.every(([column, value]) => String(column[i]) === value) && (!query || text[i].includes(query)));
  if (order) {
    const rank = ranks(state, order), sign = descending ? -1 : 1;
    state.rows.sort((a, b) => {
      const x = rank[a], y = rank[b], gone = (x !== x) - (y !== y); // what is missing stays last
      return gone || (x === x && y === y ? sign * (x - y) : 0) || a - b;
    });
  }
  const body = make("tbody");
  state.body.replaceWith(body);
  state.body = body;
  box.scrollTop = 0;
  more(state);
  state.counter.textContent = `${state.rows.length.toLocaleString("en-US")} of ${n.toLocaleString("en-US")} rows`;
  for (const head of box.querySelectorAll("th")) {
    const sorted = head.dataset.name === order ? (descending ? "descending" : "ascending") : "none";
    head.setAttribute("aria-sort", sorted);
  }
}
function more(state, upTo = state.body.childElementCount + CHUNK) {
  const found = document.createDocumentFragment();
  for (const i of state.rows.slice(state.body.childElementCount, upTo)) found.append(line(state, i));
  state.body.append(found);
  edges(state.box);
}
function line(state, i) {
  const { data, columns } = state, row = document.createElement("tr");
  for (const { name, form, kind, ends } of columns) {
    const value = data.columns[name][i], cell = document.createElement("td");
    cell.className = kind;
    if (kind !== "number") cell.dir = "auto";
    if (name === data.links && /^L\d+\.E\d+$/.test(value)) cell.append(make("a", value, { href: "#" + value }));
    else if (name === "verdict" && value) cell.append(make("span", value, { class: "verdict " + value }));
    else cell.textContent = shown(value, form);
    if (ends && value !== null) {
      const [low, high] = ends.map((end) => shown(data.columns[end][i], form));
      if (low !== "–" || high !== "–") cell.append(make("span", ` [${low}, ${high}]`, { class: "interval" }));
    }
    row.append(cell);
  }
  return row;
}
function columnsOfTable(data) {
  const ends = new Set(Object.values(data.intervals).flat()), names = Object.keys(data.columns).filter((name) => !ends.has(name));
  return names.map((name) => {
    const values = data.columns[name].filter((v) => v !== null), is = (test) => values.some(test);
    const kind = is((v) => typeof v === "number") ? "number" : is((v) => typeof v === "string" && v.length > 40) ? "text long"
      : is((v) => String(v).length > 24) ? "text" : "text short";
    return { name, form: data.forms[name], kind, ends: data.intervals[name] };
  });
}
function build(holder) {
  const id = holder.dataset.table;
  if (tables.has(id)) return tables.get(id);
  const data = partOf(id), columns = columnsOfTable(data);
  const box = holder.querySelector(".scroll"), controls = holder.querySelector(".controls");
  const state = { data, box, columns, numeric: new Set(columns.filter((c) => c.kind === "number").map((c) => c.name)),
    n: columns.length ? data.columns[columns[0].name].length : 0, order: null, descending: false, query: "", wanted: {},
    menus: {}, ranks: {}, rows: [], body: make("tbody"), counter: make("span", "", { role: "status" }) };
  const table = make("table", null, { "aria-label": holder.querySelector("h3").textContent }), head = make("tr");
  for (const { name, kind } of columns) {
    const th = make("th", null, { "data-name": name, scope: "col", class: kind === "number" ? "number" : "" });
    const button = make("button", data.headings[name], { type: "button" });
    button.addEventListener("click", () => {
      state.descending = state.order === name ? !state.descending : state.numeric.has(name);
      state.order = name;
      fill(state);
    });
    th.append(button);
    head.append(th);
  }
  const top = make("thead");
  top.append(head);
  table.append(top, state.body);
  box.append(table);
  box.style.minHeight = "";
  box.addEventListener("scroll", () => {
    if (box.scrollTop + 2 * box.clientHeight > box.scrollHeight) more(state);
  }, { passive: true });
  if (!controls.hidden) addControls(state, controls);
  tables.set(id, state);
  fill(state);
  return state;
}
function addControls(state, controls) {
  const { data } = state;
  const search = make("input", null, { type: "search", placeholder: "search", "aria-label": "search in this table" });
  search.addEventListener("input", () => { state.query = search.value.trim().toLowerCase(); fill(state); });
  if (data.search) controls.append(search);
  for (const name of data.filters) {
    const label = make("label", data.headings[name] + " "), menu = make("select", null, { "data-filter": name });
    menu.append(make("option", "all", { value: "" }));
    const values = [...new Set(data.columns[name].filter((v) => v !== null).map(String))].sort(inOrder);
    for (const value of values) menu.append(make("option", value, { value }));
    menu.addEventListener("change", () => { state.wanted[name] = menu.value; fill(state); });
    state.menus[name] = menu;
    label.append(menu);
    controls.append(label);
  }
  controls.append(state.counter);
}
whenNear("[data-table]", "600px", build);
const buildAll = (rows) => document.querySelectorAll("[data-table]").forEach((holder) => more(build(holder), rows));
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "f") buildAll(FOUND);
});
addEventListener("beforeprint", () => {
  buildAll(PRINTED);
  for (const { box, rows, body } of tables.values()) {
    const left = rows.length - body.childElementCount;
    box.dataset.left = left ? `and ${left.toLocaleString("en-US")} rows more, in the page and its downloads` : "";
  }
});
function pick(table, name, value) {
  const holder = document.getElementById(table);
  if (!holder) return;
  const state = build(holder);
  state.wanted[name] = value;
  if (state.menus[name]) state.menus[name].value = value;
  fill(state);
  holder.scrollIntoView({ block: "nearest" });
}
// the link to a card in the table of experts, which may have to be made first
function linkTo(address) {
  const holder = document.getElementById("expert-table");
  if (!holder) return null;
  const state = build(holder), i = state.data.links ? state.data.columns[state.data.links].indexOf(address) : -1;
  const at = state.rows.indexOf(i);
  if (at >= state.body.childElementCount) more(state, at + CHUNK);
  return at < 0 ? null : state.body.children[at].querySelector("a");
}
