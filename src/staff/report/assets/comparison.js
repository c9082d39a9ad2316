// The page of a comparison: its charts, for the task, metric and methods that are chosen.

const SHOWN = 8; // methods at first, as many as there are colours
let data, chosen;

async function begin() {
  if (!window.DecompressionStream) {
    for (const plot of document.querySelectorAll(".plot")) plot.textContent = "This browser is too old to draw charts; the raw figures stand below.";
    return;
  }
  data = JSON.parse(await unpack("numbers"));
  const tasks = unique(data.means.map((line) => line.task)), methods = ranked(tasks[0]);
  const first = [...new Set([...methods.filter((name) => ["staff", data.baseline].includes(name)), ...methods])].slice(0, SHOWN);
  chosen = { task: tasks[0], metric: metricsOf(tasks[0])[0], methods: new Set(first) };
  form(tasks);
  await show();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

const unique = (values) => [...new Set(values)];
const metricsOf = (task) => unique(data.means.filter((line) => line.task === task).map((line) => line.metric));

// methods, the one with the largest mean difference to random first
function ranked(task, metric = metricsOf(task)[0]) {
  const names = unique(data.means.filter((line) => line.pruning_rate !== "").map((line) => line.method));
  const mean = (name) => {
    const own = data.differences.filter((line) => line.method === name && line.task === task && line.metric === metric);
    return own.reduce((sum, line) => sum + line.difference, 0) / (own.length || 1);
  };
  return names.sort((a, b) => mean(b) - mean(a));
}

function form(tasks) {
  const boxes = ranked(chosen.task, chosen.metric).map((name) => {
    const box = element("input", { type: "checkbox", checked: chosen.methods.has(name), onchange: (event) => { event.target.checked ? chosen.methods.add(name) : chosen.methods.delete(name); show(); } });
    return element("label", { class: "check" }, box, name);
  });
  const task = (name) => { chosen.task = name; if (!metricsOf(name).includes(chosen.metric)) chosen.metric = metricsOf(name)[0]; form(tasks); show(); };
  document.getElementById("filters").replaceChildren(
    choice("Task", tasks.map((name) => [name, name]), chosen.task, task),
    choice("Metric", metricsOf(chosen.task).map((name) => [name, data.metrics[name]]), chosen.metric, (name) => { chosen.metric = name; form(tasks); show(); }),
    element("fieldset", {}, element("legend", {}, "Methods"), ...boxes));
}

async function show() {
  const here = (line) => line.task === chosen.task && line.metric === chosen.metric;
  const order = ranked(chosen.task, chosen.metric).filter((name) => chosen.methods.has(name));
  const sorted = (lines) => order.flatMap((name) => lines.filter((line) => line.method === name).sort((a, b) => a.pruning_rate - b.pruning_rate));
  const means = sorted(data.means.filter((line) => here(line) && line.pruning_rate !== ""));
  means.forEach((line, i) => { line.is_last = means[i + 1]?.method !== line.method; line.label = line.mean; });
  const beside = data.means.filter((line) => here(line) && line.pruning_rate === "");
  apart(means.filter((line) => line.is_last), [...means, ...beside].map((line) => line.mean));
  await picture("differences", data.specs.differences, { table: sorted(data.differences.filter(here)) },
    ["method", "rate", "difference", "low", "high", "corrected", "outcome"]);
  for (const by of ["pruning_rate", "passes"]) {
    // a name stands at the right end of its line: there the lowest rate is the dearest
    const rows = by === "pruning_rate" ? means : means.filter((line) => line.passes).map((line, i, all) =>
      ({ ...line, label: line.mean, is_last: !all.some((other) => other.method === line.method && other.passes > line.passes) }));
    await picture(by, data.specs[`${by}-${chosen.metric}`], { table: rows, beside }, ["method", "rate", "mean", "low", "high", "passes"]);
  }
}

// names at the ends of lines, moved apart where they would lie on one another
function apart(lines, all) {
  const gap = (Math.max(...all) - Math.min(...all)) * 0.05, from = [...lines].sort((a, b) => a.mean - b.mean);
  from.forEach((line, i) => { if (i) line.label = Math.max(line.label, from[i - 1].label + gap); });
  const over = from.length ? (from.at(-1).label - from.at(-1).mean) / 2 : 0; // half of the way up, half down
  from.forEach((line) => { if (line.label !== line.mean) line.label -= over; });
}

const HEADS = { rate: "pruned", low: "from", high: "to", corrected: "p (Holm)", passes: "passes of the target" };

async function picture(name, spec, tables, columns) {
  const place = document.querySelector(`figure[data-chart="${name}"]`);
  if (!place) return;
  place.hidden = !tables.table.length;
  if (place.hidden) return;
  await draw(place.querySelector(".plot"), spec, tables);
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, HEADS[column] ?? column)));
  const lines = [...tables.table, ...(tables.beside ?? [])].map((line) => element("tr", {}, ...columns.map((column, i) => {
    const value = line[column] === "" || line[column] === undefined ? "–" : line[column];
    return element(i ? "td" : "th", i ? {} : { scope: "row" }, typeof value === "number" ? figure(value) : value ?? "–");
  })));
  const table = element("table", { class: "figures" }, element("thead", {}, head), element("tbody", {}, ...lines));
  place.querySelector(".table").replaceChildren(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Figures: ${name}` }, table));
}

begin();
