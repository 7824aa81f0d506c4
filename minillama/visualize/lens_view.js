// The lens view in a page. All numbers lie in the page, so that nothing is asked of a kernel.
// In the model: numbers (deflated, as `LensView.packed` says), page (words, and names of rows and columns).

/** The numbers by name, each an array of rows of tokens; those of words and of tops lie one behind the other. */
async function unpack(model, { rows, pieces, tops }) {
  const size = rows.length * pieces.length;
  const all = await inflate(model.get("numbers"));
  const short = (start, count) => new Uint16Array(all, size * (4 + 2 * start), size * count);
  return {
    size, rank: new Uint32Array(all, 0, size), top: short(0, tops), shares: short(tops, tops),
    entropy: short(2 * tops, 1), roots: new Uint8Array(all, size * (4 + 2 * (2 * tops + 1))),
  };
}

const nats = (value) => `${value.toFixed(2)} nats`;
const quoted = (piece) => make("span", { class: "piece" }, `“${piece}”`);
let groups = 0; // each view's controls need names of their own

async function render({ model, el }) {
  const page = model.get("page");
  const { rows, pieces, words, followed, text, tops, vocabulary } = page;
  const { size, rank, top, shares, entropy, roots } = await unpack(model, page);
  const count = pieces.length;
  const largest = Math.log(vocabulary);
  const group = `minillama-lens-${groups++}`;
  const best = (at, i = 0) => words[top[i * size + at]];
  const share = (at, i = 0) => shares[i * size + at] / 10000;
  const way = (word, at) => { // of a word that can be followed
    for (let i = 0; i < tops; i++) if (top[i * size + at] === word) return share(at, i); // known better
    return (roots[word * size + at] / 255) ** 2;
  };
  const digits = (value) => percent(value, value < 0.0995 ? 2 : 1);

  let place = size - 1;
  let word = page.word ?? (top[place] < followed ? top[place] : 0);
  let by = page.word === null ? "best" : "word";

  // What colours the map: for each a value from 0 to 1 at a place (null: none), its root's scale, how it is said.
  const kinds = {
    best: { label: "the likeliest word’s probability", value: (at) => share(at), linear: true },
    text: {
      label: "that of the text’s own next word",
      value: (at) => (at % count < count - 1 ? way(text[at % count], at) : null),
    },
    word: { label: "that of one word", value: (at) => way(word, at) },
    entropy: {
      label: "entropy, how open it is", value: (at) => entropy[at] / 1000 / largest, linear: true,
      said: (at) => nats(entropy[at] / 1000),
    },
  };
  const scales = { best: ["0", "25", "50", "75", "100 %"], entropy: ["0", nats(largest / 2), nats(largest)] };
  const said = (at) => (kinds[by].value(at) === null ? "" : kinds[by].said?.(at) ?? digits(kinds[by].value(at)));

  // The controls.
  const choices = Object.entries(kinds).map(([kind, { label }]) => {
    const input = make("input", { type: "radio", name: group, value: kind });
    input.addEventListener("change", () => { by = kind; paint(); });
    return make("label", {}, input, label);
  });
  const listed = words.slice(0, followed);
  const box = make("input", { type: "text", list: `${group}-words`, "aria-label": "The word to follow", size: 12 });
  const options = [...new Set(listed)].map((piece) => make("option", { value: piece }));
  const list = make("datalist", { id: `${group}-words` }, ...options);
  const status = make("p", { role: "status" });
  choices[2].append(":");
  const follow = (number) => { word = number; by = "word"; paint(); };
  box.addEventListener("change", () => {
    const asked = box.value.trim();
    const found = [asked, `▁${asked}`].map((piece) => listed.indexOf(piece)).find((number) => number >= 0);
    if (found !== undefined) return follow(found);
    status.textContent =
      `“${asked}” is none of the ${listed.length} words stored here, the likeliest ones and the text’s own.`;
  });
  const controls = make("div", { class: "controls", role: "radiogroup", "aria-label": "The colour shows" },
    make("span", { "aria-hidden": true }, "Colour:"), choices[0], choices[1],
    make("div", { class: "choice" }, choices[2], box, list), choices[3]);

  // The map: a row for each depth, a column for each token, between the text and the text moved on by one.
  const map = make("div", {
    class: "lens", role: "radiogroup", "aria-label": "The likeliest next word; rows are layers, columns are tokens",
    style: `grid-template-columns: auto repeat(${count}, 64px)`,
  });
  const name = (content, kind) => make("span", { class: kind, "aria-hidden": true, title: content }, content);
  const cells = [];
  map.append(name("behind", "top corner"), ...pieces.map((piece) => name(piece, "top piece")));
  rows.forEach((row, r) => {
    map.append(name(row, "side"));
    for (let t = 0; t < count; t++) {
      const at = r * count + t;
      const cell = make("div", { class: rank[at] === 1 ? "right" : "" }, best(at));
      cells.push(cell);
      map.append(cell);
    }
  });
  map.append(name("goes on with", "bottom corner"));
  map.append(...pieces.map((_, t) => name(words[text[t]] ?? "?", "bottom piece")));
  const mark = chooser(cells, count, (chosen) => { place = chosen; show(); });

  const scroll = make("div", { class: "scroll" }, map);
  const scale = make("div", {});
  const here = make("div", { "aria-live": "polite" });
  const column = make("div", {});
  const buttons = [];

  /** The chosen place: its likeliest words, each of which can be followed. */
  function show() {
    mark(place);
    const t = place % count;
    const list = Array.from({ length: tops }, (_, i) => {
      const number = top[i * size + place];
      const row = bar(share(place, i), digits(share(place, i)));
      if (number >= followed) return [words[number], row];
      const button = make("button", { type: "button", class: "piece", title: "Follow this word" }, words[number]);
      button.addEventListener("click", () => follow(number));
      buttons[i] = [button, number];
      return [button, row];
    });
    const [at, of] = [rank[place], vocabulary].map((number) => number.toLocaleString("en"));
    const own = rank[place] ? make("p", {}, "The text goes on with ", quoted(words[text[t]]),
      `: ${digits(way(text[t], place))}, place ${at} of ${of}.`) : "";
    const row = rows[place / count | 0];
    here.replaceChildren(
      make("h4", {}, `${row[0].toUpperCase()}${row.slice(1)}, behind `, quoted(pieces[t])),
      own, make("p", {}, `Entropy ${nats(entropy[place] / 1000)}; all words alike would be ${nats(largest)}.`),
      table(["likeliest", "probability"], list));
    paint();
  }

  /** The colours, and the chosen column's numbers. */
  function paint() {
    const { value, linear } = kinds[by];
    cells.forEach((cell, at) => {
      const share = value(at);
      const bright = share === null ? null : linear ? share : Math.sqrt(share);
      cell.style.background = bright === null ? "none" : `rgb(${colourAt(bright).map(Math.round)})`;
      cell.style.color = bright === null ? "inherit" : bright > 0.48 ? "#000" : "#fff";
      cell.title = `${rows[at / count | 0]}, behind “${pieces[at % count]}”: ${said(at)}`;
      const right = rank[at] === 1 ? ", as the text goes on" : "";
      cell.setAttribute("aria-label", `${cell.title}, likeliest “${best(at)}”${right}`);
    });
    choices.forEach((choice) => { choice.firstChild.checked = choice.firstChild.value === by; });
    box.value = words[word];
    status.textContent = by === "word" ? `Every place is coloured by the probability of “${words[word]}”.` : "";
    scale.replaceChildren(legend(scales[by] ?? ["0", "6", "25", "56", "100 %"]));
    buttons.forEach(([button, number]) => button.setAttribute("aria-pressed", by === "word" && number === word));
    const t = place % count;
    const what = {
      best: "The likeliest word", entropy: "Entropy", text: quoted(words[text[t]] ?? "?"), word: quoted(words[word]),
    };
    const columns = by === "best" ? ["", "word", "probability"] : ["", by === "entropy" ? "entropy" : "probability"];
    const list = rows.map((row, r) => {
      const at = r * count + t;
      const end = value(at) === null ? make("td", {}) : bar(value(at), said(at));
      const name = make("span", { class: "name" }, row);
      return by === "best" ? [name, make("td", { class: "piece" }, best(at)), end] : [name, end];
    });
    column.replaceChildren(make("h4", {}, what[by], " behind ", quoted(pieces[t])),
      make("div", { class: "scroll" }, table(columns, list)));
  }

  el.append(view("minillama-lens",
    [part(make("h4", {}, "What would come next, if the rest of the layers were left out"), about(page.shown), controls,
      status, scale, scroll, about("Underlined: what the text says next."))],
    [part(here)], [part(column)]));
  show();
  requestAnimationFrame(() => { scroll.scrollTo(scroll.scrollWidth, scroll.scrollHeight); }); // once it has a size
}

export default { render };
