"use strict";
// Everything that comes from a run is text: set with textContent, or escaped before Plotly, which reads some HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runColor = (index) => color("--c" + (index % 8));
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const shortened = (text) => { const s = String(text); return escaped(s.length > 28 ? s.slice(0, 13) + "…" + s.slice(-13) : s); };
const number = (value, digits) => value === null ? "–" : digits === null ? String(+value.toPrecision(4))
  : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => value === null ? "–" : (100 * value).toFixed(1) + " %";
const element = (tag, text = "", className = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

const AXES = [["steps", "Steps"], ["seconds", "Seconds"], ["tokens", "Tokens"]];
const comparable = new Set(D.runs.filter((run) => run.score !== null).map((run) => run.scored_on)).size < 2;
const routed = D.runs.map((run, index) => index).filter((index) => D.runs[index].routing);
const state = { axis: "steps", run: routed[0], expert: 0, window: -1, timer: null };
const sorts = { headline: {} }; // by table: the column and the direction that it is sorted by, if it is

// ---- charts -------------------------------------------------------------------------------------------------------
function layout(extra = {}) {
  const axis = { gridcolor: color("--grid"), linecolor: color("--line"), zeroline: false, automargin: true, ticks: "" };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return {
    height: 290, margin: { l: 44, r: 12, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--quiet") },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink"), size: 12 }, align: "left" },
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: { size: 12 } }, hovermode: "closest",
    xaxis: { ...axis, showgrid: false, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
function draw(id, traces, extra) {
  const made = layout(extra);
  $(id).style.height = `${made.height}px`; // else the charts fall onto one another when Plotly follows the window's size
  Plotly.react(id, traces, made, { displayModeBar: false, responsive: true, scrollZoom: false });
}
function height(id, names, plot) { // of a chart with room for its legend above the plot
  const entry = 48 + 7 * Math.max(...names.map((name) => Math.min(String(name).length, 28)));
  return plot + 20 * Math.ceil(names.length / Math.max(1, Math.floor(($(id).clientWidth - 60) / entry)));
}
function empty(id, text) { Plotly.purge(id); $(id).style.height = ""; $(id).replaceChildren(element("p", text, "quiet")); }

function over(run, index, line, values, name, extra) { // a curve of a run against the chosen axis
  const label = AXES.find(([key]) => key === state.axis)[1].toLowerCase(), [what, digits] = values;
  return {
    x: line[state.axis], y: line[what], name: shortened(name), type: "scatter", ...(D.runs.length > 1 && { legendgroup: index }), ...extra,
    hovertemplate: `${shortened(run.name)}<br>${label} %{x:,.6~g}, ${extra.meta} %{y:.${digits}f}<extra></extra>`,
  };
}
function drawLoss() {
  const label = AXES.find(([key]) => key === state.axis)[1], one = D.runs.length === 1;
  const traces = D.runs.flatMap((run, index) => [
    over(run, index, run.curve, ["loss", 4], one ? "training" : run.name, {
      meta: "loss", mode: run.curve.loss.length > 30 ? "lines" : "lines+markers", marker: { size: 4 },
      line: { color: runColor(index), width: 2, dash: DASHES[Math.floor(index / 8) % 4] },
    }),
    over(run, index, run.evaluations, ["loss", 4], "evaluation", {
      meta: "evaluation loss", mode: "lines+markers", marker: { size: 6, color: runColor(index), symbol: SYMBOLS[index % 5] },
      line: { color: runColor(index), width: 1.2, dash: "dot" }, showlegend: one,
    }),
  ]).filter((trace) => trace.y.length && trace.x.length);
  const averaged = Math.max(...D.runs.map((run) => run.curve.averaged));
  $("loss-note").textContent = "Training loss, nats per token, as the trainer logged it." +
    (averaged > 1 ? ` Long logs are thinned: each point is the mean of about ${averaged} entries.` : "") +
    (D.runs.some((run) => run.evaluations.steps.length) ? ` Dotted: the evaluation's, of ${records()}.` : "");
  if (!traces.length) return empty("loss", "No run has a log of its loss with this axis.");
  const losses = traces.flatMap((trace) => trace.y), least = losses.reduce((a, b) => Math.min(a, b));
  const ratio = losses.reduce((a, b) => Math.max(a, b)) / least, wide = least > 0 && ratio > D.log_scale_from;
  const names = one ? ["training", "evaluation"] : D.runs.map((run) => run.name);
  draw("loss", traces, {
    xaxis: { title: { text: label } }, showlegend: traces.length > 1, height: height("loss", names, 270),
    yaxis: wide ? { title: { text: "Loss, log scale" }, type: "log", dtick: ratio > 100 ? 1 : "D2", exponentformat: "none" } : { title: { text: "Loss" } },
  });
}
function records() {
  const counts = [...new Set(D.runs.filter((run) => run.evaluations.steps.length).map((run) => run.evaluations.records))];
  return counts.length === 1 && counts[0] ? `at most ${counts[0]} records` : "a few records";
}
function drawScore() {
  const axis = state.axis, label = AXES.find(([key]) => key === axis)[1], one = D.runs.length === 1;
  const x = (run) => axis === "tokens" ? run.curve.tokens.at(-1) ?? null : run[axis];
  const scored = (run) => run.evaluations[axis].length > 0 && run.evaluations.score.some((value) => value !== null);
  const ended = (run) => run.score !== null && x(run) !== null;
  const shown = D.runs.map((run, index) => [run, index]).filter(([run]) => scored(run) || ended(run));
  const name = shown.length ? shown[0][0].score_name.replaceAll("_", " ") : "", curves = shown.some(([run]) => scored(run));
  $("score-caption").textContent = !shown.length ? "" : !comparable ? "Each run's own task and records: scores of different ones cannot be compared."
    : `The task's ${name}, higher is better: ` + (curves ? `of ${records()} while training went on, and, larger and open, of all that are scored at the end.` : "at the end of each run. With --eval_strategy it is a curve.");
  if (!shown.length) return empty("score", "No run was scored, or none has this axis.");
  const traces = shown.flatMap(([run, index]) => [
    ...(scored(run) ? [over(run, index, run.evaluations, ["score", 2], one ? "while training" : run.name, {
      meta: "score", mode: "lines+markers", marker: { size: 6, color: runColor(index), symbol: SYMBOLS[index % 5] }, connectgaps: false,
      line: { color: runColor(index), width: 2, dash: DASHES[Math.floor(index / 8) % 4] },
    })] : []),
    ...(ended(run) ? [over(run, index, { [axis]: [x(run)], score: [run.score] }, ["score", 2], one ? "at the end" : run.name, {
      meta: "final score", mode: "markers", showlegend: one || !scored(run),
      marker: { color: runColor(index), size: 12, symbol: SYMBOLS[index % 5] + "-open", line: { width: 2 } },
    })] : []),
  ]);
  draw("score", traces, {
    xaxis: { title: { text: label }, rangemode: "tozero", nticks: 6 }, yaxis: { title: { text: "Score" } }, showlegend: !one || traces.length > 1,
    height: height("score", one ? ["while training", "at the end"] : shown.map(([run]) => run.name), 270),
  });
}
function bars(id, key, digits) {
  const shown = D.runs.map((run, index) => [run, index]).filter(([run]) => run[key] !== null);
  if (!shown.length) return empty(id, "No run has this number.");
  draw(id, [{
    type: "bar", orientation: "h", y: shown.map((_, place) => place), x: shown.map(([run]) => run[key]), width: 0.6,
    marker: { color: shown.map(([, index]) => runColor(index)) }, customdata: shown.map(([run]) => escaped(run.name)),
    text: shown.map(([run]) => number(run[key], digits)), textposition: "auto", constraintext: "none", insidetextanchor: "end", hovertemplate: "%{customdata}: %{text}<extra></extra>",
  }], {
    height: 60 + 34 * shown.length, xaxis: { showgrid: true, rangemode: "tozero", nticks: 6 }, showlegend: false,
    yaxis: { autorange: "reversed", tickvals: shown.map((_, place) => place), ticktext: shown.map(([run]) => shortened(run.name)), showgrid: false },
  });
}

// ---- routing ------------------------------------------------------------------------------------------------------
const routing = () => D.runs[state.run].routing;
function table(r, values) {
  const z = r.layers.map(() => r.projections.map(() => null));
  const names = r.layers.map(() => r.projections.map(() => ""));
  r.cells.forEach(([row, column], module) => { z[row][column] = values[module]; names[row][column] = escaped(r.modules[module]); });
  return { z, names };
}
const BAR = { thickness: 10, outlinewidth: 0, len: 1, tickfont: { size: 11 } };
const gridHeight = () => Math.min(900, Math.max(230, 86 + 24 * routing().layers.length));
function heatMap(id, values, trace, bar) {
  const r = routing(), { z, names } = table(r, values);
  const width = $(id).clientWidth, narrow = width < 480, roomy = (width - 120) / r.projections.length > 56 && r.layers.length < 34;
  draw(id, [{
    type: "heatmap", z, customdata: names, xgap: 2, ygap: 2, hoverongaps: false, ...trace, texttemplate: roomy ? trace.texttemplate : "",
    textfont: { size: 11 }, colorbar: { ...BAR, ...bar },
  }], {
    height: gridHeight(), margin: { l: 44, r: 8, t: 8, b: 40 },
    xaxis: { tickvals: r.projections.map((_, i) => i), ticktext: r.projections.map(shortened), tickangle: narrow ? -60 : 0 },
    yaxis: { autorange: "reversed", showgrid: false, title: { text: "Layer" }, tickvals: ticks(r.layers), ticktext: ticks(r.layers).map((i) => r.layers[i]) },
  });
}
function ticks(labels) {
  const every = Math.ceil(labels.length / 36);
  return labels.map((_, i) => i).filter((i) => i % every === 0);
}
function shareColors() { // of a share that an expert won: between two experts, or from none to all
  const r = routing(), two = r.experts.length === 2;
  return [two ? [[0, color("--other")], [0.5, color("--middle")], [1, color("--first")]] : [[0, color("--low")], [1, color("--first")]],
    two ? { tickvals: [0, 0.5, 1], ticktext: [escaped(r.experts[1]), "even", escaped(r.experts[0])] } : { tickformat: ".0%" }];
}
const span = ([from, to]) => from === to ? `step ${from.toLocaleString("en")}` : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}`;
function widthOfWindows() {
  const r = routing(), width = Math.ceil((r.last_step - r.first_step + 1) / r.windows.length);
  return width > 1 ? `about ${width.toLocaleString("en")} steps` : "a step";
}
function drawWon() {
  const r = routing(), all = state.window < 0, [colorscale, bar] = shareColors();
  const values = all ? r.whole[state.expert] : r.shares[state.expert][state.window];
  heatMap("won", values, {
    zmin: 0, zmax: 1, colorscale, texttemplate: "%{z:.0%}", hovertemplate: `%{customdata}<br>${escaped(r.experts[state.expert])} won %{z:.1%}<extra></extra>`,
  }, bar);
  $("shown").textContent = all ? `all ${span([r.first_step, r.last_step])}` : span(r.windows[state.window]);
  $("won-note").textContent = `Share of steps that ${r.experts[state.expert]} won, by layer and projection. The slider's first position is the whole run; each other one is ${widthOfWindows()}.`;
}
function drawShare() { // a strip per projection: lines would lie on one another
  const r = routing(), [colorscale, bar] = shareColors(), rows = r.projections.map((_, i) => i);
  draw("share", [{
    type: "heatmap", z: r.projection_shares[state.expert], x: r.windows.map(([from, to]) => (from + to) / 2), y: rows, ygap: 3, hoverongaps: false,
    zmin: 0, zmax: 1, colorscale, colorbar: { ...BAR, ...bar }, customdata: rows.map((i) => r.windows.map((w) => `${escaped(r.projections[i])}, ${span(w)}`)),
    hovertemplate: `%{customdata}<br>${escaped(r.experts[state.expert])} won %{z:.1%}<extra></extra>`,
  }], {
    height: Math.min(900, Math.max(230, 70 + 26 * rows.length)), xaxis: { title: { text: "Step" } },
    yaxis: { autorange: "reversed", showgrid: false, tickvals: rows, ticktext: r.projections.map(shortened) },
  });
  $("share-note").textContent = `Share of a projection's decisions that ${r.experts[state.expert]} won; a column is ${widthOfWindows()}.`;
}
function drawMargin() {
  const r = routing();
  if (r.experts.length < 2) return empty("margin", "With one expert there is no decision.");
  draw("margin", r.projection_margins.map((y, index) => ({
    x: r.windows.map(([from, to]) => (from + to) / 2), y, name: shortened(r.projections[index]), type: "scatter", mode: "lines", connectgaps: false,
    line: { color: runColor(index), width: 1.8, dash: DASHES[Math.floor(index / 8) % 4] }, customdata: r.windows.map(span),
    hovertemplate: "%{fullData.name}<br>%{customdata}: %{y:.2f}<extra></extra>",
  })), { height: height("margin", r.projections, 230), xaxis: { title: { text: "Step" } }, yaxis: { title: { text: "Margin" }, range: [-0.02, 1.02] } });
}
function drawSpecial() {
  const r = routing(), steps = r.specialised.map((step) => step < 0 ? null : step);
  heatMap("special", steps, {
    zmin: r.first_step, zmax: r.last_step, colorscale: [[0, color("--accent")], [1, color("--low")]], texttemplate: "%{z:,}", // and not that of an empty cell
    hovertemplate: "%{customdata}<br>one winner from step %{z:,}<extra></extra>",
  }, { title: { text: "step", side: "right" }, nticks: 5 });
  const sorted = steps.filter((step) => step !== null).sort((a, b) => a - b);
  draw("settled", [{
    x: [...sorted, r.last_step], y: [...sorted.map((_, i) => (i + 1) / sorted.length), 1], type: "scatter", mode: "lines",
    line: { shape: "hv", color: color("--accent"), width: 2 }, hovertemplate: "from step %{x:,}: %{y:.0%}<extra></extra>",
  }], { height: gridHeight(), xaxis: { title: { text: "Step" }, range: [0, r.last_step * 1.02] }, yaxis: { tickformat: ".0%", range: [0, 1.03] }, showlegend: false });
}
function drawRouting() {
  const r = routing();
  $("sentences").replaceChildren(...D.runs[state.run].sentences.map((line) => element("p", line)));
  choice("expert", r.experts.length > 2 ? r.experts.map((name, i) => [i, name]) : [], state.expert, (value) => { state.expert = value; drawRouting(); });
  $("expert-label").textContent = r.experts.length > 2 ? "Show the wins of" : "";
  $("window").max = r.windows.length - 1;
  $("window").value = state.window;
  drawWon();
  drawShare();
  drawMargin();
  drawSpecial();
}

