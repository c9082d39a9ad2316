// The page of a run: its charts, and the table of samples that they filter.

const PAGE = 50;
const FATES = { 1: "kept", 0: "dropped", x: "set aside" };
const SHORT = { prompt_tokens: "prompt tokens", response_tokens: "response tokens", target_effort: "target's effort" };
let data, cell, order, texts = new Map();
let filters = {}, sort = { by: "row", up: true }, page = 0;
const views = new Map(); // chart -> its view

async function begin() {
  if (!window.DecompressionStream) {
    for (const plot of document.querySelectorAll(".plot")) plot.textContent = "This browser is too old to draw charts; the figures stand in the table below.";
    return;
  }
  data = JSON.parse(await unpack("numbers"));
  document.getElementById("cell")?.addEventListener("change", (event) => show(Number(event.target.value)));
  await show(0);
  for (const line of (await unpack("texts")).split("\n")) {
    if (!line) continue;
    const [place, turns] = JSON.parse(line);
    texts.set(place, turns);
  }
  table();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

async function show(number) {
  cell = data.cells[number];
  filters = {};
  page = 0;
  if (!(sort.by in cell.columns)) sort = { by: "row", up: true };
  for (const article of document.querySelectorAll("article")) article.hidden = Number(article.dataset.cell) !== number;
  form();
  table();
  for (const place of document.querySelectorAll(`article[data-cell="${number}"] figure[data-chart]`)) {
    const name = place.dataset.chart, { spec, records, picks } = data.charts[name];
    if (views.has(name)) continue;
    const rows = name.startsWith("every_sample") ? samples() : records;
    const view = await draw(place.querySelector(".plot"), data.specs[spec], { table: rows });
    views.set(name, view);
    view.addEventListener("click", (_, item) => {
      if (!item?.datum) return;
      if (picks === "row") open(item.datum.row);
      else pick(name, picks, item.datum);
    });
  }
}

// every sample as the chart of all of them has it, those kept drawn last
function samples() {
  const names = Object.keys(cell.columns);
  const rows = data.rows.row.map((row, i) => {
    const made = { row, fate: FATES[cell.fate[i]] };
    for (const name of names) made[name] = cell.columns[name][i];
    return made;
  });
  return rows.filter((row) => row.fate !== "set aside").sort((a, b) => (a.fate === "kept") - (b.fate === "kept"));
}

// what a click in a chart has chosen becomes a filter
function pick(chart, picks, { region, name }) {
  const record = data.charts[chart].records.find((each) => each.name === name);
  if (picks === "region" && region !== undefined) filters.region = String(region);
  else if (picks === "source" && record?.label) filters.source = record.label;
  else if (record && picks !== "source") filters.range = { ...record, picks, chart };
  else return;
  page = 0;
  form();
  table();
  document.getElementById("count").scrollIntoView({ block: "nearest" });
}

// ---- filters ----

function set(name, value) {
  filters[name] = value === "" ? undefined : value;
  page = 0;
  marks();
  table();
}

function marks() {
  for (const [name, view] of views) {
    const { picks, records } = data.charts[name];
    if (picks === "region") showPick(view, "region", filters.region === undefined ? null : Number(filters.region));
    else if (picks === "source") showPick(view, "name", records.find((each) => each.label === filters.source)?.name ?? null);
    else if (picks !== "row") showPick(view, "name", filters.range?.chart === name ? filters.range.name : null);
  }
}

function form() {
  const holder = document.getElementById("filters");
  const search = element("input", { type: "search", value: filters.text ?? "", placeholder: "words or an id", oninput: (event) => set("text", event.target.value.trim().toLowerCase()) });
  const parts = [element("label", {}, "Search", search)];
  if (cell.regions?.length) {
    const regions = cell.regions.map(([number, group, name]) => [String(number), group ? `${group}: ${name}` : name]);
    parts.push(choice("Region", [["", "all"], ...regions, ["-1", "none (hardest, or set aside)"]], filters.region, (value) => set("region", value)));
  }
  parts.push(choice("Kept or dropped", [["", "all"], ["1", "kept"], ["0", "dropped"], ...(cell.fate.includes("x") ? [["x", "set aside before the choice"]] : [])], filters.fate, (value) => set("fate", value)));
  if (cell.verified.length) parts.push(choice("Verified on the target", [["", "all"], ["yes", "verified"], ["no", "not verified"]], filters.verified, (value) => set("verified", value)));
  if (data.rows.sources) parts.push(choice("Source", [["", "all"], ...data.rows.sources.map((name) => [name, name])], filters.source, (value) => set("source", value)));
  parts.push(element("button", { type: "button", onclick: () => { filters = {}; page = 0; form(); marks(); table(); } }, "Show all"));
  if (filters.range) {
    const what = `${cell.titles[filters.range.picks] ?? ""} ${filters.range.name} ✕`.trim();
    parts.push(element("button", { type: "button", class: "chip", onclick: () => { set("range", ""); form(); } }, what));
  }
  holder.replaceChildren(...parts);
  holder.onsubmit = (event) => event.preventDefault();
  marks();
}

function fits(i, verified) {
  const { text, region, fate, source, range } = filters;
  if (region !== undefined && cell.region[i] !== Number(region)) return false;
  if (fate !== undefined && cell.fate[i] !== fate) return false;
  if (filters.verified !== undefined && verified.has(i) !== (filters.verified === "yes")) return false;
  if (source !== undefined && data.rows.sources[data.rows.source[i]] !== source) return false;
  if (range?.picks === "repeats") {
    if (data.rows.repeats[i] !== range.label) return false;
  } else if (range) {
    const value = cell.columns[range.picks][i];
    if (value === null || value === undefined || value < range.low || value >= range.high) return false;
  }
  if (!text) return true;
  if (String(data.rows.row[i]) === text || String(data.rows.id?.[i] ?? "").toLowerCase().includes(text)) return true;
  return (texts.get(i) ?? []).some((turn) => turn[1].toLowerCase().includes(text));
}

// ---- the table ----

function columns() {
  const made = [["row", "row", (i) => data.rows.row[i]], ["fate", "kept", (i) => FATES[cell.fate[i]]],
    ["text", "text", (i) => (texts.get(i) ?? [["", null]])[0][1]]];
  for (const name of Object.keys(cell.columns)) made.push([name, SHORT[name] ?? name, (i) => cell.columns[name][i], name === cell.score ? "number" : "number less"]);
  if (data.rows.sources) made.push(["source", "source", (i) => data.rows.sources[data.rows.source[i]], "less label"]);
  return made;
}

function table() {
  const verified = new Set(cell.verified), all = columns();
  const value = (all.find(([name]) => name === sort.by) ?? all[0])[2];
  order = [];
  for (let i = 0; i < data.rows.row.length; i++) if (fits(i, verified)) order.push(i);
  const sign = sort.up ? 1 : -1;
  const compared = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1; // what is missing comes last
    if (y === null || y === undefined) return -1;
    return x < y ? -sign : x > y ? sign : 0;
  };
  if (sort.by !== "row" || !sort.up) order.sort(compared);
  const pages = Math.max(1, Math.ceil(order.length / PAGE));
  page = Math.min(page, pages - 1);
  document.getElementById("count").textContent = `${order.length.toLocaleString("en")} of ${data.rows.row.length.toLocaleString("en")} rows`;
  const heads = all.map(([name, title, , kind]) => {
    const direction = sort.by === name ? (sort.up ? "ascending" : "descending") : null;
    const arrow = direction ? (sort.up ? " ↑" : " ↓") : "";
    const sorted = () => { sort = { by: name, up: sort.by === name ? !sort.up : !(name in cell.columns) }; page = 0; table(); document.querySelector(`#rows th[data-name="${name}"] button`).focus(); };
    return element("th", { scope: "col", "aria-sort": direction, class: kind, "data-name": name }, element("button", { type: "button", onclick: sorted }, title + arrow));
  });
  const body = element("tbody", {}, ...order.slice(page * PAGE, (page + 1) * PAGE).map((i) => line(i, all)));
  const head = element("thead", {}, element("tr", {}, ...heads));
  const caption = element("caption", { class: "hidden" }, "The samples: choose a row to read it in full");
  document.getElementById("rows").replaceChildren(element("table", {}, caption, head, body));
  const turn = (by) => { page += by; table(); document.getElementById("rows").scrollIntoView({ block: "start" }); };
  document.getElementById("pages").replaceChildren(
    element("button", { type: "button", disabled: page === 0, onclick: () => turn(-1) }, "Previous"),
    element("span", {}, `page ${page + 1} of ${pages}`),
    element("button", { type: "button", disabled: page >= pages - 1, onclick: () => turn(1) }, "Next"));
}

