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
const comparable = new Set(D.runs.filter((run) => run.score !== null).map((run) => run.task)).size < 2;
const routed = D.runs.map((run, index) => index).filter((index) => D.runs[index].routing);
const state = { axis: "steps", run: routed[0], expert: 0, window: -1, sort: null, timer: null };

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
  Plotly.react(id, traces, layout(extra), { displayModeBar: false, responsive: true, scrollZoom: false });
}
function height(id, names, plot) { // of a chart with room for its legend above the plot
  const entry = 48 + 7 * Math.max(...names.map((name) => Math.min(String(name).length, 28)));
  return plot + 20 * Math.ceil(names.length / Math.max(1, Math.floor(($(id).clientWidth - 60) / entry)));
}
function empty(id, text) { Plotly.purge(id); $(id).replaceChildren(element("p", text, "quiet")); }

function drawLoss() {
  const axis = state.axis, label = AXES.find(([key]) => key === axis)[1];
  const traces = D.runs.map((run, index) => ({
    x: run.curve[axis], y: run.curve.loss, name: shortened(run.name), type: "scatter",
    mode: run.curve.loss.length > 60 ? "lines" : "lines+markers", marker: { size: 4 },
    line: { color: runColor(index), width: 2, dash: DASHES[Math.floor(index / 8) % 4] },
    hovertemplate: "%{fullData.name}<br>" + label.toLowerCase() + " %{x:,.6~g}, loss %{y:.4f}<extra></extra>",
  })).filter((trace) => trace.y.length && trace.x.length);
  const averaged = Math.max(...D.runs.map((run) => run.curve.averaged));
  $("loss-note").textContent = "Training loss, nats per token, as the trainer logged it." +
    (averaged > 1 ? ` Long logs are thinned: each point is the mean of about ${averaged} entries.` : "");
  if (!traces.length) return empty("loss", "No run has a log of its loss with this axis.");
  const losses = traces.flatMap((trace) => trace.y), least = losses.reduce((a, b) => Math.min(a, b));
  const ratio = losses.reduce((a, b) => Math.max(a, b)) / least, wide = least > 0 && ratio > D.log_scale_from;
  draw("loss", traces, {
    xaxis: { title: { text: label } }, showlegend: D.runs.length > 1, height: height("loss", D.runs.map((run) => run.name), 270),
    yaxis: wide ? { title: { text: "Loss, log scale" }, type: "log", dtick: ratio > 100 ? 1 : "D2", exponentformat: "none" } : { title: { text: "Loss" } },
  });
}
function drawScore() {
  const axis = state.axis, label = AXES.find(([key]) => key === axis)[1];
  const x = (run) => axis === "tokens" ? run.curve.tokens.at(-1) ?? null : run[axis];
  const shown = D.runs.map((run, index) => [run, index]).filter(([run]) => run.score !== null && x(run) !== null);
  const name = shown.length ? shown[0][0].score_name.replaceAll("_", " ") : "";
  $("score-caption").textContent = !shown.length ? "" : comparable ? `The task's ${name} at the end of each run, higher is better.`
    : "Each run's own task: scores of different tasks cannot be compared.";
  if (!shown.length) return empty("score", "No run was scored, or none has this axis.");
  const traces = shown.map(([run, index]) => ({
    x: [x(run)], y: [run.score], name: shortened(run.name), type: "scatter", mode: "markers",
    marker: { color: runColor(index), size: 11, symbol: SYMBOLS[index % 5] + "-open", line: { width: 2 } },
    hovertemplate: "%{fullData.name}<br>" + label.toLowerCase() + " %{x:,.6~g}, score %{y:.2f}<extra></extra>",
  }));
  draw("score", traces, {
    xaxis: { title: { text: label }, rangemode: "tozero", nticks: 6 }, yaxis: { title: { text: "Score" } }, showlegend: true,
    height: height("score", shown.map(([run]) => run.name), 270),
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
function heatMap(id, values, trace, bar) {
  const r = routing(), { z, names } = table(r, values);
  const narrow = $(id).clientWidth < 480;
  draw(id, [{
    type: "heatmap", z, customdata: names, xgap: 2, ygap: 2, hoverongaps: false, ...trace,
    colorbar: { thickness: 10, outlinewidth: 0, len: 1, tickfont: { size: 11 }, ...bar },
  }], {
    height: Math.min(900, Math.max(210, 86 + (narrow ? 20 : 24) * r.layers.length)), margin: { l: 44, r: 8, t: 8, b: 40 },
    xaxis: { tickvals: r.projections.map((_, i) => i), ticktext: r.projections.map(shortened), tickangle: narrow ? -60 : 0 },
    yaxis: { autorange: "reversed", showgrid: false, title: { text: "Layer" }, tickvals: ticks(r.layers), ticktext: ticks(r.layers).map((i) => r.layers[i]) },
  });
}
function ticks(labels) {
  const every = Math.ceil(labels.length / 36);
  return labels.map((_, i) => i).filter((i) => i % every === 0);
}
function drawWon() {
  const r = routing(), two = r.experts.length === 2, all = state.window < 0;
  const values = all ? r.whole[state.expert] : r.shares[state.expert][state.window];
  const name = escaped(r.experts[state.expert]);
  const scale = two ? [[0, color("--other")], [0.5, color("--middle")], [1, color("--first")]] : [[0, color("--low")], [1, color("--first")]];
  heatMap("won", values, {
    zmin: 0, zmax: 1, colorscale: scale, hovertemplate: `%{customdata}<br>${name} won %{z:.1%}<extra></extra>`,
  }, two ? { tickvals: [0, 0.5, 1], ticktext: [escaped(r.experts[1]), "even", escaped(r.experts[0])] } : { tickformat: ".0%" });
  const [from, to] = all ? [r.first_step, r.last_step] : r.windows[state.window];
  $("shown").textContent = all ? `all steps, ${from} to ${to}` : from === to ? `step ${from}` : `steps ${from} to ${to}`;
  const width = Math.ceil((r.last_step - r.first_step + 1) / r.windows.length);
  $("won-note").textContent = `Share of steps that ${r.experts[state.expert]} won, by layer and projection. The slider's first position is the whole run; ` +
    (width > 1 ? `each other one is about ${width} steps.` : "each other one is a step.");
}
function lines(id, rows, title, format, range, width) {
  const r = routing();
  const traces = rows.map((y, index) => ({
    x: r.line_windows.map(([from, to]) => (from + to) / 2), y, name: shortened(r.projections[index]), type: "scatter", mode: "lines",
    line: { color: runColor(index), width: width(rows.length - 1 - index), dash: DASHES[Math.floor(index / 8) % 4] }, connectgaps: false,
    customdata: r.line_windows.map(([from, to]) => from === to ? `step ${from}` : `steps ${from} to ${to}`),
    hovertemplate: `%{fullData.name}<br>%{customdata}: %{y:${format}}<extra></extra>`,
  }));
  draw(id, traces, { height: height(id, r.projections, 290), xaxis: { title: { text: "Step" } }, yaxis: { title: { text: title }, tickformat: format === ".1%" ? ".0%" : "", range } });
}
function drawSpecial() {
  const r = routing(), steps = r.specialised.map((step) => step < 0 ? null : step);
  heatMap("special", steps, {
    zmin: r.first_step, zmax: r.last_step, colorscale: [[0, color("--accent")], [1, color("--low")]], // and not that of an empty cell
    hovertemplate: "%{customdata}<br>one winner from step %{z:,}<extra></extra>",
  }, { title: { text: "step", side: "right" }, nticks: 5 });
  const sorted = steps.filter((step) => step !== null).sort((a, b) => a - b);
  draw("settled", [{
    x: [...sorted, r.last_step], y: [...sorted.map((_, i) => (i + 1) / sorted.length), 1], type: "scatter", mode: "lines",
    line: { shape: "hv", color: color("--accent"), width: 2 }, hovertemplate: "from step %{x:,}: %{y:.0%}<extra></extra>",
  }], { xaxis: { title: { text: "Step" }, range: [0, r.last_step * 1.02] }, yaxis: { tickformat: ".0%", range: [0, 1.03] }, showlegend: false });
}
function drawRouting() {
  const r = routing();
  $("sentences").replaceChildren(...D.runs[state.run].sentences.map((line) => element("p", line)));
  choice("expert", r.experts.length > 2 ? r.experts.map((name, i) => [i, name]) : [], state.expert, (value) => { state.expert = value; drawRouting(); });
  $("expert-label").textContent = r.experts.length > 2 ? "Show the wins of" : "";
  $("window").max = r.windows.length - 1;
  $("window").value = state.window;
  drawWon();
  lines("share", r.line_shares[state.expert], `Won by ${escaped(r.experts[state.expert])}`, ".1%", [-0.02, 1.02], (above) => Math.min(6, 1.8 + 0.9 * above)); // those that lie on one another show as bands
  $("share-note").textContent = `Share of a projection's decisions that ${r.experts[state.expert]} won` +
    (r.line_windows.some(([a, b]) => b > a) ? `, over windows of about ${r.line_windows[0][1] - r.line_windows[0][0] + 1} steps.` : ", step by step.");
  if (r.experts.length < 2) empty("margin", "With one expert there is no decision.");
  else lines("margin", r.line_margins, "Margin", ".2f", [-0.02, 1.02], () => 1.8);
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
function drawHeadline() {
  const columns = D.columns.filter((column) => D.rows.some((row) => row[column.key] !== null));
  const head = element("tr");
  columns.forEach((column) => {
    const cell = element("th", "", "digits" in column ? "number" : "");
    const sorted = state.sort && state.sort.key === column.key;
    cell.scope = "col";
    cell.setAttribute("aria-sort", !sorted ? "none" : state.sort.down ? "descending" : "ascending");
    const button = element("button", column.label);
    button.type = "button";
    button.onclick = () => {
      state.sort = { key: column.key, down: sorted ? !state.sort.down : "digits" in column };
      drawHeadline();
    };
    cell.append(button);
    head.append(cell);
  });
  const order = D.rows.map((_, index) => index);
  if (state.sort) order.sort((a, b) => compare(D.rows[a][state.sort.key], D.rows[b][state.sort.key], state.sort.down));
  const best = Math.max(...D.rows.map((row) => row.score ?? -Infinity));
  const body = order.map((index) => {
    const line = element("tr");
    columns.forEach((column, place) => {
      const value = D.rows[index][column.key];
      const cell = element("td", "digits" in column ? number(value, column.digits) : value ?? "–", "digits" in column ? "number" : "");
      if (column.key === "score" && D.rows.length > 1 && comparable && value === best) cell.classList.add("best");
      if (place === 0 && D.rows.length > 1) {
        const dot = element("span", "", "dot");
        dot.style.background = `var(--c${index % 8})`;
        cell.prepend(dot);
      }
      line.append(cell);
    });
    return line;
  });
  $("headline").replaceChildren(head, ...body);
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
    const scroll = element("div", "", "scroll"), grid = element("table");
    if (D.runs.length > 1) {
      const head = element("tr");
      head.append(element("th", "", "plain"), ...D.runs.map((run) => element("th", run.name, "plain")));
      grid.append(head);
    }
    rows.forEach((row) => {
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
