// figures: drawn when they come near, in the colours of the page and for its width
const chosen = new Map();
const sixDigits = (colour) => (colour.length === 4 ? "#" + [...colour.slice(1)].map((c) => c + c).join("") : colour);
const hex = (three) => "#" + three.map((n) => (+n).toString(16).padStart(2, "0")).join("").toUpperCase();
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

// narrow pages: panels under each other, legend and colour bar above or below the plot, smaller type
const NARROW = 600, PANEL_GAP = 74, CELL = 11, BOX = 56;
const axesOf = (layout, letter) => Object.keys(layout).filter((name) => name.startsWith(letter + "axis"));
const axisOf = (short) => short[0] + "axis" + short.slice(1);
function panelsOf(layout) {
  const found = axesOf(layout, "x").filter((x) => layout[x].domain).map((x) => {
    const y = axisOf(layout[x].anchor || "y");
    return { x, y, across: layout[x].domain, up: layout[y].domain || [0, 1] };
  });
  return found.sort((a, b) => a.across[0] - b.across[0] || b.up[1] - a.up[1]);
}
const columnsOf = (panels) => new Set(panels.map(({ across }) => across[0].toFixed(3))).size;
function plotHeight({ height, margin }) { return height - margin.t - margin.b; }
function stack(layout) { // column by column, each panel as high as before
  const panels = panelsOf(layout), before = plotHeight(layout);
  const heights = panels.map(({ up }) => before * (up[1] - up[0]));
  const total = heights.reduce((a, b) => a + b, 0) + PANEL_GAP * (panels.length - 1);
  let top = total;
  panels.forEach((panel, i) => {
    panel.now = [Math.max(0, (top - heights[i]) / total), top / total];
    top -= heights[i] + PANEL_GAP;
  });
  const distance = (at, [low, high]) => Math.max(low - at, at - high, 0);
  const move = (item, xs, ys) => { // what is placed on the paper goes with its panel
    const paperX = item.xref === "paper", paperY = item.yref === "paper";
    if (!paperX && !paperY) return item;
    const own = ({ x, y }) => (!paperX && item.xref && axisOf(item.xref.split(" ")[0]) !== x)
      || (!paperY && item.yref && axisOf(item.yref.split(" ")[0]) !== y);
    const far = (p) => 9 * own(p) + (paperX ? distance(item[xs[0]], p.across) : 0) + (paperY ? distance(item[ys[0]], p.up) : 0);
    const panel = panels.reduce((best, p) => (far(p) < far(best) ? p : best));
    const moved = { ...item };
    for (const x of paperX ? xs : []) moved[x] = (item[x] - panel.across[0]) / (panel.across[1] - panel.across[0]);
    for (const y of paperY ? ys : []) {
      moved[y] = panel.now[0] + (item[y] - panel.up[0]) / (panel.up[1] - panel.up[0]) * (panel.now[1] - panel.now[0]);
    }
    return moved;
  };
  const out = { ...layout, height: total + layout.margin.t + layout.margin.b };
  out.annotations = (layout.annotations || []).map((item) => move(item, ["x"], ["y"]));
  out.shapes = (layout.shapes || []).map((item) => move(item, ["x0", "x1"], ["y0", "y1"]));
  for (const { x, y, up, now } of panels) {
    const first = panels.find((p) => p.up[0] === up[0]), from = layout[first.y], axis = layout[y];
    out[x] = { ...layout[x], domain: [0, 1] };
    out[y] = { ...axis, domain: now };
    if (axis.showticklabels === false) {
      Object.assign(out[y], { showticklabels: true, tickvals: from.tickvals, ticktext: from.ticktext });
    }
    if (!axis.title && from.title) out[y].title = from.title;
  }
  return out;
}
const plainLength = (text) => Math.max(...String(text).split(/<br\s*\/?>/).map((line) => line.replace(/<[^>]*>/g, "").length));
function leftRoom(layout, heat) {
  const names = axesOf(layout, "y").flatMap((y) => layout[y].ticktext || []).concat(heat ? [...heat.y] : []);
  const longest = Math.max(0, ...names.map(plainLength));
  return Math.min(layout.margin.l, longest > 6 ? 30 + 5.2 * longest : 54, 165);
}
function legendHeight(data, width) {
  const names = data.filter((t) => t.showlegend !== false && t.name).map((t) => 44 + 6 * t.name.length);
  return 14 + 19 * Math.ceil(names.length / Math.max(1, Math.floor(width / Math.max(...names, 1))));
}
function narrow(data, given, room) {
  const heat = data.find((t) => t.type === "heatmap"), boxes = data.find((t) => t.type === "box");
  const panels = panelsOf(given), { width: before, least } = given.meta, several = columnsOf(panels) > 1;
  if (!several && !heat && !boxes && least > 560) return { data, layout: given, width: Math.max(least, room) }; // it scrolls
  const layout = several ? stack(given) : { ...given };
  const margin = { ...layout.margin, l: leftRoom(layout, heat) };
  const labelled = (layout.annotations || []).some((item) => item.xanchor === "left" && item.xref !== "paper");
  const sideLegend = layout.showlegend && (layout.legend || {}).orientation !== "h";
  margin.r = layout.yaxis2 && layout.yaxis2.side === "right" ? 58 : labelled && !sideLegend ? Math.max(margin.r, 96) : 14;
  if (several && labelled) margin.r = 110;
  const wanted = heat ? margin.l + margin.r + CELL * heat.x.length
    : boxes ? margin.l + margin.r + BOX * new Set(boxes.x).size : 0;
  const width = Math.max(room, wanted, 280);
  const plot = plotHeight(layout), shrunk = (width - margin.l - margin.r) / (before - given.margin.l - given.margin.r);
  let inner = panels.length > 1 || wanted ? plot : Math.max(Math.min(plot, 240), plot * Math.min(1, shrunk));
  if (heat && layout.yaxis.scaleanchor) inner = width - margin.l - margin.r;
  const out = { ...layout, margin, font: { ...layout.font, size: 11 } };
  for (const name of [...axesOf(layout, "x"), ...axesOf(layout, "y")]) {
    out[name] = { ...out[name], ...(boxes && { automargin: true }) };
    if (out[name].title) out[name].title = { ...out[name].title, font: { size: 12 } };
  }
  if (sideLegend) {
    const more = legendHeight(data, width - margin.l - margin.r);
    out.legend = { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: -(margin.b + 4) / inner, yanchor: "top",
      font: { ...(layout.legend || {}).font, size: 11 } };
    margin.b += more;
  }
  if (heat) margin.t = Math.max(margin.t, 44);
  out.annotations = (out.annotations || []).map((item) => (item.showarrow === false ? item
    : { ...item, ax: 0.85 * item.ax, font: { ...item.font, size: 9 } }));
  out.height = inner + margin.t + margin.b;
  return { data: data.map((t) => (t.type === "heatmap" ? { ...t, colorbar: lying(t.colorbar) } : t)), layout: out, width };
}
const lying = (bar) => ({ ...bar, orientation: "h", thickness: 8, x: 0, xanchor: "left", y: 1, yanchor: "bottom", len: 0.8, ypad: 4,
  title: { ...(typeof bar.title === "string" ? { text: bar.title } : bar.title), side: "right" } });
