"use strict";

// What both pages share: the data that came along, elements made of text alone, and charts.

async function unpack(id) {
  const packed = document.getElementById(id).textContent;
  if (!packed) return "";
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// text as it stands: what would turn or hide writing is spelled out, as Python's visible() does
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : visible(child))));
  return made;
}

function choice(label, values, chosen, onchange) {
  const options = values.map(([value, text]) => element("option", { value, selected: value === chosen }, text));
  return element("label", {}, label, element("select", { onchange: (event) => onchange(event.target.value) }, ...options));
}

function figure(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

const isDark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  return {
    background: null, font, view: { stroke: null },
    axis: { labelColor: soft, titleColor: ink, titleFontWeight: "normal", gridColor: line, domainColor: line, tickColor: line,
      labelFontSize: 12, titleFontSize: 12, gridOpacity: 0.7 },
    axisX: { grid: false }, axisY: { titleAnchor: "end", titleAngle: 0, titleAlign: "left", titleX: 4, titleY: -8 },
    legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontWeight: "normal", offset: 6, layout: { top: { anchor: "end" } } },
  };
}

const drawn = new Map(); // holder -> what draws it again and the view

async function draw(holder, spec, tables) {
  drawn.get(holder)?.view?.finalize();
  const many = Object.values(tables).some((rows) => rows.length > 2000);
  // a height by the line is settled here: a plot that fits its place across can't be
  const height = spec.height?.step ? spec.height.step * Math.max(1, ...Object.values(tables).map((rows) => rows.length)) : spec.height;
  const full = { ...spec, height, datasets: { ...spec.datasets, ...tables }, width: "container", config: theme(),
    autosize: { type: "fit-x", contains: "padding" } };
  const { view } = await vegaEmbed(holder, full, {
    mode: "vega-lite", ast: true, renderer: many ? "canvas" : "svg", actions: { export: true, source: false, compiled: false, editor: false },
    tooltip: { theme: isDark.matches ? "dark" : "light" }, i18n: { CLICK_TO_VIEW_ACTIONS: "Save this picture" },
  });
  holder.querySelector("summary")?.setAttribute("aria-label", "Save this picture");
  holder.querySelector("canvas")?.setAttribute("aria-label", spec.description || "");
  drawn.set(holder, { view, again: () => draw(holder, spec, tables) });
  return view;
}

function redraw() {
  for (const { again } of [...drawn.values()]) again();
}
isDark.addEventListener("change", redraw);

// marks in a chart what is chosen, where something can be: later, for it may be running just now
function showPick(view, field, value) {
  const store = value === null ? [] : [{ unit: "", fields: [{ type: "E", field }], values: [value] }];
  setTimeout(() => {
    try { view.data("pick_store", store).run(); } catch { /* a chart in which nothing is chosen */ }
  });
}
