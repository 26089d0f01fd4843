"use strict";
/* One page's behaviour: the map, charts by Vega-Lite, a table that searches and sorts, a detail panel.
   Texts enter the page through textContent only. */
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = new Map(data.clusters.map((cluster) => [cluster.id, cluster]));
  const number = new Intl.NumberFormat("en");
  let map = null;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const drawMark = (holder) => Marks.draw(holder, Marks.ofCluster(Number(holder.dataset.cluster)));

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

  /* What kept columns say of the cluster at a place of the page's table. */
  const figure = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

  function columnFigures(place) {
    const rows = [], charts = [];
    for (const column of data.columns) {
      if (column.sum) {
        const [sum, mean] = [column.sum[place], column.mean[place]];
        rows.push([column.name, mean === null ? "none" : `sum ${figure.format(sum)}, mean ${figure.format(mean)}`]);
      } else if (column.top) {
        const all = data.clusters[place].size;
        rows.push([column.name, column.top[place].map(([value, count]) => `${column.values[value]} ${Math.round(100 * count / all)}%`).join(", ")]);
      } else if (column.time && column.time.starts.length) {
        charts.push(element("h3", "", `${column.name}, by ${column.time.unit}`), timeline(column.time, column.time.counts[place]));
      }
    }
    const list = element("dl", "columns");
    for (const [name, value] of rows) {
      const row = element("div");
      row.append(element("dt", "", name), element("dd", "", value));
      list.append(row);
    }
    return rows.length ? [list, ...charts] : charts;
  }

  function timeline(time, counts) {
    const most = Math.max(1, ...counts), peak = counts.indexOf(Math.max(...counts));
    const holder = element("figure", "timeline");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${counts.length} 10`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Documents by ${time.unit} from ${time.starts[0]} to ${time.starts[counts.length - 1]}; most in ${time.starts[peak]}: ${counts[peak]}`);
    counts.forEach((count, i) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const tall = 10 * count / most;
      for (const [name, value] of Object.entries({ x: i + 0.08, y: 10 - tall, width: 0.84, height: tall })) bar.setAttribute(name, value);
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = `${time.starts[i]}: ${number.format(count)}`;
      bar.append(title);
      svg.append(bar);
    });
    holder.append(svg, element("figcaption", "hint", `${time.starts[0]} to ${time.starts[counts.length - 1]}; most in ${time.starts[peak]}: ${number.format(counts[peak])}`));
    return holder;
  }

  function showDetail(id) {
    const cluster = byId.get(id);
    const place = data.clusters.indexOf(cluster);
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
    children.push(...columnFigures(place));
    children.push(...documentList("Nearest to the centre", cluster.central));
    children.push(...documentList("Showing its breadth", cluster.diverse));
    const there = data.map.cluster.flatMap((c, place) => c === id ? [place] : []);
    if (there.length) {
      const button = element("button", "quiet pick", `Select its ${number.format(there.length)} documents on the map`);
      button.type = "button";
      button.addEventListener("click", () => map.select(there));
      children.push(button);
    }
    if (!cluster.size) children.push(element("p", "hint", "No document lies nearest to this centroid."));
    panel.replaceChildren(...children);
    panel.scrollTop = 0;
    panel.querySelectorAll(".mark").forEach(drawMark);
  }

  function select(id, highlight) {
    for (const row of document.querySelectorAll("#cluster-table tbody tr")) {
      const isIt = highlight && Number(row.dataset.id) === id;
      row.classList.toggle("selected", isIt);
      row.querySelector(".open").setAttribute("aria-pressed", String(isIt));
    }
    if (id >= 0) showDetail(id);
    map.light(highlight ? id : -1);
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
      accent: read("--accent"), quiet: read("--quiet"), ground: read("--card"),
    };
  }

  function embed(id, spec) {
    const { accent, quiet, ground, ...config } = theme();
    return vegaEmbed(`#${id}`, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, config }, { actions: false, renderer: "canvas" });
  }

  /* The map, its tools, what was selected on it, and the same in words. */
  const SHOWN_PICKS = 30;

  function aboutPoint(place) {
    const { id, cluster, text } = data.map;
    const known = byId.get(cluster[place]);
    const about = known ? known.name || known.keywords.slice(0, 4).join(", ") : "";
    const where = cluster[place] < 0 ? "Noise: in no dense region" : `Cluster ${cluster[place]}${about && `: ${about}`}`;
    return [where, ...(text[place] ? [text[place]] : []), `id ${id[place]}`];
  }

  function showPicked(places) {
    const { id, cluster, text, cut } = data.map;
    const long = new Set(cut);
    const whole = places.filter((place) => !long.has(place));
    document.getElementById("picked").hidden = !places.length;
    const left = places.length - whole.length;
    document.getElementById("picked-count").textContent = `${number.format(places.length)} of ${number.format(id.length)} documents on the map are selected.${
      left ? ` ${number.format(left)} have ids too long for this page, which map.parquet has.` : ""}`;
    document.getElementById("picked-ids").value = whole.map((place) => id[place]).join("\n");
    document.getElementById("copied").textContent = "";
    document.getElementById("picked-list").replaceChildren(...places.slice(0, SHOWN_PICKS).map((place) => {
      const item = element("li");
      if (text[place]) item.append(element("p", "", text[place]));
      item.append(element("p", "hint", `id ${id[place]} · ${cluster[place] < 0 ? "noise" : `cluster ${cluster[place]}`}`));
      return item;
    }), ...(places.length > SHOWN_PICKS ? [element("li", "hint", `and ${number.format(places.length - SHOWN_PICKS)} more`)] : []));
  }

  async function copyPicked() {
    const ids = document.getElementById("picked-ids");
    let done = true;
    try {
      await navigator.clipboard.writeText(ids.value);
    } catch {
      ids.select();
      done = document.execCommand("copy");
    }
    document.getElementById("copied").textContent = done ? "Copied." : "Not copied: select the ids and copy them by hand.";
  }

  /* Told of each step of a pan: the words change with the level alone, the status once it rests. */
  let worded = null, resting = 0;

  function showView(place, inView) {
    const { levels, id } = data.map;
    const coarser = place < levels.length - 1 ? ` (coarser than the table's ${number.format(data.numClusters)})` : "";
    const level = levels.length > 1 ? `${number.format(levels[place].clusters)} clusters${coarser}; ` : "";
    const status = `${level}${number.format(inView)} of ${number.format(id.length)} points in view`;
    clearTimeout(resting);
    resting = setTimeout(() => { document.getElementById("map-status").textContent = status; }, worded === null ? 0 : 150);
    if (worded !== place) document.getElementById("map-words").replaceChildren(...wordsOf(levels[place]));
    worded = place;
  }

  /* What the map shows of a level, for those who do not see it. */
  /* Colours of the map: of clusters, or of the classes of a kept column, with their legend. */
  function paintMap(choice) {
    const legend = document.getElementById("legend");
    const column = choice === "" ? null : data.columns[Number(choice)];
    legend.hidden = !column;
    if (!column) { map.paint(null); return; }
    const classes = column.legend.length;
    map.paint((place) => Marks.ofClass(column.codes[place], column.kind, classes));
    const counts = new Map();
    for (const code of column.codes) counts.set(code, (counts.get(code) || 0) + 1);
    const names = [...column.legend.entries(), [-2, "other"], [-1, "no value"]].filter(([code]) => counts.get(code));
    legend.replaceChildren(...names.map(([code, name]) => {
      const item = element("li"), mark = element("span", "mark");
      mark.setAttribute("aria-hidden", "true");
      Marks.draw(mark, Marks.ofClass(code, column.kind, classes));
      item.append(mark, element("span", "", name), element("span", "hint", number.format(counts.get(code))));
      return item;
    }));
  }

  function wordsOf(level) {
    if (!level) return [];
    const { x, y } = data.map;
    const [left, right, bottom, top] = [Math.min(...x), Math.max(...x), Math.min(...y), Math.max(...y)];
    const third = (value, low, high, names) => names[Math.min(2, Math.floor(3 * (value - low) / (high - low || 1)))];
    return level.labels.map((label) => {
      const others = level.labels.filter((other) => other !== label)
        .sort((a, b) => Math.hypot(a.x - label.x, a.y - label.y) - Math.hypot(b.x - label.x, b.y - label.y));
      const where = `${third(label.y, bottom, top, ["bottom", "middle", "top"])} ${third(label.x, left, right, ["left", "centre", "right"])}`;
      const row = element("tr");
      for (const cell of [label.t, number.format(label.n), where, others.slice(0, 3).map((other) => other.t).join("; ")]) row.append(element("td", "", cell));
      return row;
    });
  }

  function setUpMap() {
    const holder = document.getElementById("map");
    map = createMap(holder, data.map, {
      about: aboutPoint, onSelect: showPicked, onView: showView,
      onPick: (cluster) => { if (cluster >= 0) select(cluster, true); },
    });
    holder.map = map;
    const on = (id, what) => document.getElementById(id).addEventListener("click", what);
    on("zoom-in", () => map.zoomBy(1.5));
    on("zoom-out", () => map.zoomBy(1 / 1.5));
    on("zoom-whole", () => map.whole());
    on("copy", copyPicked);
    on("unpick", () => map.select([]));
    on("lasso", (event) => {
      const pressed = event.currentTarget.getAttribute("aria-pressed") !== "true";
      event.currentTarget.setAttribute("aria-pressed", String(pressed));
      map.useLasso(pressed);
    });
    document.getElementById("colour")?.addEventListener("change", (event) => paintMap(event.target.value));
    document.getElementById("level")?.addEventListener("change", (event) => map.show(event.target.value === "zoom" ? null : Number(event.target.value)));
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

  /* Which of the largest clusters the documents of each time are in. */
  const TIMED_CLUSTERS = 25;

  function drawTimes() {
    const chosen = document.getElementById("time");
    if (!chosen) return null;
    const colors = theme();
    const { starts, counts, totals, unit, outside } = data.columns[Number(chosen.value)].time;
    const shown = data.clusters.slice(0, TIMED_CLUSTERS);
    const name = (cluster) => `${cluster.id}${cluster.name || cluster.keywords.length ? `: ${cluster.name || cluster.keywords.slice(0, 2).join(", ")}` : ""}`;
    const values = shown.flatMap((cluster, row) => counts[row].map((count, i) => ({ cluster: name(cluster), start: starts[i], count, share: totals[i] ? count / totals[i] : 0 })));
    document.getElementById("times-note").textContent = `Share of the documents of each ${unit} that are in the cluster${data.clusters.length > TIMED_CLUSTERS ? `, of the ${TIMED_CLUSTERS} largest clusters` : ""}.${outside ? ` Documents of other times: ${number.format(outside)}.` : ""}`;
    return embed("times", {
      width: "container", height: 40 + 20 * shown.length, data: { values }, mark: { type: "rect" },
      encoding: {
        x: { field: "start", type: "ordinal", sort: starts, title: null, axis: { labelAngle: 0, labelOverlap: "greedy", labelSeparation: 12 } },
        y: { field: "cluster", type: "nominal", sort: null, title: null, axis: { labelLimit: Math.min(220, window.innerWidth / 4) } },
        color: { field: "share", type: "quantitative", scale: { range: [colors.quiet, colors.accent] }, legend: { title: `share of the ${unit}`, format: ".0%" } },
        tooltip: [{ field: "cluster", title: "Cluster" }, { field: "start", title: unit }, { field: "count", title: "Documents", format: "," }, { field: "share", title: "Share", format: ".1%" }],
      },
    });
  }

  /* The table's second column: documents, or the sum or mean of a kept column. */
  function showSizes(choice) {
    const [place, what] = choice.split(" ");
    const title = document.querySelector("th button[data-key='size']");
    const values = choice ? data.columns[Number(place)][what] : data.clusters.map((cluster) => cluster.size);
    const most = Math.max(...values.filter((value) => value !== null), 0);
    title.textContent = choice ? `${what === "sum" ? "Sum" : "Mean"} of ${data.columns[Number(place)].name}` : "Documents";
    const byRow = new Map(data.clusters.map((cluster, i) => [String(cluster.id), values[i]]));
    for (const row of document.querySelectorAll("#cluster-table tbody tr")) {
      const value = byRow.get(row.dataset.id), bar = row.querySelector(".size-bar");
      bar.textContent = value === null ? "–" : (choice ? figure : number).format(value);
      bar.style.setProperty("--share", `${most > 0 ? Math.max(0, 100 * value / most) : 0}%`);
      row.dataset.size = value === null ? "-Infinity" : value;
    }
    const header = title.closest("th");
    header.removeAttribute("aria-sort");
    title.click();
  }

  async function draw() {
    document.querySelectorAll(".mark[data-cluster]").forEach(drawMark);
    map.draw();
    paintMap(document.getElementById("colour")?.value || "");
    await Promise.all([drawTimes(), drawSizes(), drawCurve(), drawConfusion()]);
    document.documentElement.dataset.ready = "true";
  }

  setUpTable();
  setUpMap();
  document.getElementById("measure")?.addEventListener("change", (event) => showSizes(event.target.value));
  document.getElementById("time")?.addEventListener("change", drawTimes);
  showDetail(data.clusters[0].id);
  draw();
  Marks.dark.addEventListener("change", draw);
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 200); });
})();
