"use strict";
/* Marks of clusters, and the map: the density of all documents, points of some, labels that do not
   cover each other. Drawn on a canvas; texts enter the page through textContent and fillText only. */
const Marks = (() => {
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
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // One hue after the other by lightness, the far end the one that stands out.
  const SHADES = {
    light: ["#9fc9a0", "#62b5a5", "#3a9bb0", "#2c7fb0", "#2a61a3", "#2b428c", "#21215f"],
    dark: ["#4d5aa8", "#3f7fc4", "#3aa3c4", "#45bfa8", "#86d48b", "#c6e26c", "#fff59a"],
  };
  const GREY = "#8c8c8c";
  const scheme = () => dark.matches ? "dark" : "light";
  // Noise, -1, is grey and small.
  const ofCluster = (id) => id < 0
    ? { color: GREY, path: PATHS.circle, small: true }
    : { color: HUES[scheme()][id % 8], path: PATHS[SHAPES[Math.floor(id / 8) % 4]] };

  /* Of a class of a kept column: -1 has no value, -2 a value without a class of its own. */
  function ofClass(code, kind, count) {
    if (code === -1) return { color: GREY, path: PATHS.circle, small: true, hollow: true };
    if (code < 0) return { color: GREY, path: PATHS.circle, small: true };
    if (kind === "category") return { color: HUES[scheme()][code % 8], path: PATHS[SHAPES[code % 4]] };
    return { color: SHADES[scheme()][count < 2 ? 3 : Math.round(6 * code / (count - 1))], path: PATHS.circle };
  }

  function draw(holder, mark) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 14 14");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", mark.path);
    path.setAttribute(mark.hollow ? "stroke" : "fill", mark.color);
    if (mark.hollow) { path.setAttribute("fill", "none"); path.setAttribute("stroke-width", 2); }
    svg.append(path);
    holder.replaceChildren(svg);
  }

  return { dark, ofCluster, ofClass, draw };
})();

/* ``holder`` gets a canvas; ``about(place)`` gives the lines of a point's tooltip, ``onPick(cluster)``
   is told of a click, ``onSelect(places)`` of a selection, ``onView(level, inView)`` of the view. */
