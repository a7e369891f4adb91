"use strict";
// Tokens of every head by several lenses. Every text is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const [grid, detail, text, prompt, by, side] = ["grid", "detail", "text", "prompt", "by", "side"].map((id) => document.getElementById(id));
const COLOURS = ["0,114,178", "213,94,0"];
const SIDES = ["promotes", "suppresses"];
const buttons = [];
let place = null;
let held = null;
let shown = 0;

function element(tag, content, name) {
  const made = document.createElement(tag);
  if (content !== undefined) made.textContent = content;
  if (name) made.className = name;
  return made;
}

// The lens of a button: the one chosen, or for a column of another kind (heads, stream) the first of its kind.
function lensOf(stream) {
  const chosen = Number(by.value);
  return data.lenses[chosen].stream === stream ? chosen : data.lenses.findIndex((lens) => lens.stream === stream);
}

// [token numbers, values] of a head, a lens and a side, or nothing.
function read(layer, head, lens, which) {
  const cell = (place.cells[`${layer}.${head}`] || {})[lens];
  return cell ? [cell[2 * which], cell[2 * which + 1]] : null;
}

function largest(lens) {
  const values = Object.values(place.cells).flatMap((cell) => (cell[lens] ? [Math.abs(cell[lens][1][0]), Math.abs(cell[lens][3][0])] : []));
  return Math.max(1e-9, ...values);
}

function paint() {
  const which = Number(side.value);
  const most = data.lenses.map((lens, at) => largest(at));
  for (const { button, layer, head } of buttons) {
    const lens = lensOf(head < 0);
    const found = read(layer, head, lens, which);
    const [word, value] = found ? [data.words[found[0][0]], found[1][0]] : ["", 0];
    button.textContent = word;
    button.style.background = found ? `rgba(${COLOURS[which]},${0.03 + 0.6 * Math.abs(value) / most[lens]})` : "";
    const name = head < 0 ? `stream before layer ${layer}` : `layer ${layer} head ${head}`;
    const said = found ? `${SIDES[which]} ${word} ${value}` : "not read";
    button.title = `${name}, ${data.lenses[lens].name}: ${said}`;
    button.setAttribute("aria-label", button.title);
  }
}

function column(layer, head, lens) {
  const box = element("div");
  box.append(element("h3", data.lenses[lens].name));
  const most = largest(lens);
  SIDES.forEach((name, which) => {
    const found = read(layer, head, lens, which);
    if (!found) return;
    const list = element("div", undefined, name);
    list.append(element("div", name, "soft"));
    found[0].forEach((word, rank) => {
      const bar = element("div", undefined, "bar");
      const fill = element("i");
      fill.style.width = `${Math.min(100, 100 * Math.abs(found[1][rank]) / most)}%`;
      bar.append(fill, element("span", data.words[word]), element("span", found[1][rank]));
      list.append(bar);
    });
    box.append(list);
  });
  return box;
}

function show(index) {
  const { layer, head } = buttons[index];
  shown = index;
  const box = element("div", undefined, "lenses");
  data.lenses.forEach((lens, at) => {
    const own = lens.stream ? -1 : head;
    if (place.cells[`${layer}.${own}`] && read(layer, own, at, 0) && (head >= 0 || lens.stream)) box.append(column(layer, own, at));
  });
  detail.replaceChildren(element("h2", head < 0 ? `Stream before layer ${layer}` : `Layer ${layer}, head ${head}`), box);
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

// Show another position; a change of the text goes to its last one.
function go(found) {
  place = found;
  const tokens = data.prompts[place.prompt];
  text.replaceChildren();
  tokens.forEach((token, pos) => {
    if (token === null) return;
    const there = data.places.find((other) => other.prompt === place.prompt && other.pos === pos);
    if (!there) {
      text.append(element("span", token));
      return;
    }
    const button = element("button", token);
    button.type = "button";
    button.title = `position ${pos}`;
    button.setAttribute("aria-pressed", String(there === place));
    button.addEventListener("click", () => {
      go(there);
      [...text.querySelectorAll("button")].find((other) => other.getAttribute("aria-pressed") === "true").focus();
    });
    text.append(button);
  });
  prompt.value = String(place.prompt);
  paint();
  show(shown);
}

const columns = [...(data.lenses.some((lens) => lens.stream) ? [-1] : []), ...data.heads];
grid.style.gridTemplateColumns = `1.8rem repeat(${columns.length}, minmax(0, 1fr))`;
grid.append(element("span", ""));
columns.forEach((head) => grid.append(element("span", head < 0 ? "stream" : head)));
for (const layer of data.layers) {
  grid.append(element("span", layer));
  for (const head of columns) {
    const button = element("button");
    const index = buttons.length;
    button.type = "button";
    button.dataset.head = `${layer}.${head}`;
    button.tabIndex = index ? -1 : 0;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("mouseenter", () => held === null && show(index));
    button.addEventListener("focus", () => held === null && show(index));
    button.addEventListener("click", () => hold(index));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns.length, ArrowDown: columns.length }[event.key];
      if (!step) return;
      event.preventDefault();
      move(index, index + step);
    });
    buttons.push({ button, layer, head });
    grid.append(button);
  }
}
document.getElementById("prompts").hidden = prompt.options.length < 2;
document.addEventListener("keydown", (event) => event.key === "Escape" && held !== null && hold(held));
prompt.addEventListener("change", () => go(data.places.filter((other) => other.prompt === Number(prompt.value)).pop()));
for (const control of [by, side]) control.addEventListener("change", paint);
const strength = ({ layer, head }) => (head < 0 ? null : read(layer, head, lensOf(false), 0)) || [[], [0]];
go(data.places.filter((other) => other.prompt === data.places[0].prompt).pop());
const strengths = buttons.map((one) => strength(one)[1][0]);
show(strengths.indexOf(Math.max(...strengths)));
