// Laboratories: dials to turn, in a page that computes all that follows by itself. No kernel is asked.
// In the model: kind (rotary, softmax or sampling), given (what is played with, as laboratory.py writes it).

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const whole = (number) => number.toLocaleString("en");
const STEPS = (first, last, step) => // no rounding adds up: 0.1 · 3 is written 0.3
  Array.from({ length: Math.round((last - first) / step) + 1 }, (_, i) => Number((first + i * step).toFixed(6)));

/** Scores (T,) to shares that sum to 1; a score of -Infinity gets none. */
function shares(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = scores.map((score) => Math.exp(score - largest));
  const total = sum(powers);
  return powers.map((power) => power / total);
}

const entropy = (parts) => -sum(parts.map((part) => (part > 0 ? part * Math.log(part) : 0)));

/** Every pair's hands: its wavelength in tokens, the angles of query and key, and what it adds to their score. */
function rotary({ headDim, theta, query, key }) {
  return Array.from({ length: headDim / 2 }, (_, i) => {
    const frequency = theta ** ((-2 * i) / headDim);
    const [a, b] = [query * frequency, key * frequency];
    const product = Math.cos(a) * Math.cos(b) + Math.sin(a) * Math.sin(b);
    return { wavelength: (2 * Math.PI) / frequency, query: a, key: b, part: product };
  });
}

/** Scores (T,) divided by the root of headDim (1: as they are) and by the temperature; shares, and their entropy. */
function softmax({ scores, headDim, temperature }) {
  const found = shares(scores.map((score) => score / Math.sqrt(headDim) / temperature));
  return { shares: found, entropy: entropy(found) };
}

/** Scores (V,) through temperature, top-k, top-p and min-p, in this order, as the package has them.
 * Returns the probabilities that the model gives at this temperature, those that are left to draw from, how many tokens
 * are kept after each filter, and how much probability the kept ones had. */
function sampling({ scores, temperature, topK, topP, minP }) {
  const highest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  let z = scores.map((score) => (score - highest) / temperature);
  const said = shares(z);
  const order = z.map((_, i) => i).sort((a, b) => z[b] - z[a] || a - b); // of equal tokens, lower ids go first
  const kept = [];
  const keep = (stays) => {
    z = z.map((score, i) => (stays(score, i) ? score : -Infinity));
    kept.push(z.filter((score) => score > -Infinity).length);
  };
  const last = z[order[Math.min(topK, z.length) - 1]];
  keep((score) => score >= last); // and all that tie with it
  const left = shares(z);
  const dropped = new Set();
  let total = 0;
  for (const i of order) {
    total += left[i];
    if (topP < 1 && total - left[i] >= topP) dropped.add(i); // the one that crosses it is kept
  }
  keep((score, i) => score > -Infinity && !dropped.has(i));
  keep((score) => score > -Infinity && (minP === 0 || score >= Math.log(minP)));
  return { said, left: shares(z), kept, mass: sum(said.filter((_, i) => z[i] > -Infinity)) };
}

/** Draw from probabilities (V,), count times, by darts that are the same for the same seed: ids. */
function draw({ probabilities, seed, count }) {
  let state = seed;
  const dart = () => { // mulberry32, a generator of 32 bits
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), 1 | state);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
  const possible = probabilities.map((_, i) => i).filter((i) => probabilities[i] > 0);
  const total = sum(probabilities);
  return Array.from({ length: count }, () => {
    let left = dart() * total; // each owns a stretch of the line
    return possible.find((i) => (left -= probabilities[i]) < 0) ?? possible.at(-1);
  });
}

/** A slider over values, one of which is the first; spell says a value in words. */
function dial(name, values, first, spell, changed) {
  const steps = [...new Set([...values, first])].sort((a, b) => a - b);
  const input = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.indexOf(first) });
  const shown = make("span", { class: "value", "aria-hidden": true });
  const value = () => steps[Number(input.value)];
  const say = () => {
    shown.textContent = spell(value());
    input.setAttribute("aria-valuetext", spell(value()));
  };
  input.addEventListener("input", () => { say(); changed(); });
  say();
  return { element: make("label", { class: "dial" }, make("span", {}, name), input, shown), value };
}

