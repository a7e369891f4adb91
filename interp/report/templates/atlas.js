"use strict";
// The atlas of heads. Every text is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const grid = document.getElementById("grid");
const detail = document.getElementById("detail");
const by = document.getElementById("by");
const SHOWN = 8;
const [BLUE, RED] = ["#0072B2", "#D55E00"];
const buttons = [];
let held = null;

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function rgba(colour, opacity) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${opacity})`;
}

// What a cell shows: [number of the relation, promotes, opacity, colour], or nothing.
function shown(cell) {
  if (by.value === "") return cell.best ? [...cell.best, cell.colour] : null;
  const at = Number(by.value);
  const promotes = cell.promotes[at] >= cell.suppresses[at];
  const score = Math.max(cell.promotes[at], cell.suppresses[at]) / 1000;
  return score > 0 ? [at, promotes, 0.12 + 0.88 * score, promotes ? BLUE : RED] : null;
}

function paint() {
  for (const { button, cell, name } of buttons) {
    const found = shown(cell);
    button.style.background = found && found[1] ? rgba(found[3], found[2]) : "";
    button.style.borderColor = found && !found[1] ? rgba(found[3], found[2]) : "";
    const [at, promotes] = found || [];
    const what = found
      ? `${promotes ? "promotes" : "suppresses"} ${data.relations[at]} ${(promotes ? cell.promotes : cell.suppresses)[at] / 1000}`
      : "nothing";
    button.setAttribute("aria-label", `layer ${name.split(".")[0]} head ${name.split(".")[1]}: ${what}`);
    button.title = `${name}: ${what}`;
  }
  document.getElementById("legend").hidden = by.value !== "";
  document.getElementById("one").hidden = by.value === "";
}

function bars(title, metric, cell) {
  const box = element("div", undefined, metric);
  box.append(element("h3", title));
  const order = cell[metric].map((score, at) => [score, at]).filter(([score]) => score > 0);
  order.sort((one, other) => other[0] - one[0]);
  for (const [score, at] of order.slice(0, SHOWN)) {
    const bar = element("div", undefined, "bar");
    const fill = element("i");
    fill.style.width = `${score / 10}%`;
    const weak = score / 1000 < data.threshold ? "below" : "";
    bar.append(fill, element("span", data.relations[at], weak), element("span", (score / 1000).toFixed(2), weak));
    if (data.k[at]) bar.title = `share of pairs among the ${data.k[at]} ${metric === "promotes" ? "largest" : "smallest"}`;
    box.append(bar);
  }
  if (!order.length) box.append(element("p", "none", "soft"));
  return box;
}

function table(heads, rows) {
  const made = element("table");
  const top = made.createTHead().insertRow();
  heads.forEach(([text, name]) => top.append(element("th", text, name)));
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((value, at) => {
      const place = element("td", undefined, heads[at][1]);
      if (Array.isArray(value)) value.forEach((text) => place.append(element("code", text), " "));
      else place.textContent = value;
      line.append(place);
    });
  }
  return made;
}

function show(index) {
  const { cell, name } = buttons[index];
  const [layer, head] = name.split(".");
  const both = element("div", undefined, "pair");
  both.append(bars("Promotes", "promotes", cell), bars("Suppresses", "suppresses", cell));
  detail.replaceChildren(element("h2", `Layer ${layer}, head ${head}`), both);
  if (cell.mappings) {
    const rows = cell.mappings.map(([source, size, targets]) => [[source], size, targets]);
    detail.append(element("h3", "Tokens it answers to, and what it makes of them"));
    detail.append(table([["token", ""], ["saliency", "number"], ["mapped to", ""]], rows));
  }
  if (cell.descriptors) {
    detail.append(element("h3", "Share of these mappings that are of a kind"));
    detail.append(table([["kind", ""], ["share", "number"], ["by chance", "number"], ["p", "number"]], cell.descriptors));
  }
  detail.scrollTop = 0;
}

function hold(index) {
  if (held !== null) {
    buttons[held].button.classList.remove("held");
    buttons[held].button.setAttribute("aria-pressed", "false");
  }
  held = held === index ? null : index;
  if (held === null) return;
  buttons[held].button.classList.add("held");
  buttons[held].button.setAttribute("aria-pressed", "true");
  show(held);
}

function move(from, to) {
  if (to < 0 || to >= buttons.length) return;
  buttons[from].button.tabIndex = -1;
  buttons[to].button.tabIndex = 0;
  buttons[to].button.focus();
}

grid.style.gridTemplateColumns = `1.8rem repeat(${data.n_heads}, minmax(0, 1fr))`;
grid.append(element("span", ""));
for (let head = 0; head < data.n_heads; head += 1) grid.append(element("span", head));
for (const layer of data.layers) {
  grid.append(element("span", layer));
  for (let head = 0; head < data.n_heads; head += 1) {
    const name = `${layer}.${head}`;
    const button = element("button");
    const index = buttons.length;
    button.type = "button";
    button.dataset.head = name;
    button.tabIndex = index ? -1 : 0;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("mouseenter", () => held === null && show(index));
    button.addEventListener("focus", () => held === null && show(index));
    button.addEventListener("click", () => hold(index));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.n_heads, ArrowDown: data.n_heads }[event.key];
      if (!step) return;
      event.preventDefault();
      move(index, index + step);
    });
    buttons.push({ button, cell: data.cells[name], name });
    grid.append(button);
  }
}
document.addEventListener("keydown", (event) => event.key === "Escape" && held !== null && hold(held));
by.addEventListener("change", paint);
paint();
const best = buttons.findIndex(({ cell }) => cell.best && cell.best[2] === 1);
if (best >= 0) show(best);
