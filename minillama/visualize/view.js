// What the views share. Each is a module made of this file and its own behind it: nothing is imported.

const STOPS = [[0, 34, 78], [67, 78, 108], [125, 124, 120], [188, 174, 108], [254, 232, 56]]; // the cividis colours

/** The colour at a place from 0, dark, to 1, bright: red, green, blue. */
function colourAt(place) {
  const stop = Math.min(3, Math.floor(4 * place));
  return STOPS[stop].map((low, i) => low + (4 * place - stop) * (STOPS[stop + 1][i] - low));
}

const ARROWS = (columns) => ({ ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns });

/** An element of the page. Words only ever go in as text. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Make items a group of which one is chosen, by a click or by the arrow keys; returns what marks one as chosen. */
function chooser(items, columns, choose) {
  const mark = (chosen) => items.forEach((item, i) => {
    item.setAttribute("aria-checked", i === chosen);
    item.tabIndex = i === chosen ? 0 : -1;
  });
  items.forEach((item, i) => {
    item.setAttribute("role", "radio");
    item.addEventListener("click", () => choose(i));
    item.addEventListener("keydown", (event) => {
      const step = { ...ARROWS(columns), Home: -i, End: items.length - 1 - i }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = i + step;
      if (!items[next]) return;
      choose(next);
      items[next].focus();
    });
  });
  return mark;
}

/** What Python has packed: deflated bytes → an ArrayBuffer. */
function inflate(bytes) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

/** A number beside a bar, in a table: of a share from 0 to 1. */
function bar(share, text) {
  const width = `width: ${Math.round(80 * share)}px`;
  const number = make("span", { class: "share" }, text);
  return make("td", {}, number, make("span", { class: "bar", style: width, "aria-hidden": true }));
}

/** A table of rows [word or element, cells …]. */
function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([first, ...cells]) =>
    make("tr", {}, make("th", { scope: "row", class: "piece" }, first), ...cells));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

const part = (...content) => make("section", {}, ...content);
const about = (text) => make("p", { class: "about" }, text);

/** The scale of colours, with some of its values. */
function legend(values) {
  const ticks = make("div", { class: "ticks" }, ...values.map((value) => make("span", {}, value)));
  return make("div", { "aria-hidden": true }, make("div", { class: "legend" }), ticks);
}

/** A view of columns of parts, of a kind that has a style. Keys without a modifier are its own: JupyterLab would take
 * the arrows, Enter and letters for commands, also on a slider or a button. */
function view(kind, ...columns) {
  const parts = columns.map((column) => make("div", { class: "column" }, ...column));
  const root = make("div", { class: `minillama-view ${kind}` }, ...parts);
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey && !event.shiftKey) event.stopPropagation();
  });
  return root;
}