/** A list to choose from; what is chosen is its number. */
function menu(name, entries, first, changed) {
  const options = entries.map((entry, i) => make("option", { value: i }, entry));
  options[first].selected = true;
  const select = make("select", {}, ...options);
  select.addEventListener("change", changed);
  const element = make("label", { class: "dial" }, make("span", {}, name), select);
  return { element, value: () => Number(select.value) };
}

const controls = (...dials) => make("div", { class: "controls" }, ...dials.map(({ element }) => element));
const fixed = (number, digits) => number.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
const degrees = (angle) => `${fixed((angle * 180) / Math.PI, 1)}°`;

/** Lines of a picture, in units of the page's own; text stands beside it, so that it stays as large as other text. */
function lines(box, ...paths) {
  const drawn = paths.map(([kind, d]) => make("path", { class: kind, d }));
  return make("svg", { viewBox: box, "aria-hidden": true, preserveAspectRatio: "none" }, ...drawn);
}

/** What each kind of line or bar stands for. */
const colours = (...kinds) =>
  make("p", { class: "keys" }, ...kinds.map(([kind, text]) => make("span", { class: kind }, text)));

/** A clock with the hands of query and key, which start at three o'clock. */
function hands(query, key, wide = false) {
  const end = (angle, length) => `${length * Math.cos(angle)} ${-length * Math.sin(angle)}`; // anticlockwise
  const turn = (query - key) % (2 * Math.PI);
  const arc = `M ${end(key, 0.4)} A 0.4 0.4 0 ${+(Math.abs(turn) > Math.PI)} ${+(turn < 0)} ${end(query, 0.4)}`;
  return lines(
    "-1.1 -1.1 2.2 2.2",
    ["face", "M -1 0 A 1 1 0 1 0 1 0 A 1 1 0 1 0 -1 0"],
    ...(wide ? [["arc", arc]] : []),
    ["key", `M 0 0 L ${end(key, 0.9)}`],
    ["query", `M 0 0 L ${end(query, 0.9)}`],
  );
}

function rotaryLaboratory({ headDim, theta, thetas, query, key, pair }) {
  const REACH = 100; // tokens
  let chosen = pair;
  const show = () => update();
  const positions = STEPS(0, REACH, 1);
  const dials = [
    dial("query's position", positions, query, whole, show),
    dial("key's position", positions, key, whole, show),
    dial("move both by", STEPS(0, 1000, 1), 0, whole, show),
    dial("theta", thetas, theta, whole, show),
  ];
  const faces = Array.from({ length: headDim / 2 }, () => make("div", {}));
  const mark = chooser(faces, 8, (i) => { chosen = i; update(); });
  const clocks = make("div", { class: "clocks", role: "radiogroup", "aria-label": "Pair" }, ...faces);
  const large = make("div", { class: "large" });
  const status = make("p", { role: "status" });
  const numbers = make("div", {});
  const graph = make("div", { class: "graph" });
  const name = make("h4", {});

  function update() {
    const [m, n, shift, base] = dials.map(({ value }) => value());
    const at = { headDim, theta: base, query: m + shift, key: n + shift };
    const pairs = rotary(at);
    const mean = (found) => sum(found.map(({ part }) => part)) / found.length;
    const one = pairs[chosen];
    mark(chosen);
    faces.forEach((face, i) => {
      face.replaceChildren(hands(pairs[i].query, pairs[i].key), make("span", {}, i));
      face.setAttribute("aria-label", `pair ${i}, one turn in ${whole(Number(pairs[i].wavelength.toFixed(1)))} tokens`);
    });
    large.replaceChildren(hands(one.query, one.key, true));
    name.textContent = `Pair ${chosen}`;
    status.textContent = `Query at ${whole(at.query)}, key at ${whole(at.key)}: distance ${fixed(m - n, 0)}. ` +
      `Pair ${chosen} turns by ${degrees(one.query - one.key)} in it and adds ${fixed(one.part, 3)}. The mean of all ` +
      `${pairs.length} pairs, to which the score is proportional, is ${fixed(mean(pairs), 3)}.`;
    const cells = (...texts) => texts.map((text) => make("td", {}, text));
    numbers.replaceChildren(table(["pair", "one turn in", "angle between", "adds"], [
      ...pairs.map(({ wavelength, query, key, part }, i) => [String(i), ...cells(
        `${whole(Number(wavelength.toFixed(1)))} tokens`, degrees(query - key), fixed(part, 3))]),
      ["mean", ...cells("", "", fixed(mean(pairs), 3))],
    ]));
    numbers.querySelectorAll("tbody tr").forEach((row, i) => row.classList.toggle("chosen", i === chosen));
    const path = (height) => STEPS(0, REACH, 0.5).map((x, i) => `${i ? "L" : "M"} ${x} ${-height(x)}`).join(" ");
    const alone = (distance) => rotary({ ...at, query: distance, key: 0 });
    const distance = Math.abs(m - n);
    graph.replaceChildren(
      make("div", { class: "scale" }, ...["1", "0", "−1"].map((tick) => make("span", {}, tick))),
      lines(
        `0 -1.15 ${REACH} 2.3`,
        ["face", `M 0 0 H ${REACH}`], ["here", `M ${distance} -1.15 V 1.15`],
        ["mean", path((x) => mean(alone(x)))], ["wave", path((x) => alone(x)[chosen].part)],
        ["dot", `M ${distance} ${-one.part} h 0`], ["dot mean", `M ${distance} ${-mean(pairs)} h 0`],
      ),
    );
  }

  const ticks = make("div", { class: "ticks" }, ...STEPS(0, REACH, 25).map((tick) => make("span", {}, tick)));
  update();
  return [
    [
      part(controls(...dials)),
      part(make("h4", {}, "The hands of all pairs"),
        colours(["query", "query"], ["key", "key"]), clocks),
      part(make("h4", {}, "What a pair adds, by distance"),
        colours(["wave", "this pair"], ["mean", "mean of all pairs"]),
        graph, ticks, about("tokens between query and key")),
    ],
    [part(name, large, status), part(numbers)],
  ];
}

