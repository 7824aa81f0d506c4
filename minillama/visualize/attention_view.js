// The attention view in a page. The maps lie in the page, so that it changes without asking; only the next words after
// a head is silenced come from the kernel.
// In the model: maps (deflated percent, by layer, head, token looked at, token that looks), page (what is shown),
// silenced (pairs of layer and head), words (for which silenced heads, and rows of word, before, after).

// The root, so that small shares are seen too
const COLOURS = Array.from({ length: 101 }, (_, percent) => colourAt(Math.sqrt(percent / 100)));

/** Paint one map, size × size pixels, each the largest share of its patch, so that thin lines stay; CSS scales it. */
function paint(canvas, share, count, size) {
  canvas.width = canvas.height = size;
  const largest = new Uint8Array(size * size);
  const pixel = (place) => Math.floor((place * size) / count);
  for (let looking = 0; looking < count; looking++) {
    for (let seen = 0; seen <= looking; seen++) {
      const at = pixel(looking) * size + pixel(seen);
      largest[at] = Math.max(largest[at], share(looking, seen));
    }
  }
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  largest.forEach((percent, at) => image.data.set([...COLOURS[percent], 255], 4 * at));
  context.putImageData(image, 0, 0);
}

async function render({ model, el }) {
  const { pieces, layers, heads, shown, head } = model.get("page");
  const count = pieces.length;
  const maps = new Uint8Array(await inflate(model.get("maps")));
  const shareIn = (map) => (looking, seen) => maps[(map * count + seen) * count + looking];
  const name = (map) => `layer ${layers[Math.floor(map / heads)]}, head ${map % heads}`;
  const pair = (map) => [layers[Math.floor(map / heads)], map % heads];
  const same = (a, b) => a[0] === b[0] && a[1] === b[1];

  let map = layers.indexOf(head[0]) * heads + head[1];
  let token = count - 1;

  // Every head.
  const side = Math.round(Math.max(16, Math.min(44, 300 / heads, 500 / layers.length)));
  const grid = make("div", {
    class: "heads", role: "radiogroup", "aria-label": "Every head; rows are layers",
    style: `grid-template-columns: auto repeat(${heads}, ${side}px)`,
  });
  const number = (text) => make("span", { "aria-hidden": true }, text);
  grid.append(number(""), ...Array.from({ length: heads }, (_, i) => number(i)));
  const small = layers.flatMap((layer, row) => {
    grid.append(number(layer));
    return Array.from({ length: heads }, (_, column) => {
      const map = row * heads + column;
      const canvas = make("canvas", { style: `width: ${side}px; height: ${side}px`, title: name(map) });
      paint(canvas, shareIn(map), count, Math.min(count, side));
      grid.append(canvas);
      return canvas;
    });
  });
  const markHead = chooser(small, heads, (chosen) => { map = chosen; show(); });

  // The chosen head, as lines and as a matrix.
  const title = make("h4", {});
  const height = Math.round(Math.max(13, Math.min(20, 500 / count)));
  const fit = `height: ${height}px; line-height: ${height}px; font-size: ${height - 4}px`;
  const word = (text) => make("div", { style: fit }, text);
  const left = pieces.map(word);
  const looking = make("div", { class: "words", role: "radiogroup", "aria-label": "The token that looks" }, ...left);
  const seen = make("div", { class: "words", "aria-hidden": true }, ...pieces.map(word));
  const lines = make("svg", { width: 120, height: height * count, "aria-hidden": true });
  const links = make("div", { class: "scroll" }, make("div", { class: "links" }, looking, lines, seen));
  const markToken = chooser(left, 1, (chosen) => { token = chosen; show(); });
  const large = Math.min(320, Math.max(160, count * 12));
  const matrix = make("canvas", { role: "img", style: `width: ${large}px; height: ${large}px` });
  const mark = make("div", { class: "mark", style: `height: ${large / count}px; width: ${large}px` });
  const place = (at) => Math.min(count - 1, Math.max(0, Math.floor((at / large) * count)));
  const under = (event) => [place(event.offsetY), place(event.offsetX)];
  matrix.addEventListener("click", (event) => { token = under(event)[0]; show(); });
  matrix.addEventListener("mousemove", (event) => {
    const [a, b] = under(event);
    matrix.title = `“${pieces[a]}” gives ${shareIn(map)(a, b)} % to “${pieces[b]}”`;
  });

  // The chosen token's row, and the next word.
  const row = make("div", { "aria-live": "polite", class: "row" });
  const silencer = make("button", { type: "button" });
  const restorer = make("button", { type: "button" }, "Let all heads speak");
  const unable = about("Here no kernel runs: to silence other heads, run this cell in the notebook.");
  const buttons = model.get("live") === false ? [unable] : [silencer, restorer]; // false on a web page
  const status = make("p", { role: "status" });
  const next = make("div", { class: "next" });
  const ask = (heads) => {
    model.set("silenced", heads);
    model.save_changes();
    showWords();
  };
  silencer.addEventListener("click", () => {
    const others = model.get("silenced").filter((other) => !same(other, pair(map)));
    ask(others.length < model.get("silenced").length ? others : [...others, pair(map)]);
  });
  restorer.addEventListener("click", () => { ask([]); silencer.focus(); });

  function show() {
    const share = shareIn(map);
    markHead(map);
    markToken(token);
    title.textContent = name(map)[0].toUpperCase() + name(map).slice(1);
    paint(matrix, share, count, count);
    mark.style.top = `${(token * large) / count}px`;
    const paths = [];
    for (let a = 0; a < count; a++) {
      for (let b = 0; b <= a; b++) {
        const strength = share(a, b) / 100;
        if (strength < 0.03) continue;
        const y = [a, b].map((i) => (i + 0.5) * height);
        const chosen = a === token;
        const line = make("path", {
          d: `M 0 ${y[0]} C 60 ${y[0]} 60 ${y[1]} 120 ${y[1]}`, class: chosen ? "chosen" : "",
          "stroke-width": 0.5 + 3 * strength, "stroke-opacity": chosen ? 0.35 + 0.65 * strength : 0.45 * strength,
        });
        paths[chosen ? "push" : "unshift"](line); // the chosen token's lines lie above the others
      }
    }
    lines.replaceChildren(...paths);
    requestAnimationFrame(() => { // once it has a size
      const hidden = token * height < links.scrollTop || (token + 1) * height > links.scrollTop + links.clientHeight;
      if (hidden) links.scrollTop = token * height - links.clientHeight / 2;
    });
    const shares = pieces.slice(0, token + 1).map((piece, i) => [piece, share(token, i) / 100]);
    const strongest = shares.filter(([, part]) => part > 0).sort((a, b) => b[1] - a[1]).slice(0, 8);
    matrix.setAttribute("aria-label", `The map of ${name(map)}: rows look, columns are looked at. ` +
      `“${pieces[token]}” looks most at “${strongest[0]?.[0]}”.`);
    const heading = make("h4", {}, "“", make("span", { class: "piece" }, pieces[token]), "” looks at");
    const rows = strongest.map(([piece, part]) => [piece, bar(part, percent(part, 0))]);
    row.replaceChildren(heading, table(["word", "share"], rows));
    showWords();
  }

  function showWords() {
    const silenced = model.get("silenced");
    const words = model.get("words");
    const waiting = JSON.stringify([...silenced].sort()) !== JSON.stringify([...words.silenced].sort());
    const now = silenced.some((other) => same(other, pair(map)));
    silencer.textContent = `Silence ${name(map)}`;
    silencer.setAttribute("aria-pressed", now);
    restorer.disabled = !silenced.length;
    const names = silenced.map(([layer, head]) => `layer ${layer} head ${head}`).join(", ");
    status.textContent = waiting ? "The kernel is asked; it answers when it is free." :
      names ? `Silenced: ${names}. The maps stay those of the whole model.` : "No head is silenced.";
    next.setAttribute("aria-busy", waiting);
    const columns = words.silenced.length ? ["word", "before", "after"] : ["word", "probability"];
    const rows = words.rows.map(([piece, ...shares]) =>
      [piece, ...shares.slice(0, columns.length - 1).map((share) => bar(share, percent(share, 1)))]);
    next.replaceChildren(table(columns, rows));
    small.forEach((canvas, i) => {
      const quiet = silenced.some((other) => same(other, pair(i)));
      canvas.classList.toggle("silenced", quiet);
      canvas.setAttribute("aria-label", name(i) + (quiet ? ", silenced" : ""));
    });
  }

  el.append(view("minillama-attention", [
    part(make("h4", {}, "Every head"), about(shown), make("div", { class: "scroll" }, grid)),
    part(make("h4", {}, "The next word"), ...buttons, status, next),
  ], [
    part(title, about("A click or arrow keys choose a word that looks."), links),
  ], [
    part(make("h4", {}, "As a matrix"), about("Rows look, columns are looked at."),
      make("div", { class: "matrix" }, matrix, mark), legend(["0", "6", "25", "56", "100 %"])),
    part(row),
  ]));
  show();
  model.on("change:words", showWords);
  return () => model.off("change:words", showWords);
}

export default { render };
