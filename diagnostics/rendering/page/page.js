"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = new Map(figures.charts.map((chart) => [chart.id, chart]));
  const articles = [...document.querySelectorAll("article")];
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const drawn = new Set();
  let wanted = null; // the reader's choice, over that of the system
  let printing = false;

  const scales = {
    light: ["#f3f6fa", "#c9dcef", "#7fb2de", "#2f78bb", "#0b3468"],
    dark: ["#1b2431", "#1d4470", "#2b77b9", "#7ab8ec", "#e8f4ff"],
  };
  const dark = () => !printing && (wanted ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function axis(given) {
    return {
      gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true,
      ...given, title: { standoff: 8, ...(given.title ?? {}) },
    };
  }

  // In pixels of an A4 page between its margins: three to a row, as page.css has them.
  function paper(box, map, given) {
    const wide = box.closest(".wide") !== null;
    return { width: wide ? 660 : 214, height: map ? 200 : Math.min(given.height ?? 230, wide ? 900 : 300) };
  }

  function layoutOf(chart, box) {
    const map = chart.data[0].type === "heatmap";
    const given = chart.layout;
    return {
      autosize: true,
      margin: map ? { l: 8, r: 8, t: 8, b: 8 } : { l: 52, r: 12, t: 12, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--soft") },
      hoverlabel: { align: "left", bgcolor: color("--raised"), bordercolor: color("--line"), font: { family: getComputedStyle(document.body).fontFamily, color: color("--ink"), size: 13 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant", entrywidth: 124 },
      showlegend: !map && chart.data.some((trace) => trace.showlegend !== false) && chart.data.length > 1,
      dragmode: false, hovermode: "closest",
      ...given,
      xaxis: axis({ ...given.xaxis, fixedrange: true }), yaxis: axis({ ...given.yaxis, fixedrange: true }),
      ...(printing ? paper(box, map, given) : {}),
    };
  }

  function dataOf(chart) {
    const steps = scales[dark() ? "dark" : "light"];
    const scale = steps.map((step, i) => [i / (steps.length - 1), step]);
    return chart.data.map((trace) =>
      trace.type === "heatmap" ? { ...trace, colorscale: scale, customdata: figures.hover[chart.hover] } : trace);
  }

  function draw(box) {
    const chart = charts.get(box.id);
    box.style.height = printing ? "auto" : chart.layout.height ? `${chart.layout.height}px` : "";
    drawn.add(box.id);
    return Plotly.react(box, dataOf(chart), layoutOf(chart, box), { displayModeBar: false, responsive: true });
  }

  const shownArticle = () => articles.find((article) => !article.hidden);
  const drawShown = () => shownArticle().querySelectorAll(".chart").forEach(draw);

  function applyTheme() {
    root.dataset.theme = dark() ? "dark" : "light";
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
    button.setAttribute("aria-pressed", String(dark()));
    drawn.clear();
    drawShown();
  }

  button.addEventListener("click", () => { wanted = dark() ? "light" : "dark"; applyTheme(); });
  prefersDark.addEventListener("change", applyTheme);

  const slider = document.getElementById("checkpoint");
  slider?.addEventListener("input", () => {
    const old = shownArticle();
    const open = [...old.querySelectorAll("section > details")].map((details) => details.open);
    articles.forEach((article, i) => { article.hidden = i !== Number(slider.value); });
    const now = shownArticle();
    const details = [...now.querySelectorAll("section > details")];
    if (details.length === open.length) details.forEach((entry, i) => { entry.open = open[i]; });
    const name = now.getAttribute("aria-label");
    document.getElementById("checkpoint-name").textContent = name;
    slider.setAttribute("aria-valuetext", name);
    now.querySelectorAll(".chart").forEach((box) => { if (!drawn.has(box.id)) draw(box); });
  });

  for (const svg of document.querySelectorAll(".drawing svg")) {
    const told = svg.closest(".graph").querySelector(".told");
    const nodes = [...svg.querySelectorAll("[data-node]")];
    const highways = [...svg.querySelectorAll("[data-pair]")];
    const clear = () => {
      svg.classList.remove("asked");
      for (const element of [...nodes, ...highways]) element.classList.remove("on");
      told.textContent = told.dataset.empty;
    };
    const tellPair = (pair) => {
      clear();
      for (const node of nodes) node.classList.toggle("on", [pair.dataset.v, pair.dataset.w].includes(node.dataset.node));
      pair.classList.add("on");
      told.textContent = pair.dataset.about;
    };
    const tellNode = (node) => {
      clear();
      const name = node.dataset.node;
      const own = highways.filter((pair) => [pair.dataset.v, pair.dataset.w].includes(name));
      own.forEach((pair) => pair.classList.add("on"));
      if (own.length) svg.classList.add("asked");
      node.classList.add("on");
      const lines = own.reverse().map((pair) => {
        const other = pair.dataset.v === name ? pair.dataset.w : pair.dataset.v;
        return `${pair.dataset.about.split("\n").find((line) => line.startsWith("C ="))} with ${other}`;
      });
      told.textContent = [node.dataset.about, ...(lines.length ? ["", ...lines] : [])].join("\n");
    };
    highways.forEach((pair) => { pair.addEventListener("pointerenter", () => tellPair(pair)); });
    nodes.forEach((node, i) => {
      node.addEventListener("pointerenter", () => tellNode(node));
      node.addEventListener("focus", () => tellNode(node));
      node.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
        if (event.key === "Escape") clear();
        if (!step) return;
        event.preventDefault();
        const next = nodes[Math.min(Math.max(i + step, 0), nodes.length - 1)];
        node.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
    svg.addEventListener("pointerleave", clear);
  }

  const opened = [];
  function print(on) {
    if (on === printing) return;
    printing = on;
    if (on) document.querySelectorAll("details:not([open])").forEach((entry) => { entry.open = true; opened.push(entry); });
    else opened.splice(0).forEach((entry) => { entry.open = false; });
    applyTheme();
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));

  applyTheme();
  root.dataset.ready = "true";
})();