function softmaxLaboratory({ words, rows, headDim, first }) {
  const show = () => update();
  const names = Object.keys(rows);
  const head = menu("scores of", names, names.indexOf(first), show);
  const temperature = dial("temperature", STEPS(0.1, 5, 0.1), 1, (value) => value.toFixed(1), show);
  const root = make("input", { type: "checkbox", checked: true });
  root.addEventListener("change", show);
  const divisor = Math.sqrt(headDim).toFixed(2);
  const divide = make("label", { class: "tick" }, root, `divide by √D = √${headDim} = ${divisor}`);
  const text = make("p", { class: "text" });
  const status = make("p", { role: "status" });
  const level = make("div", { class: "level", "aria-hidden": true });
  const strongest = make("div", {});

  function update() {
    const scores = rows[names[head.value()]];
    const found = softmax({ scores, headDim: root.checked ? headDim : 1, temperature: temperature.value() });
    const most = Math.log(scores.length);
    text.replaceChildren(...scores.flatMap((_, i) => {
      const strength = Math.sqrt(found.shares[i]); // the root, so that small shares are seen too
      const spelled = words[i].replaceAll("▁", " ");
      const word = make("span", { title: percent(found.shares[i], 1), style: `--strength: ${strength.toFixed(3)}` },
        spelled.trimStart());
      word.classList.toggle("strong", strength > 0.7);
      word.classList.toggle("looks", i === scores.length - 1);
      return spelled.startsWith(" ") ? [" ", word] : [word];
    }));
    const order = found.shares.map((_, i) => i).sort((a, b) => found.shares[b] - found.shares[a] || a - b).slice(0, 8);
    strongest.replaceChildren(table(["word", "place", "q · k", "share"], order.map((i) => [
      words[i], make("td", {}, i), make("td", {}, fixed(scores[i], 2)),
      bar(found.shares[i], percent(found.shares[i], 1)),
    ])));
    level.style.setProperty("--share", most ? found.entropy / most : 0);
    status.textContent = `“${words[order[0]]}” has the largest share, ${percent(found.shares[order[0]], 1)}. ` +
      `The entropy is ${found.entropy.toFixed(2)} nats, as of ${Math.exp(found.entropy).toFixed(1)} words with equal ` +
      `shares; all ${scores.length} equal would have ${most.toFixed(2)}.`;
  }

  update();
  return [
    [
      part(controls(head, temperature, { element: divide })),
      part(make("h4", {}, "Where the last word looks"), text),
    ],
    [part(make("h4", {}, "The largest shares"), strongest), part(make("h4", {}, "Entropy"), level, status)],
  ];
}