function fitted({ data, layout }, room) {
  const { width = 700, least = 560 } = layout.meta || {}, given = { ...layout, meta: { width, least } };
  if (room < NARROW || (room < least && columnsOf(panelsOf(layout)) > 1)) return narrow(data, given, room);
  return { data, layout, width: Math.max(Math.min(room, width), least) };
}

// five megabytes that only figures need: run when the first one comes near
function plotly() {
  if (!window.Plotly) document.head.append(make("script", document.getElementById("plotly").textContent));
  return window.Plotly;
}
function draw(canvas) {
  const id = canvas.dataset.figure, { plot, choices, picks } = partOf(id);
  const style = getComputedStyle(document.documentElement), of = (name) => sixDigits(style.getPropertyValue(name).trim());
  const colours = { "#222222": of("--ink"), "#666666": of("--muted"), "#DDDDDD": of("--rule"), "#EEEEEE": of("--faint"),
    "#FFFFFF": of("--ground"), "#0072B2": of("--blue"), "#000000": of("--ink"), "#F4F4F2": of("--mid") };
  const choice = canvas.dataset.choice || chosen.get(id), box = canvas.parentElement;
  const { data, layout, width } = fitted(inPageColours((choices && choices[choice]) || plot, colours), box.clientWidth);
  plotly().react(canvas, data, { ...layout, width, autosize: false }, { displaylogo: false, displayModeBar: false });
  if (picks && !canvas.classList.contains("drawn")) {
    canvas.on("plotly_click", (event) => {
      const value = event.points[0] && [].concat(event.points[0].customdata)[0];
      if (value !== undefined) pick(picks[0], picks[1], String(value));
    });
  }
  canvas.classList.add("drawn");
  edges(box);
}
whenNear(".canvas", "300px", (canvas) => setTimeout(draw, 30, canvas)); // tables, which cost little, go first
document.querySelectorAll("select[data-choices]").forEach((menu) => menu.addEventListener("change", () => {
  chosen.set(menu.dataset.choices, menu.value);
  draw(document.querySelector(`.canvas[data-figure="${menu.dataset.choices}"]`));
}));
let resized, wide = innerWidth;
addEventListener("resize", () => {
  if (wide === innerWidth) return; // the bar of a phone's browser came or went
  wide = innerWidth;
  clearTimeout(resized);
  resized = setTimeout(() => document.querySelectorAll(".canvas.drawn").forEach(draw), 150);
});
addEventListener("beforeprint", () => document.querySelectorAll("figure .canvas:not(.drawn)").forEach(draw));
