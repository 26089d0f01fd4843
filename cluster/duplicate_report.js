"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("threshold");
const SHOWN = 6;
const SVG = "http://www.w3.org/2000/svg";

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function draw(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(share) {
  return (100 * share).toFixed(share < 0.1 ? 2 : 1) + "%";
}

function drawCurve(chosen) {
  const width = 760, height = 280, left = 52, right = 14, top = 12, bottom = 30;
  const known = data.curve.filter((row) => row.share !== null);
  const most = Math.max(...known.map((row) => row.share), 1e-9) * 1.08;
  const x = (row) => left + ((row.similarity - data.curve[0].similarity) / (1 - data.curve[0].similarity)) * (width - left - right);
  const y = (share) => height - bottom - (share / most) * (height - top - bottom);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const part of [0, 0.5, 1]) {
    const share = (part * most) / 1.08;
    picture.append(draw("line", { x1: left, x2: width - right, y1: y(share), y2: y(share), class: "axis" }));
    picture.append(draw("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
  }
  for (const row of data.curve.filter((_, i) => i % 5 === 0)) {
    picture.append(draw("text", { x: x(row), y: height - 8, "text-anchor": "middle" }, String(row.similarity)));
  }
  const points = (rows) => rows.map((row) => `${x(row)},${y(row.share)}`).join(" ");
  const lower = known.filter((row) => row.similarity <= data.similarity + 1e-9);
  const upper = known.filter((row) => row.similarity >= data.similarity - 1e-9);
  if (known.length > 1) {
    const ends = [`${x(known[0])},${y(0)}`, points(known), `${x(known[known.length - 1])},${y(0)}`];
    picture.append(draw("polygon", { points: ends.join(" "), class: "area" }));
  }
  picture.append(draw("polyline", { points: points(lower), class: "line guessed" }));
  picture.append(draw("polyline", { points: points(upper), class: "line" }));
  const row = data.curve[chosen];
  picture.append(draw("line", { x1: x(row), x2: x(row), y1: top, y2: height - bottom, class: "here" }));
  if (row.share !== null) picture.append(draw("circle", { cx: x(row), cy: y(row.share), r: 5, class: "dot" }));
  document.getElementById("curve").replaceChildren(picture);
}

function showPairs(threshold) {
  const near = data.pairs
    .map((pair) => [Math.abs(pair.similarity - threshold), pair])
    .filter(([distance]) => distance <= 0.02)
    .sort((a, b) => a[0] - b[0])
    .slice(0, SHOWN)
    .map(([, pair]) => pair)
    .sort((a, b) => b.similarity - a.similarity);
  const list = document.getElementById("pairs");
  list.replaceChildren(...near.map((pair) => {
    const item = element("li");
    const verdict = pair.similarity >= threshold ? "at or above the threshold" : "below it";
    item.append(element("p", `${pair.similarity.toFixed(4)}, ${verdict}`, "hint"));
    const names = pair.similarity >= threshold ? ["removed", "kept"] : ["one", "other"];
    const couple = element("div", undefined, "couple");
    couple.append(element("span", `${names[0]}: ${pair.id}`, "hint"), element("span", `${names[1]}: ${pair.kept}`, "hint"));
    couple.append(element("p", pair.text || "(no text)"), element("p", pair.keptText || "(no text)"));
    item.append(couple);
    return item;
  }));
  if (!near.length) list.append(element("li", "No pair of the sample lies within 0.02 of it."));
}

function show(place) {
  const row = data.curve[place];
  const removed = row.removed === null ? "not sought" : `${row.removed.toLocaleString("en")} removed, ${percent(row.share)}`;
  document.getElementById("told").textContent = `${row.similarity}: ${removed}`;
  slider.setAttribute("aria-valuetext", `${row.similarity}: ${removed}`);
  for (const line of document.querySelectorAll("#numbers tbody tr")) {
    line.classList.toggle("selected", Number(line.dataset.place) === place);
  }
  drawCurve(place);
  showPairs(row.similarity);
}

slider.value = data.curve.findIndex((row) => Math.abs(row.similarity - data.similarity) < 1e-6);
slider.addEventListener("input", () => show(Number(slider.value)));
for (const line of document.querySelectorAll("#numbers tbody tr")) {
  line.addEventListener("click", () => { slider.value = line.dataset.place; show(Number(slider.value)); });
}
show(Number(slider.value));
