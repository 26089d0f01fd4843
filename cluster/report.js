"use strict";
/* One page's behaviour: charts by Vega-Lite, a table that searches and sorts, a detail panel.
   Texts enter the page through textContent only. */
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = new Map(data.clusters.map((cluster) => [cluster.id, cluster]));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const SHAPES = ["circle", "triangle-up", "square", "diamond"];
  const PATHS = {
    "circle": "M7 1a6 6 0 1 0 0 12a6 6 0 1 0 0-12z",
    "triangle-up": "M7 1L13.5 13H.5z",
    "square": "M2 2h10v10H2z",
    "diamond": "M7 0L13 7L7 14L1 7z",
  };
  // Eight hues after Okabe and Ito that people with colour-blindness tell apart; shapes multiply them.
  const HUES = {
    light: ["#0072b2", "#e08a00", "#009e73", "#cc5fa0", "#c24400", "#3fa9e0", "#7a4fa3", "#8a8a1f"],
    dark: ["#4aa3df", "#f0a830", "#2fc79a", "#e58cc0", "#ff7f50", "#8fd3ff", "#b592e0", "#c9c95a"],
  };
  // Noise, -1, is grey and small.
  const hue = (id) => id < 0 ? "#8c8c8c" : HUES[dark.matches ? "dark" : "light"][id % 8];
  const shape = (id) => id < 0 ? "circle" : SHAPES[Math.floor(id / 8) % SHAPES.length];
  const number = new Intl.NumberFormat("en");
  let selected = -1;
  let mapView = null;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function drawMark(holder) {
    const id = Number(holder.dataset.cluster);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 14 14");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", PATHS[shape(id)]);
    path.setAttribute("fill", hue(id));
    svg.append(path);
    holder.replaceChildren(svg);
  }

  function markOf(id) {
    const mark = element("span", "mark");
    mark.dataset.cluster = id;
    mark.setAttribute("aria-hidden", "true");
    return mark;
  }

  function documentList(title, documents) {
    if (!documents.length) return [];
    const list = element("ul", "documents");
    for (const document_ of documents) {
      const item = element("li");
      item.append(element("p", "", document_.text || "(no text)"));
      const parts = [`id ${document_.id}`, `distance ${document_.distance.toFixed(3)}`];
      if (document_.label) parts.push(document_.label);
      item.append(element("p", "hint", parts.join(" · ")));
      list.append(item);
    }
    return [element("h3", "", title), list];
  }

  function showDetail(id) {
    const cluster = byId.get(id);
    const panel = document.getElementById("detail");
    if (!cluster) { panel.replaceChildren(element("p", "hint", `Cluster ${id} is among the small ones this page leaves out.`)); return; }
    const head = element("div", "detail-head");
    head.append(markOf(id), element("h2", "", cluster.name ? `Cluster ${id}: ${cluster.name}` : `Cluster ${id}`));
    head.append(element("span", "hint", `${number.format(cluster.size)} documents, ${(100 * cluster.share).toFixed(1)}% of all in clusters`));
    const children = [head];
    if (cluster.label) children.push(element("p", "hint", `Most frequent label: ${cluster.label} (${Math.round(100 * cluster.labelShare)}%)`));
    if (cluster.keywords.length) {
      const chips = element("ul", "chips");
      for (const word of cluster.keywords) chips.append(element("li", "", word));
      children.push(chips);
    }
    children.push(...documentList("Nearest to the centre", cluster.central));
    children.push(...documentList("Showing its breadth", cluster.diverse));
    if (!cluster.size) children.push(element("p", "hint", "No document lies nearest to this centroid."));
    panel.replaceChildren(...children);
    panel.scrollTop = 0;
    panel.querySelectorAll(".mark").forEach(drawMark);
  }

  function select(id, highlight) {
    selected = highlight ? id : -1;
    for (const row of document.querySelectorAll("#cluster-table tbody tr")) {
      const isIt = highlight && Number(row.dataset.id) === id;
      row.classList.toggle("selected", isIt);
      row.querySelector(".open").setAttribute("aria-pressed", String(isIt));
    }
    if (id >= 0) showDetail(id);
    if (mapView) mapView.signal("selected", selected).run();
  }

  /* Table: rows come escaped from the page itself; here they are only hidden, shown and ordered. */
  function setUpTable() {
    const body = document.querySelector("#cluster-table tbody");
    const rows = [...body.rows];
    const search = document.getElementById("search");
    const matches = document.getElementById("matches");
    const texts = new Map(rows.map((row) => {
      const cluster = byId.get(Number(row.dataset.id));
      const documents = [...cluster.central, ...cluster.diverse].map((d) => d.text || "");
      return [row, [row.textContent, cluster.label || "", ...cluster.keywords, ...documents].join(" ").toLowerCase()];
    }));
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = words.every((word) => texts.get(row).includes(word));
        row.hidden = !fits;
        shown += fits;
      }
      matches.textContent = words.length ? `${shown} of ${rows.length} clusters` : "";
    };
    search.addEventListener("input", filter);
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) select(Number(row.dataset.id), true);
    });
    document.getElementById("show-all").addEventListener("click", () => select(-1, false));
    for (const button of document.querySelectorAll("#cluster-table th button")) {
      button.addEventListener("click", () => {
        const header = button.closest("th");
        const descending = header.getAttribute("aria-sort") !== "descending";
        document.querySelectorAll("#cluster-table th").forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = button.dataset.key;
        const numeric = key === "id" || key === "size" || key === "spread";
        rows.sort((a, b) => {
          const [x, y] = [a.dataset[key], b.dataset[key]];
          const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
          return (descending ? -order : order) || Number(a.dataset.id) - Number(b.dataset.id);
        });
        body.append(...rows);
      });
    }
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: "transparent", font,
      view: { stroke: null },
      axis: { labelColor: read("--soft"), titleColor: read("--soft"), gridColor: read("--line"), domainColor: read("--line"), tickColor: read("--line"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
      legend: { labelColor: read("--soft"), titleColor: read("--soft"), titleFontWeight: "normal" },
      header: { labelColor: read("--ink"), titleColor: read("--soft"), labelFontSize: 12 },
      text: { color: read("--ink") },
      accent: read("--accent"), quiet: read("--quiet"), ground: read("--card"),
    };
  }

  function embed(id, spec) {
    const { accent, quiet, ground, ...config } = theme();
    return vegaEmbed(`#${id}`, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, config }, { actions: false, renderer: "canvas" });
  }

  async function drawMap() {
    const { x, y, cluster, text, id, levels } = data.map;
    const chosen = document.getElementById("level");
    const level = levels.length ? levels[chosen ? Number(chosen.value) : levels.length - 1] : { cluster, labels: [] };
    const colors = theme();
    const values = x.map((_, i) => ({ x: x[i], y: y[i], c: cluster[i], t: text[i], id: id[i], color: hue(level.cluster[i]), shape: shape(level.cluster[i]), k: cluster[i] < 0 ? "noise: in no dense region" : (byId.get(cluster[i]) || { keywords: [] }).keywords.slice(0, 4).join(", ") }));
    const holder = document.getElementById("map");
    const axis = { axis: null, scale: { zero: false, nice: false, padding: 12 } };
    const lit = "selected < 0 || datum.c == selected";
    const result = await embed("map", {
      width: holder.clientWidth, height: holder.clientHeight, autosize: { type: "fit", contains: "padding" }, padding: 0,
      params: [{ name: "selected", value: selected }],
      layer: [{
      data: { values },
      params: [{ name: "zoom", select: { type: "interval", zoom: "wheel![event.shiftKey]" }, bind: "scales" }],
      mark: { type: "point", filled: true, cursor: "pointer", strokeWidth: 0 },
      encoding: {
        x: { field: "x", type: "quantitative", ...axis }, y: { field: "y", type: "quantitative", ...axis },
        color: { field: "color", type: "nominal", scale: null }, shape: { field: "shape", type: "nominal", scale: null },
        opacity: { condition: [{ test: "datum.c < 0 && selected < 0", value: 0.35 }, { test: lit, value: 0.8 }], value: 0.07 },
        size: { condition: { test: `datum.c >= 0 && (${lit})`, value: values.length > 1500 ? 26 : 42 }, value: 18 },
        tooltip: [{ field: "c", title: "Cluster" }, ...(data.hasTexts ? [{ field: "k", title: "About" }, { field: "t", title: "Text" }] : []), { field: "id", title: "Id" }],
      } }, ...(level.labels.length ? ["halo", "ink"] : []).map((part) => ({
      data: { values: level.labels },
      mark: { type: "text", fontSize: 12, fontWeight: 600, clip: true, tooltip: null, ...(part === "halo" ? { stroke: colors.ground, strokeWidth: 4, strokeJoin: "round", color: colors.ground } : { color: colors.text.color }) },
      encoding: { x: { field: "x", type: "quantitative", ...axis }, y: { field: "y", type: "quantitative", ...axis }, text: { field: "t" } },
      }))],
    });
    mapView = result.view;
    holder.__view = mapView;
    mapView.addEventListener("click", (event, item) => { if (item && item.datum && item.datum.c >= 0) select(item.datum.c, true); });
  }

  function drawSizes() {
    const colors = theme();
    const half = data.sizeStep / 2;
    const values = data.sizes.map((size, place) => { const rank = place * data.sizeStep + 1; return { rank, size, left: rank - half, right: rank + half }; });
    return embed("sizes", {
      width: "container", height: 240, data: { values },
      mark: { type: "bar", color: colors.accent, binSpacing: values.length > 120 ? 0 : 1 },
      encoding: {
        x: { field: "left", type: "quantitative", title: "clusters, largest first", bin: { binned: true }, scale: { nice: false, zero: false }, axis: { tickMinStep: 1, grid: false, format: "d" } },
        x2: { field: "right" },
        y: { field: "size", type: "quantitative", title: "documents" },
        tooltip: [{ field: "rank", title: "Rank" }, { field: "size", title: "Documents", format: "," }],
      },
    });
  }

  function drawCurve() {
    if (!data.curve || !data.curve.length) return null;
    const colors = theme();
    const names = { silhouette: "Silhouette", stability: "Stability", elbow: "Elbow" };
    const values = data.curve.flatMap((row) => Object.keys(names).map((key) => ({ k: row.k, measure: names[key], value: row[key] })));
    const x = { field: "k", type: "quantitative", scale: { type: "log", nice: false }, title: "number of clusters", axis: { grid: false, format: "d", values: data.curveTicks } };
    return embed("curve", {
      data: { values },
      facet: { row: { field: "measure", type: "nominal", title: null, sort: Object.values(names), header: { labelAngle: 0, labelAlign: "left", labelOrient: "top", labelAnchor: "start" } } },
      spacing: 8, resolve: { scale: { y: "independent" } },
      spec: {
        width: Math.max(220, document.getElementById("curve").clientWidth - 70), height: 90,
        layer: [
          { mark: { type: "rule", color: "#d55e00", strokeDash: [4, 3], strokeWidth: 1.5 }, encoding: { x: { datum: data.numClusters } } },
          { mark: { type: "line", point: { filled: true, size: 28 }, color: colors.accent, interpolate: "linear" }, encoding: { x, y: { field: "value", type: "quantitative", title: null, scale: { zero: false }, axis: { tickCount: 3 } }, tooltip: [{ field: "k", title: "Clusters" }, { field: "measure", title: "Measure" }, { field: "value", title: "Value", format: ".3f" }] } },
        ],
      },
    });
  }

  function drawConfusion() {
    if (!data.confusion) return null;
    const colors = theme();
    const { labels, clusters, shares, counts } = data.confusion;
    const values = labels.flatMap((label, i) => clusters.map((cluster, j) => ({ label, cluster: String(cluster), share: shares[i][j], count: counts[i][j] })));
    return embed("confusion", {
      width: "container", height: 60 + 22 * labels.length, data: { values }, mark: { type: "rect", stroke: colors.ground, strokeWidth: 1 },
      encoding: {
        x: { field: "cluster", type: "nominal", sort: clusters.map(String), title: "cluster", axis: { labelAngle: 0, labelOverlap: true } },
        y: { field: "label", type: "nominal", sort: labels, title: null, axis: { labelLimit: 220 } },
        color: { field: "share", type: "quantitative", scale: { range: [colors.quiet, colors.accent], domain: [0, 1] }, legend: { title: "share of label", format: ".0%" } },
        tooltip: [{ field: "label", title: "Label" }, { field: "cluster", title: "Cluster" }, { field: "count", title: "Documents", format: "," }, { field: "share", title: "Of the label", format: ".1%" }],
      },
    });
  }

  async function draw() {
    document.querySelectorAll(".mark").forEach(drawMark);
    await Promise.all([drawMap(), drawSizes(), drawCurve(), drawConfusion()]);
    document.documentElement.dataset.ready = "true";
  }

  setUpTable();
  document.getElementById("level")?.addEventListener("change", drawMap);
  showDetail(data.clusters[0].id);
  draw();
  dark.addEventListener("change", draw);
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 200); });
})();