function samplingLaboratory({ words, places, right, start }) {
  const SHOWN = 24;
  const DARTS = 20;
  const show = () => update();
  const names = Object.keys(places);
  const size = words.length;
  const share = (value) => value.toFixed(2);
  const off = (none, spell) => (value) => (value === none ? "off" : spell(value)); // a filter that keeps all
  const counts = [...STEPS(1, 10, 1), 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000,
    5000, 10_000, 20_000].filter((count) => count < size);
  const place = menu("place", names, 0, show);
  const dials = [
    dial("temperature", STEPS(0.1, 3, 0.1), start.temperature, (value) => value.toFixed(1), show),
    dial("top-k", [...counts, size], start.topK, off(size, whole), show),
    dial("top-p", STEPS(0.05, 1, 0.05), start.topP, off(1, share), show),
    dial("min-p", [0.01, 0.02, ...STEPS(0, 1, 0.05)], start.minP, off(0, share), show),
  ];
  const status = make("p", { role: "status" });
  const bars = make("div", { class: "kept" });
  const button = make("button", { type: "button" }, `Draw ${DARTS} words`);
  const drawn = make("p", { class: "drawn", "aria-live": "polite" });
  let seed = 0; // no darts yet
  button.addEventListener("click", () => { seed += 1; update(); });

  function update() {
    const at = names[place.value()];
    const [temperature, topK, topP, minP] = dials.map(({ value }) => value());
    const { said, left, kept, mass } = sampling({ scores: places[at], temperature, topK, topP, minP });
    const fits = new Set(right[at] ?? []);
    const isRight = (id) => (right[at] ? (fits.has(id) ? " ✓" : " ✗") : "");
    const order = said.map((_, i) => i).sort((a, b) => said[b] - said[a] || a - b).slice(0, SHOWN);
    const longest = Math.max(...order.map((id) => Math.max(said[id], left[id])));
    const width = (part) => `width: ${((100 * part) / longest).toFixed(1)}%`;
    const rows = order.map((id) => {
      const filled = make("span", { class: "left", style: width(left[id]) });
      const outline = make("span", { class: "said", style: width(said[id]) });
      const number = (part) => make("td", { class: "number" }, part > 0 ? percent(part, 1) : "–");
      return [words[id] + isRight(id), number(said[id]), number(left[id]),
        make("td", {}, make("div", { class: "track", "aria-hidden": true }, filled, outline))];
    });
    bars.replaceChildren(table(["word", "model", "left", "as bars"], rows));
    bars.querySelectorAll("tbody tr").forEach((row, i) => row.classList.toggle("gone", left[order[i]] === 0));
    const good = right[at] ? ` ${percent(sum(right[at].map((id) => left[id])), 1)} of what is left is right.` : "";
    status.textContent = `Of ${whole(size)} tokens, top-k keeps ${whole(kept[0])}, top-p of these ${whole(kept[1])}, ` +
      `min-p of these ${whole(kept[2])}. They had ${percent(mass, 1)} of the probability at this temperature.${good}`;
    if (!seed) return;
    const ids = draw({ probabilities: left, seed, count: DARTS });
    const wrong = ids.filter((id) => right[at] && !fits.has(id)).length;
    const verdict = right[at] ? ` (${DARTS - wrong} right, ${wrong} wrong)` : "";
    drawn.replaceChildren(`Seed ${seed}${verdict}: `, ...ids.flatMap((id) => {
      const kind = right[at] && !fits.has(id) ? "piece wrong" : "piece";
      return [make("span", { class: kind }, words[id] + isRight(id)), " "];
    }));
  }

  update();
  return [
    [
      part(controls(place, ...dials)),
      part(make("h4", {}, "What is left to draw from"), status),
      part(button, drawn),
    ],
    [part(make("h4", {}, `The ${Math.min(SHOWN, size)} likeliest tokens`),
      colours(["said", "the model's"], ["left", "left to draw from"]), bars)],
  ];
}

const KINDS = { rotary: rotaryLaboratory, softmax: softmaxLaboratory, sampling: samplingLaboratory };

function render({ model, el }) {
  const columns = KINDS[model.get("kind")](model.get("given"));
  el.append(view("minillama-laboratory", ...columns));
}

export default { render, rotary, softmax, sampling, draw };