function line(i, all) {
  const preview = texts.get(i)?.map((turn) => turn[1].slice(0, 160)).join(" → ") ?? "not on this page";
  const cells = all.map(([name, , value, kind], place) => {
    if (place === 0) return element("th", { scope: "row" }, element("button", { type: "button", class: "open", "aria-expanded": "false", "aria-label": `row ${value(i)}: read it in full` }, String(value(i))));
    if (name === "fate") return element("td", { class: `fate${cell.fate[i]}` }, value(i));
    if (name === "text") return element("td", { class: "text", dir: "auto" }, preview);
    const shown = value(i);
    return element("td", { class: kind, title: kind?.includes("label") ? visible(shown ?? "") : null }, typeof shown === "number" ? figure(shown) : shown ?? "–");
  });
  const made = element("tr", { class: "row", "data-row": data.rows.row[i], onclick: () => toggle(made, i, all.length) }, ...cells);
  return made;
}

function toggle(row, i, width) {
  const button = row.querySelector("button.open"), is = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!is));
  if (is) return row.nextElementSibling.remove();
  row.after(element("tr", { class: "full" }, element("td", { colspan: width }, ...inFull(i))));
}

const ROLES = { user: "Prompt", assistant: "Response", system: "System", tool: "Tool", text: "Text" };

function inFull(i) {
  const turns = texts.get(i);
  const facts = Object.keys(cell.columns).map((name) => `${cell.titles[name]} ${figure(cell.columns[name][i])}`);
  const region = cell.region && (cell.regions ?? []).find(([number]) => number === cell.region[i]);
  if (data.rows.id?.[i]) facts.unshift(`id ${data.rows.id[i]}`);
  if (region) facts.push(`region ${region[1] ? `${region[1]}, ` : ""}${region[2]}`);
  if (cell.reasons[i]) facts.push(`set aside: ${cell.reasons[i]}`);
  const said = element("p", { class: "note" }, facts.join(" · "));
  if (!turns) return [said, element("p", {}, `The text of this row is not on this page; it is row ${data.rows.row[i]} of the data, counted from 0.`)];
  const parts = turns.map(([role, text, trained]) => element("div", { class: trained ? "turn trained" : "turn" },
    element("h4", {}, (ROLES[role] ?? role) + (trained ? " (the loss is taken on it)" : "")), element("pre", { dir: "auto" }, text)));
  return [said, ...parts];
}

// a point of a chart was chosen: its row alone, in full
function open(row) {
  filters = { text: String(row) };
  page = 0;
  form();
  table();
  const found = document.querySelector(`#rows tr[data-row="${row}"]`);
  found?.click();
  found?.scrollIntoView({ block: "center" });
}

begin();