// ---- controls and tables ------------------------------------------------------------------------------------------
function choice(id, options, chosen, then) {
  $(id).replaceChildren(...options.map(([value, text]) => {
    const button = element("button", text);
    button.type = "button";
    button.setAttribute("aria-pressed", String(value === chosen));
    button.onclick = () => { then(value); };
    return button;
  }));
}
function drawAxis() {
  choice("axis", AXES, state.axis, (value) => { state.axis = value; drawAxis(); });
  drawLoss();
  drawScore();
}
function drawRouted() {
  if (!routed.length) return;
  choice("routed", routed.length > 1 ? routed.map((i) => [i, D.runs[i].name]) : [], state.run, (value) => {
    Object.assign(state, { run: value, expert: 0, window: -1 });
    drawRouted();
  });
  drawRouting();
}
function header(columns, sort, redraw) { // of a table that sorts by a click; "sort" is what it is sorted by
  const head = element("tr");
  columns.forEach(({ key, label, ...column }) => {
    const cell = element("th", "", "digits" in column ? "number" : ""), sorted = sort.key === key;
    cell.scope = "col";
    cell.setAttribute("aria-sort", !sorted ? "none" : sort.down ? "descending" : "ascending");
    const button = element("button", label);
    button.type = "button";
    button.onclick = () => { Object.assign(sort, { key, down: sorted ? !sort.down : "digits" in column }); redraw(); };
    cell.append(button);
    head.append(cell);
  });
  return head;
}
function inOrder(rows, sort, value) {
  return "key" in sort ? [...rows].sort((a, b) => compare(value(a, sort.key), value(b, sort.key), sort.down)) : rows;
}
function drawHeadline() {
  const columns = D.columns.filter((column) => D.rows.some((row) => row[column.key] !== null));
  const order = inOrder(D.rows.map((_, index) => index), sorts.headline, (index, key) => D.rows[index][key]);
  const best = Math.max(...D.rows.map((row) => row.score ?? -Infinity));
  const most = Object.fromEntries(columns.map(({ key }) => [key, Math.max(...D.rows.map((row) => row[key] ?? 0))]));
  const body = order.map((index) => {
    const line = element("tr"), many = D.rows.length > 1;
    columns.forEach((column, place) => {
      const value = D.rows[index][column.key];
      const cell = element("td", "digits" in column ? number(value, column.digits) : value ?? "–", "digits" in column ? "number" : "");
      if (column.key === "score" && many && comparable && value === best) cell.classList.add("best");
      if (column.bar && value > 0 && D.rows.filter((row) => row[column.key] !== null).length > 1) {
        cell.classList.add("bar-cell");
        cell.style.setProperty("--part", value / most[column.key]);
        cell.style.setProperty("--color", `var(--c${index % 8})`);
      }
      if (place === 0 && many) cell.prepend(dot(index));
      line.append(cell);
    });
    return line;
  });
  $("headline").replaceChildren(header(columns, sorts.headline, drawHeadline), ...body);
}
function dot(index) {
  const made = element("span", "", "dot");
  made.style.background = `var(--c${index % 8})`;
  return made;
}
function drawTiles() {
  $("tiles").replaceChildren(...D.tiles.map((tile) => {
    const made = element("div", "", "tile"), whose = element("span", "", "quiet");
    if (tile.run !== null) whose.append(dot(tile.run), D.runs[tile.run].name);
    made.append(element("span", tile.label, "quiet"), element("strong", tile.value), whose);
    return made;
  }));
}
function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing stays below
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -order : order;
}
function drawConfiguration() {
  const wanted = $("find").value.trim().toLowerCase();
  const differing = D.configuration.flatMap((section) => section.title === "Metrics" ? [] : section.rows.filter((row) => row.differs && row.key !== "output_dir"))
    .filter((row, index, all) => all.findIndex((other) => other.key === row.key) === index);
  const sections = [...(differing.length ? [{ title: "What differs between the runs", rows: differing, open: true }] : []), ...D.configuration];
  const open = new Set([...$("configuration").querySelectorAll("details[open]")].map((d) => d.dataset.title));
  const first = !$("configuration").childElementCount;
  $("configuration").replaceChildren(...sections.map((section) => {
    const rows = section.rows.filter((row) => !wanted || row.key.toLowerCase().includes(wanted));
    const details = element("details");
    details.dataset.title = section.title;
    details.open = wanted ? rows.length > 0 : first ? Boolean(section.open) : open.has(section.title);
    const summary = element("summary", section.title);
    summary.append(element("span", String(rows.length), "quiet"));
    const scroll = element("div", "", "scroll"), grid = element("table"), sort = sorts[section.title] ??= {};
    const columns = D.runs.map((run, index) => ({ key: index, label: D.runs.length > 1 ? run.name : "Value" }));
    grid.append(header([{ key: -1, label: "Option" }, ...columns], sort, drawConfiguration));
    inOrder(rows, sort, (row, key) => key < 0 ? row.key : row.values[key] || null).forEach((row) => {
      const line = element("tr", "", row.differs && !section.open ? "differs" : "");
      line.append(element("td", row.key), ...row.values.map((value) => element("td", value)));
      grid.append(line);
    });
    scroll.append(grid);
    details.append(summary, scroll);
    return details;
  }));
}
function play() {
  if (state.timer) { clearInterval(state.timer); state.timer = null; } else {
    state.timer = setInterval(() => {
      state.window = state.window + 1 >= routing().windows.length ? -1 : state.window + 1;
      $("window").value = state.window;
      drawWon();
      if (state.window < 0) play();
    }, 220);
  }
  $("play").textContent = state.timer ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", state.timer ? "Pause" : "Play");
}
function drawAll() {
  drawAxis();
  drawRouted();
  bars("memory", "memory", 0);
  bars("time", "seconds", 1);
}

$("title").textContent = D.title;
$("subtitle").textContent = D.subtitle;
$("notes").replaceChildren(...D.notes.map((note) => element("li", note)));
$("score-note").textContent = [...new Set(D.runs.map((run) => run.score_name).filter(Boolean))].map((name) => `Score is the task's primary metric${name === "score" ? "" : ", " + name.replaceAll("_", " ")}, in percent.`).join(" ");
drawTiles();
drawHeadline();
drawConfiguration();
$("find").oninput = drawConfiguration;
$("window").oninput = (event) => { state.window = Number(event.target.value); drawWon(); };
$("play").onclick = play;
if (!routed.length) {
  const note = element("p", "None of these runs routes: their methods have no choice of experts, so there is nothing to show here.", "quiet");
  $("routing").replaceChildren($("h-routing"), note);
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let width = innerWidth;
addEventListener("resize", () => { if (Math.abs(innerWidth - width) > 40) { width = innerWidth; drawAll(); } });