function createMap(holder, data, { about, onPick, onSelect, onView }) {
  const { x, y } = data;
  const levels = data.levels.length ? data.levels : [{ clusters: 0, cluster: data.cluster, labels: [] }];
  const canvas = holder.querySelector("canvas");
  const tip = holder.querySelector(".map-tip");
  const context = canvas.getContext("2d");
  const paths = new Map();
  const MOST_ZOOM = 64, PAD = 26, REACH = 9, LABEL_HEIGHT = 15;
  let width = 0, height = 0, base = 1, zoom = 1, centre = [0, 0];
  let chosen = null, lit = -1, selected = new Set(), lassoing = false, lasso = null, boxes = [];
  let waiting = 0, told = "", cloud = null, markOf = null, started = false;

  const extent = (values) => values.length ? [Math.min(...values), Math.max(...values)] : [0, 0];
  const [left, right] = extent(x), [bottom, top] = extent(y);
  const limit = (value, low, high) => Math.min(high, Math.max(low, value));
  const toScreen = (px, py) => [width / 2 + (px - centre[0]) * base * zoom, height / 2 - (py - centre[1]) * base * zoom];
  const toMap = (sx, sy) => [centre[0] + (sx - width / 2) / (base * zoom), centre[1] - (sy - height / 2) / (base * zoom)];

  /* The level that is shown: the one chosen, or one as fine as the zoom has room for its labels. */
  function levelPlace() {
    if (chosen !== null) return chosen;
    const fits = (level) => zoom >= Math.min(MOST_ZOOM / 3, 0.95 * Math.sqrt(level.clusters / Math.max(1, levels[0].clusters)));
    return Math.max(0, levels.map(fits).lastIndexOf(true));
  }

  function style(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

  function resize() {
    width = holder.clientWidth;
    height = holder.clientHeight;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const wide = right - left, tall = top - bottom;
    const fitted = Math.min((width - 2 * PAD) / (wide || tall || 1), (height - 2 * PAD) / (tall || wide || 1));
    if (!started) centre = [(left + right) / 2, (bottom + top) / 2];
    started = true;
    base = Math.max(fitted, 1e-9);
  }

  function drawCloud() {
    if (!data.density) return;
    const { rows, columns, counts, side } = data.density;
    if (!cloud) {
      const most = Math.log1p(Math.max(...counts));
      const [red, green, blue] = style("--cloud").match(/\d+/g).map(Number);
      const image = new ImageData(columns, rows);
      counts.forEach((count, cell) => {
        const row = rows - 1 - Math.floor(cell / columns), column = cell % columns;
        image.data.set([red, green, blue, 190 * Math.log1p(count) / most], 4 * (row * columns + column));
      });
      cloud = document.createElement("canvas");
      cloud.width = columns;
      cloud.height = rows;
      cloud.getContext("2d").putImageData(image, 0, 0);
    }
    const [sx, sy] = toScreen(data.density.left, data.density.bottom + rows * side);
    context.globalAlpha = 1;
    context.imageSmoothingQuality = "high";
    context.drawImage(cloud, sx, sy, columns * side * base * zoom, rows * side * base * zoom);
  }

  function pathOf(d) {
    if (!paths.has(d)) paths.set(d, new Path2D(d));
    return paths.get(d);
  }

  function drawPoints(level) {
    const radius = (x.length > 1500 ? 2.9 : 3.7) * limit(Math.sqrt(zoom), 1, 1.8);
    const matters = (i) => selected.size ? selected.has(i) : lit < 0 || data.cluster[i] === lit;
    const ink = style("--ink");
    const mark = markOf || ((i) => Marks.ofCluster(level.cluster[i]));
    const one = (i, isLit) => {
      const [sx, sy] = toScreen(x[i], y[i]);
      if (sx < -9 || sy < -9 || sx > width + 9 || sy > height + 9) return;
      const { color, path, small, hollow } = mark(i);
      const scale = (small ? 0.75 : 1) * radius / 6;
      context.save();
      context.globalAlpha = isLit ? (small ? 0.45 : 0.85) : 0.12;
      context.translate(sx, sy);
      context.scale(scale, scale);
      context.translate(-7, -7);
      if (hollow) { context.strokeStyle = color; context.lineWidth = 2.5; context.stroke(pathOf(path)); }
      else { context.fillStyle = color; context.fill(pathOf(path)); }
      context.restore();
      if (selected.has(i)) {
        context.beginPath();
        context.arc(sx, sy, radius + 2.5, 0, 2 * Math.PI);
        context.strokeStyle = ink;
        context.globalAlpha = 0.8;
        context.stroke();
      }
    };
    for (let i = 0; i < x.length; i++) if (!matters(i)) one(i, false);
    for (let i = 0; i < x.length; i++) if (matters(i)) one(i, true);
    context.globalAlpha = 1;
  }

  /* The largest clusters first; a label goes where it covers none before it, or is left out. */
  function placeLabels(level) {
    const narrow = width < 520 ? 20 : 40;
    const placed = [];
    for (const label of level.labels) {
      const [sx, sy] = toScreen(label.x, label.y);
      if (sx < 0 || sy < 0 || sx > width || sy > height) continue;
      const letters = [...label.t];
      const text = letters.length > narrow ? `${letters.slice(0, narrow - 1).join("")}…` : label.t;
      const wide = context.measureText(text).width + 8;
      for (const [dx, dy] of [[0, 0], [0, -16], [0, 16], [wide / 2 + 6, 0], [-wide / 2 - 6, 0], [0, -32], [0, 32]]) {
        const x0 = limit(sx + dx - wide / 2, 2, Math.max(2, width - wide - 2));
        const y0 = limit(sy + dy - LABEL_HEIGHT / 2, 2, height - LABEL_HEIGHT - 2);
        const box = { x: x0, y: y0, w: wide, h: LABEL_HEIGHT, text, cluster: label.c };
        if (placed.some((b) => b.x < x0 + wide && x0 < b.x + b.w && b.y < y0 + LABEL_HEIGHT && y0 < b.y + b.h)) continue;
        placed.push(box);
        break;
      }
    }
    return placed;
  }

  function drawLabels(level) {
    context.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    boxes = placeLabels(level);
    context.lineWidth = 4;
    context.strokeStyle = style("--card");
    context.fillStyle = style("--ink");
    for (const box of boxes) context.strokeText(box.text, box.x + box.w / 2, box.y + box.h / 2);
    for (const box of boxes) context.fillText(box.text, box.x + box.w / 2, box.y + box.h / 2);
    context.lineWidth = 1;
  }

  function draw() {
    waiting = 0;
    const place = levelPlace(), level = levels[place];
    context.clearRect(0, 0, width, height);
    drawCloud();
    drawPoints(level);
    drawLabels(level);
    if (lasso && lasso.length > 1) {
      context.beginPath();
      lasso.forEach(([sx, sy], i) => i ? context.lineTo(sx, sy) : context.moveTo(sx, sy));
      context.closePath();
      context.strokeStyle = style("--accent");
      context.fillStyle = style("--accent");
      context.globalAlpha = 0.12;
      context.fill();
      context.globalAlpha = 1;
      context.stroke();
    }
    const now = `${place} ${zoom} ${centre} ${width} ${height}`;
    if (now !== told) { told = now; onView(place, inView().length); }
  }

  function redraw() { if (!waiting) waiting = requestAnimationFrame(draw); }

  function zoomBy(factor, sx = width / 2, sy = height / 2) {
    const [px, py] = toMap(sx, sy);
    zoom = limit(zoom * factor, 1, MOST_ZOOM);
    const [nx, ny] = toMap(sx, sy);
    moveTo(centre[0] + px - nx, centre[1] + py - ny);
  }

  function moveTo(cx, cy) {
    centre = [limit(cx, left, right), limit(cy, bottom, top)];
    redraw();
  }

  function whole() {
    zoom = 1;
    moveTo((left + right) / 2, (bottom + top) / 2);
  }

  function inView() {
    const found = [];
    for (let i = 0; i < x.length; i++) {
      const [sx, sy] = toScreen(x[i], y[i]);
      if (sx >= 0 && sy >= 0 && sx <= width && sy <= height) found.push(i);
    }
    return found;
  }

  function nearest(sx, sy) {
    let best = -1, reach = REACH ** 2;
    for (let i = 0; i < x.length; i++) {
      const [px, py] = toScreen(x[i], y[i]);
      const squared = (px - sx) ** 2 + (py - sy) ** 2;
      if (squared < reach) { best = i; reach = squared; }
    }
    return best;
  }

  /* Even-odd rule: a point is inside where a ray from it crosses the line an odd number of times. */
  function within(line) {
    const found = [];
    for (let i = 0; i < x.length; i++) {
      const [sx, sy] = toScreen(x[i], y[i]);
      let inside = false;
      for (let a = 0, b = line.length - 1; a < line.length; b = a++) {
        const [ax, ay] = line[a], [bx, by] = line[b];
        if (ay > sy !== by > sy && sx < ax + (bx - ax) * (sy - ay) / (by - ay)) inside = !inside;
      }
      if (inside) found.push(i);
    }
    return found;
  }

  function select(places, adding = false) {
    selected = new Set(adding ? [...selected, ...places] : places);
    onSelect([...selected].sort((a, b) => a - b));
    redraw();
  }

  function showTip(sx, sy) {
    const place = nearest(sx, sy);
    tip.hidden = place < 0;
    canvas.style.cursor = lassoing ? "crosshair" : place < 0 ? "grab" : "pointer";
    if (place < 0) return;
    tip.replaceChildren(...about(place).map((line) => {
      const made = document.createElement("p");
      made.textContent = line;
      return made;
    }));
    tip.style.left = `${limit(sx + 14, 0, Math.max(0, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${sy + 16 + tip.offsetHeight > height ? Math.max(0, sy - tip.offsetHeight - 12) : sy + 16}px`;
  }

  let from = null;
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    const start = at(event);
    canvas.setPointerCapture(event.pointerId);
    from = { start, centre: [...centre], moved: false };
    tip.hidden = true;
    if (lassoing) lasso = [start];
  });
  canvas.addEventListener("pointermove", (event) => {
    const [sx, sy] = at(event);
    if (!from) { showTip(sx, sy); return; }
    from.moved ||= Math.hypot(sx - from.start[0], sy - from.start[1]) > 4;
    if (!from.moved) return;
    if (lasso) { lasso.push([sx, sy]); redraw(); return; }
    canvas.style.cursor = "grabbing";
    moveTo(from.centre[0] - (sx - from.start[0]) / (base * zoom), from.centre[1] + (sy - from.start[1]) / (base * zoom));
  });
  const release = (event) => {
    if (!from) return;
    const { moved, start } = from, line = lasso, adding = event.shiftKey || event.ctrlKey || event.metaKey;
    from = lasso = null;
    canvas.style.cursor = lassoing ? "crosshair" : "grab";
    if (event.type === "pointercancel") { redraw(); return; }
    if (moved && line) { select(within(line), adding); return; }
    if (moved) return;
    const place = nearest(...start);
    if (place >= 0) { select([place], adding); onPick(data.cluster[place]); }
    else if (!adding) { select([]); }
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", (event) => { if (!lassoing) zoomBy(2, ...at(event)); });
  canvas.addEventListener("wheel", (event) => {
    if (!event.shiftKey && !event.ctrlKey) return;
    event.preventDefault();
    zoomBy(Math.exp(-0.0022 * (event.deltaY || event.deltaX)), ...at(event));
  }, { passive: false });
  const step = () => 0.2 * Math.min(width, height) / (base * zoom);
  const KEYS = {
    ArrowLeft: () => moveTo(centre[0] - step(), centre[1]),
    ArrowRight: () => moveTo(centre[0] + step(), centre[1]),
    ArrowUp: () => moveTo(centre[0], centre[1] + step()),
    ArrowDown: () => moveTo(centre[0], centre[1] - step()),
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), "0": whole,
    Enter: () => select(inView()), Escape: () => select([]),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });

  return {
    draw() { cloud = null; resize(); cancelAnimationFrame(waiting); draw(); },
    zoomBy, whole, select,
    show(place) { chosen = place; told = ""; redraw(); },
    light(cluster) { lit = cluster; redraw(); },
    paint(marks) { markOf = marks; redraw(); },
    useLasso(on) { lassoing = on; canvas.style.touchAction = on ? "none" : "pan-y"; },
    level: () => levels[levelPlace()],
    labels: () => boxes,
    screen: (place) => toScreen(x[place], y[place]),
    size: () => [width, height],
    mark: (place) => (markOf || ((i) => Marks.ofCluster(levels[levelPlace()].cluster[i])))(place),
  };
}
