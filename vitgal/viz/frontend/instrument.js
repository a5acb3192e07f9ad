// The instrument: rankings, pairs and scores of retrieval runs, drawn from one JSON document.
//
// `mount(root, data, options)` draws into an element. `data` is what vitgal.viz.run_document describes.
// Images and pairs come from a source: a page stores them, a notebook requests them from its kernel.
// Texts of the document enter the page only as text nodes, never as markup.

const PROTOCOLS = ["easy", "medium", "hard"];
const POSITIVES = { easy: ["easy"], medium: ["easy", "hard"], hard: ["hard"] };
const IGNORED = { easy: ["hard", "junk"], medium: ["junk"], hard: ["easy", "junk"] };
const LETTERS = { easy: "E", hard: "H", junk: "J", negative: "N" };
const VIEWS = ["overview", "ranking", "pair", "compare"];
const SEARCH_VIEWS = ["own", "pair"]; // of a search among photographs without labels
const COLOURS = {
  easy: "#009E73",
  hard: "#F2A100",
  negative: "#A31621",
  junk: "#8A8A8A",
  query: "#0072B2",
  box: "#FFE14D",
  inlier: "#00E5A0",
  rejected: "#F0606E",
};
const KEYS = [
  ["1 2 3 4", "overview, ranking, pair, compare"],
  ["↑ ↓", "previous, next query"],
  ["← →", "previous, next image of the ranking"],
  ["Enter", "open the pair of query and image"],
  ["n, Shift+click", "the neighbours of the image, by descriptor; own photographs: search with it"],
  ["Shift+↑ ↓", "overview: select the query and the one above, below"],
  ["Esc", "back: pair to ranking, ranking to overview; clears a selection"],
  ["p", "next protocol"],
  ["s", "star the query, or the pair in the pair view"],
  ["0", "pair view: show both photographs whole"],
  ["+ −, Shift+arrows", "on the photographs: zoom, pan"],
  ["Space", "on the photographs, with a kernel: compare the patch in the middle of the query"],
  ["a", "own photographs: add the pair to the list"],
  ["?", "this list"],
];
const SVG = "http://www.w3.org/2000/svg";

// ---------------------------------------------------------------- small helpers

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
const whole = (value) => (value === null ? null : `${Math.round(100 * value)} %`);
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(1);
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const rising = (numbers) => [...numbers].sort((a, b) => a - b);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function button(text, onclick, properties = {}) {
  return element("button", { type: "button", onclick, ...properties }, text);
}

function option(text, checked, change) {
  const input = element("input", {
    type: "checkbox",
    checked,
    onchange: () => change(input.checked),
  });
  return element("label", { class: "option" }, input, text);
}

function save(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function choice(label, [options, value], change) {
  const select = element(
    "select",
    { "aria-label": label, onchange: () => change(select.value) },
    ...options.map((one) => {
      const [name, text] = Array.isArray(one) ? one : [one, one];
      return element("option", { value: name, selected: name === value }, text);
    }),
  );
  return select;
}

function slider(text, [low, high, step, value], change) {
  const shown = element("output", {}, String(value));
  const input = element("input", {
    type: "range",
    min: low,
    max: high,
    step,
    value,
    oninput: () => {
      shown.textContent = input.value;
      change(Number(input.value));
    },
  });
  return element("label", { class: "option" }, text, input, shown);
}

function table(head, rows, properties = {}) {
  return element(
    "table",
    properties,
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        ...head.map((cell) => (cell ? element("th", { scope: "col" }, cell) : element("td"))),
      ),
    ),
    element("tbody", {}, ...rows),
  );
}

const row = (...cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));

// ---------------------------------------------------------------- the document, and values derived from it

class Entry {
  constructor(data, number) {
    this.number = number;
    Object.assign(this, data.entries[number]);
    this.title = `${this.run} · ${this.dataset}`;
    this.stages = Object.keys(this.scores);
    this.reranked = this.stages.includes("reranked");
    this.searched = this.kind === "search"; // own photographs with a kernel that searches
    this.own = this.kind === "own" || this.searched; // own photographs: no labels, but probabilities and places
    this.labels = this.queries.map((query) => {
      const labels = new Map();
      for (const label of ["easy", "hard", "junk"])
        for (const image of query.labels[label]) labels.set(image, label);
      return labels;
    });
    this.byImage = new Map(this.queries.map((query, index) => [query.image, index]));
  }

  get views() {
    if (this.searched) return SEARCH_VIEWS;
    return this.own ? VIEWS.filter((name) => name !== "compare") : VIEWS;
  }

  protocols() {
    return PROTOCOLS.filter((name) => name in this.scores.global);
  }

  ap(stage, protocol, query) {
    return this.scores[stage]?.[protocol]?.ap[query] ?? null;
  }

  last(protocol, query) {
    return this.ap(this.stages[this.stages.length - 1], protocol, query);
  }

  label(query, image) {
    if (this.own) {
      const probability = this.probability(query, image);
      return probability !== null && probability >= this.threshold ? "easy" : "negative";
    }
    return this.labels[query].get(image) ?? "negative";
  }

  // The images of a ranking with their ranks among those that the protocol does not ignore.
  ranking(query, protocol, after) {
    const entry = this.queries[query];
    const images = after && this.reranked ? entry.after[protocol] : entry.before;
    let rank = 0;
    return images.map((image) => {
      const label = this.label(query, image);
      const ignored = (IGNORED[protocol] ?? []).includes(label);
      return { image, label, ignored, rank: ignored ? null : ++rank };
    });
  }

  similarity(query, image) {
    const position = this.queries[query].before.indexOf(image);
    return position < 0 ? null : this.queries[query].similarity[position];
  }

  inliers(query, image) {
    const position = this.queries[query].verified.indexOf(image);
    return position < 0 ? null : this.queries[query].inliers[position];
  }

  // That an image shows the query's place; null where it is unknown.
  probability(query, image) {
    const { verified, probability } = this.queries[query];
    return probability?.[verified.indexOf(image)] ?? null;
  }

  pair(query, image) {
    return this.queries[query].pairs.find((pair) => pair.image === image) ?? null;
  }

  // The queries and database images within a rectangle of the map, whose sides go from 0 to 1.
  within([x0, y0, x1, y1]) {
    const { images, points } = this.map;
    const count = this.queries.length;
    const found = [...images.keys()].filter((index) => {
      const [x, y] = [points[2 * index], points[2 * index + 1]];
      return x >= x0 && x <= x1 && y >= y0 && y <= y1;
    });
    return {
      queries: found.filter((index) => index < count),
      images: found.filter((index) => index >= count).map((index) => images[index]),
    };
  }
}

// ---------------------------------------------------------------- sources of images and pairs

const STAYS = "What is shown stays as it was.";
const GONE = `The kernel has ended: run the notebook's cells again. ${STAYS}`;

// A page: `data.thumbs` has an address or null for each image, `data.photos` image number -> address.
class StoredSource {
  constructor(data) {
    this.data = data;
    this.live = false;
  }

  address(image, large) {
    return (large ? this.data.photos[image] : null) ?? this.data.thumbs[image] ?? null;
  }
}

const PATIENCE = { tokens: 120, patch: 120, pair: 20, search: 120, drop: 120 }; // seconds

// A notebook: everything is requested from the kernel; images are cached.
class KernelSource {
  constructor(model) {
    this.model = model;
    this.live = true;
    this.waiting = new Map();
    this.addresses = new Map();
    this.queue = []; // of images that have not been asked for yet
    this.asked = 0; // images that are under way
    this.count = 0;
    // Every view of one widget receives all answers: an id says whose they are.
    this.name = Math.random().toString(36).slice(2);
    model.on("msg:custom", (content, buffers) => {
      const answer = this.waiting.get(content.id);
      if (!answer) return;
      this.waiting.delete(content.id);
      clearTimeout(answer.timer);
      if (content.error) answer.fail(new Error(content.error));
      else answer.done([content, buffers]);
    });
    // Where the kernel's state is known, as in JupyterLab, its end is noticed at once.
    model.on("comm_live_update", () => this.end());
    model.widget_manager?.kernel?.statusChanged?.connect((_, status) => {
      if (["autorestarting", "restarting", "terminating", "dead"].includes(status)) this.end();
    });
  }

  end() {
    this.ended = true;
    for (const { fail, timer } of this.waiting.values()) {
      clearTimeout(timer);
      fail(new Error(GONE));
    }
    this.waiting.clear();
  }

  ask(question, buffers = []) {
    if (this.ended) return Promise.reject(new Error(GONE));
    const id = `${this.name} ${++this.count}`;
    return new Promise((done, fail) => {
      const seconds = PATIENCE[question.kind] ?? 60;
      const silent = new Error(`The kernel has not answered for ${seconds} seconds. ${STAYS}`);
      const timer = setTimeout(() => {
        this.waiting.delete(id);
        fail(silent);
      }, 1000 * seconds);
      this.waiting.set(id, { done, fail, timer });
      this.model.send({ ...question, id }, undefined, buffers);
    });
  }

  // Two images at a time, large ones first, so that no question on a pair waits for all of a grid.
  address(image, large) {
    const name = `${image} ${large}`;
    if (!this.addresses.has(name)) {
      const asked = new Promise((done) => {
        this.queue[large ? "unshift" : "push"]({ image, large, name, done });
      });
      this.addresses.set(name, asked);
      this.askImage();
    }
    return this.addresses.get(name);
  }

  async askImage() {
    if (this.asked === 2 || !this.queue.length) return;
    const { image, large, name, done } = this.queue.shift();
    this.asked++;
    const answer = await this.ask({ kind: "image", image, large }).catch(() => [null, []]);
    this.asked--;
    const [bytes] = answer[1];
    const url = bytes ? URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })) : null;
    this.addresses.set(name, url);
    done(url);
    this.askImage();
  }
}

// ---------------------------------------------------------------- state, linked between all views

class State {
  // start: a view, query, image or protocol to begin with. A page keeps the choice in its address.
  constructor(data, source, start) {
    this.data = data;
    this.source = source;
    this.addressed = !source.live;
    this.entries = data.entries.map((_, number) => new Entry(data, number));
    Object.assign(this, { view: "overview", number: 0, query: 0, protocol: "medium", image: null });
    const comparable = data.comparisons.find(({ first, reason }) => first === 0 && !reason);
    this.other = comparable?.second ?? 0;
    this.chosen = null; // the queries that a brush has selected; null: all
    this.area = null; // the brush of the map, its left, top, right and bottom from 0 to 1; null: all
    this.asked = null; // the database image whose neighbours are shown
    this.after = true;
    this.labels = new Set(Object.keys(LETTERS));
    this.sorting = { column: null, falling: false }; // of the table of queries
    this.display = { ...DISPLAY }; // what the pair view shows
    this.knobs = {}; // settings of matching that were turned, in place of the run's
    this.blinker = null; // the timer of the pair view
    this.asking = 0;
    this.listeners = [];
    this.notes = new Notes(data, source);
    this.notes.failed = () => this.set({});
    this.list = []; // pairs of own photographs, each two image numbers
    this.patch = null; // the patch whose similarities are shown: its side, x and y
    Object.assign(this, start);
    if (this.addressed) this.readAddress();
    else this.check();
  }

  get entry() {
    return this.entries[this.number];
  }

  set(changes) {
    Object.assign(this, changes);
    this.check();
    this.writeAddress();
    for (const listener of this.listeners) listener(this);
  }

  check() {
    const valid = (value, count) =>
      Number.isInteger(value) && value >= 0 && value < count ? value : 0;
    this.number = valid(this.number, this.entries.length);
    this.other = valid(this.other, this.entries.length);
    this.query = valid(this.query, this.entry.queries.length);
    if (!this.entry.views.includes(this.view)) this.view = this.entry.views[0];
    if (!this.entry.protocols().includes(this.protocol)) this.protocol = this.entry.protocols()[0];
    if (!(this.image in this.data.names)) this.image = null;
    if (!(this.asked in this.data.names)) this.asked = null;
    this.chosen = this.chosen?.filter((query) => query in this.entry.queries) ?? null;
    if (!this.chosen?.length) this.chosen = null;
    if (this.area?.length !== 4 || !this.area.every(Number.isFinite)) this.area = null;
    this.region = // the images within the brush of the map; null: all
      this.area && this.entry.map ? new Set(this.entry.within(this.area).images) : null;
  }

  readAddress() {
    const address = new URLSearchParams(location.hash.slice(1));
    this.view = address.get("view") ?? this.view;
    this.protocol = address.get("protocol") ?? this.protocol;
    for (const name of ["number", "query", "image", "other", "asked"])
      if (address.has(name)) this[name] = Number(address.get(name));
    for (const name of ["chosen", "area"])
      this[name] = address.get(name)?.split(",").map(Number) ?? null;
    if (address.has("labels")) this.labels = new Set(address.get("labels").split(","));
    this.check();
  }

  writeAddress() {
    if (!this.addressed) return;
    const address = new URLSearchParams({ view: this.view, protocol: this.protocol });
    for (const name of ["number", "query", "image", "other", "asked", "chosen", "area"])
      if (this[name] !== null) address.set(name, this[name]);
    if (this.labels.size < Object.keys(LETTERS).length) address.set("labels", [...this.labels]);
    history.replaceState(null, "", `#${address}`);
  }

  // The shown pair, for a question; a search names its query, for another view may search as well.
  get shownPair() {
    const { image: searched, box } = this.entry.queries[this.query];
    const search = this.entry.searched ? { searched, box } : {};
    return { query: this.query, image: this.image, ...search };
  }

  // The images of the shown ranking that pass the filters.
  shown(after = this.after) {
    if (!this.entry.queries.length) return [];
    return this.entry
      .ranking(this.query, this.protocol, after)
      .filter(
        ({ image, label }) => this.labels.has(label) && (!this.region || this.region.has(image)),
      );
  }

  // Asks with an image: for a search, its own ranking, or else its nearest images.
  ask(image) {
    const query = this.entry.own ? this.entry.byImage.get(image) : undefined;
    if (this.entry.searched) {
      this.view = "own";
      search(this, { kind: "search", image, box: null });
    } else if (query === undefined) this.set({ image, asked: image, view: "ranking" });
    else this.set({ query, image: null, view: "ranking" });
  }

  // Adds the query above or below in the table to the selected ones.
  extend(step) {
    const all = columnsAndOrder(this).order;
    const chosen = this.chosen ?? [this.query];
    const places = chosen.map((query) => all.indexOf(query));
    const next = all[step + (step < 0 ? Math.min(...places) : Math.max(...places))];
    if (next !== undefined) this.set({ chosen: rising([...chosen, next]), query: next });
  }

  step(queries, images) {
    const all = this.chosen ?? this.entry.queries.map((_, index) => index);
    if (queries && all.length) {
      const position = all.indexOf(this.query);
      this.set({ query: all[(position + queries + all.length) % all.length], image: null });
    }
    if (images) {
      const list = this.shown().map(({ image }) => image);
      if (!list.length) return;
      const position = list.indexOf(this.image);
      this.set({ image: list[clamp(position + images, 0, list.length - 1)] });
    }
  }
}

// Stars and remarks on queries and pairs: the run's notes.json. A kernel keeps them there; a page
// keeps them in the browser and exports them.
class Notes {
  constructor(data, source) {
    this.source = source;
    this.fault = null;
    const text = data.entries.map(({ run, dataset }) => `${run}/${dataset}`).join(" ");
    this.key = `vitgal notes ${text}`;
    this.values = { ...data.notes };
    if (source.live) return;
    try {
      const stored = JSON.parse(localStorage.getItem(this.key) ?? "{}");
      if (stored && typeof stored === "object") Object.assign(this.values, stored);
    } catch {
      // Without storage the notes last as long as the page is open.
    }
  }

  static name(entry, query, image, names) {
    const parts = [entry.run, entry.dataset, names[entry.queries[query].image]];
    return (image === null ? parts : [...parts, names[image]]).join(" | ");
  }

  get(name) {
    return Object.hasOwn(this.values, name) ? this.values[name] : { star: false, note: "" };
  }

  set(name, value) {
    this.values[name] = value;
    if (this.source.live) {
      this.source.ask({ kind: "note", name, value }).then(
        () => (this.fault = null),
        (fault) => {
          this.fault = fault.message;
          this.failed();
        },
      );
      return;
    }
    try {
      localStorage.setItem(this.key, JSON.stringify(this.values));
    } catch {
      // As above.
    }
  }

  download() {
    const kept = Object.entries(this.values).filter(([, { star, note }]) => star || note);
    save("notes.json", JSON.stringify(Object.fromEntries(kept), null, 1));
  }
}

// ---------------------------------------------------------------- parts that several views use

function aspect({ data }, image) {
  const [width, height] = data.sizes[image];
  return width && height ? clamp(width / height, 0.66, 2.5) : 1.33;
}

// A tile grows with its line so that all of a line keep one height.
const growing = (state, image) => {
  const ratio = aspect(state, image);
  return { flex: `${ratio} 1 ${Math.round(104 * ratio) + 8}px` };
};

function picture(state, image, properties = {}) {
  const name = state.data.names[image];
  const style = { aspectRatio: String(aspect(state, image)) };
  const missing = () => element("span", { class: "missing", style }, name);
  const address = state.source.address(image, false);
  if (address === null) return missing();
  const node = element("img", {
    alt: name,
    loading: "lazy",
    decoding: "async",
    style,
    ...properties,
  });
  if (typeof address === "string") node.src = address;
  else address.then((found) => (found ? (node.src = found) : node.replaceWith(missing())));
  return node;
}

function noteControls(state, image) {
  const name = Notes.name(state.entry, state.query, image, state.data.names);
  const value = state.notes.get(name);
  const star = button(value.star ? "★ starred" : "☆ star", () => toggleStar(state, image), {
    "aria-pressed": String(value.star),
  });
  const note = element("input", {
    type: "text",
    value: value.note,
    placeholder: "note",
    "aria-label": image === null ? "note on this query" : "note on this pair",
    onchange: () => state.notes.set(name, { ...state.notes.get(name), note: note.value }),
  });
  const { fault } = state.notes;
  const said = fault && element("span", { role: "alert" }, `The note is not kept: ${fault}`);
  return element("span", { class: "notes" }, star, note, said);
}

function toggleStar(state, image) {
  if (!state.entry.queries.length) return;
  const name = Notes.name(state.entry, state.query, image, state.data.names);
  const value = state.notes.get(name);
  state.notes.set(name, { ...value, star: !value.star });
  state.set({});
}

// Says what reproduces the shown view: a command, or parameters of notebooks.
function reproduction(state) {
  const { entry, data, query, knobs } = state;
  const shell = (text) => (/^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const command = (...words) => [
    "On the command line:",
    [["vitgal", ...words.map(shell)].join(" ")],
  ];
  const text = (name, value) => `${name}: ${JSON.stringify(value)}`;
  const other = state.entries[state.other];
  if (state.view === "compare" && other !== entry) return command("compare", entry.run, other.run);
  if (state.view === "compare")
    return command(
      "compare",
      ...["global", "rerank"].map((stage) => `${entry.run}/${entry.dataset}/${stage}`),
    );
  const asked = entry.queries[query];
  if (entry.own && !entry.searched)
    return command("own", entry.dataset, ...(asked ? ["--query", data.names[asked.image]] : []));
  if (state.view === "overview" || !asked) return command("report", entry.run);
  const lines = [text("run_dir", entry.run)];
  if (entry.searched) {
    lines.push(text("query_image", data.names[asked.image]));
    if (asked.box) lines.push(`query_box: [${asked.box.join(", ")}]`);
  } else lines.push(text("dataset", entry.dataset), `query_index: ${query}`);
  const index = state.view === "pair" && data.indices[state.image];
  if (Number.isInteger(index)) lines.push(`image_index: ${index}`);
  const turned =
    state.view === "pair" ? Object.keys(knobs).filter((name) => name !== "hidden") : [];
  for (const name of turned) lines.push(text(SETTINGS[name] ?? name, knobs[name]));
  const notebooks = entry.searched
    ? "notebook 08"
    : turned.length
      ? "notebooks 06 and 07"
      : "notebook 07";
  return [`For ${notebooks}, as a params file or by -p NAME VALUE:`, lines];
}

function parametersButton(state) {
  return button("copy as parameters", () => {
    const [title, lines] = reproduction(state);
    const text = element("textarea", {
      readOnly: true,
      rows: lines.length,
      value: lines.join("\n"),
    });
    const dialog = element(
      "dialog",
      { class: "vitgal-dialog", "aria-label": "parameters", onclose: () => dialog.remove() },
      element("p", {}, title),
      text,
      button("close", () => dialog.close()),
    );
    document.body.append(dialog);
    dialog.showModal();
    text.select();
    navigator.clipboard?.writeText(text.value).catch(() => {});
  });
}

// Draws a rectangle while the mouse is down and reports it in the element's pixels.
function brush(node, moved, ended) {
  let start = null;
  const place = (event) => {
    const box = node.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const area = (event) => {
    const end = place(event);
    return [0, 1]
      .map((i) => Math.min(start[i], end[i]))
      .concat([0, 1].map((i) => Math.max(start[i], end[i])));
  };
  node.addEventListener("pointerdown", (event) => {
    start = place(event);
    node.setPointerCapture(event.pointerId);
  });
  node.addEventListener("pointermove", (event) => start && moved(area(event)));
  node.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [x0, y0, x1, y1] = area(event);
    start = null;
    ended(x1 - x0 + (y1 - y0) < 6 ? null : [x0, y0, x1, y1], [x0, y0]);
  });
}

// Shows a hint beside the pointer, on the side that has more room.
function placeHint(hint, { clientX, clientY }) {
  const { left, top, width, height } = hint.parentElement.getBoundingClientRect();
  const [x, y] = [clientX - left, clientY - top];
  const [right, low] = [x > width / 2, y > height / 2];
  Object.assign(hint.style, {
    left: right ? "auto" : `${x + 14}px`,
    right: right ? `${width - x + 14}px` : "auto",
    top: low ? "auto" : `${y}px`,
    bottom: low ? `${height - y}px` : "auto",
  });
  hint.hidden = false;
}

// ---------------------------------------------------------------- overview

function overview(state) {
  const { entry } = state;
  if (entry.own) return ownOverview(state);
  return element(
    "div",
    { class: "overview" },
    element(
      "section",
      {},
      element("h2", {}, "Scores"),
      scoreTable(state),
      ...Object.entries(entry.tests)
        .filter(([protocol]) => protocol === state.protocol)
        .map(([protocol, sentence]) =>
          element("p", {}, `${capital(protocol)}, reranked against global: ${sentence}`),
        ),
      element(
        "details",
        {},
        element("summary", {}, "What was set"),
        table(
          ["setting", "value"],
          entry.settings.map(([name, value]) => row(name, value)),
        ),
      ),
    ),
    element(
      "section",
      {},
      element("h2", {}, entry.reranked ? "AP before and after reranking" : "AP"),
      scatter(state),
    ),
    element("section", {}, element("h2", {}, "Descriptor map"), descriptorMap(state)),
    element(
      "section",
      { class: "wide" },
      element("h2", {}, "Queries"),
      selectionLine(state),
      queryTable(state),
    ),
  );
}

// Own photographs: the places, the best photograph of each first, and the queries.
function ownOverview(state) {
  const { entry } = state;
  const open = (image) => () => {
    const query = entry.byImage.get(image);
    if (query !== undefined) state.set({ query, view: "ranking", image: null });
  };
  const places = (entry.places ?? []).map(({ images, probability }, number) =>
    element(
      "section",
      { class: "wide" },
      element("h3", {}, `Place ${number + 1}: ${images.length} photographs`),
      element(
        "div",
        { class: "grid" },
        ...images.map((image, index) =>
          element(
            "button",
            { type: "button", class: "tile", title: state.data.names[image], onclick: open(image) },
            picture(state, image),
            element(
              "span",
              { class: "caption" },
              `${index ? "" : "best, "}${whole(probability[index])}`,
            ),
          ),
        ),
      ),
    ),
  );
  const left = entry.left_out.map(([name, reason]) => row(name, reason));
  return element(
    "div",
    { class: "overview" },
    entry.places &&
      element("h2", { class: "wide" }, `${places.length} places in ${entry.database} photographs`),
    ...places,
    element("section", { class: "wide" }, element("h2", {}, "Queries"), queryTable(state)),
    left.length
      ? element("section", {}, element("h2", {}, "Left out"), table(["photograph", "why"], left))
      : null,
  );
}

function selectionLine(state) {
  const total = state.entry.queries.length;
  if (!state.chosen && !state.region)
    return element("p", {}, `${total} queries; drag in a plot or over rows to select some.`);
  const parts = [];
  if (state.chosen) parts.push(`${state.chosen.length} of ${total} queries`);
  if (state.region) parts.push(`${state.region.size} images of the map`);
  const clear = button("show all", () => state.set({ chosen: null, area: null }));
  return element("p", {}, `Selected: ${parts.join(", ")}. `, clear);
}

function scoreTable(state) {
  const protocols = state.entry.protocols();
  const rows = Object.entries(state.entry.scores).map(([stage, results]) => {
    const cells = protocols.map((protocol) => {
      const { map, interval, mp_at: precision } = results[protocol];
      const [low, high] = interval ?? [null, null];
      return element(
        "span",
        { title: `mP@10 ${percent(precision?.["10"])}` },
        element("b", {}, percent(map)),
        low === null ? "" : ` (${percent(low)} to ${percent(high)})`,
      );
    });
    return row(stage, ...cells);
  });
  const caption = element("caption", {}, "mAP in percent, with its 95 % interval");
  const scores = table(["", ...protocols.map(capital)], rows, { class: "scores" });
  scores.prepend(caption);
  return scores;
}

function scatter(state) {
  const { entry, protocol } = state;
  const size = 340;
  const margin = 40;
  const place = (value) => margin + value * (size - 2 * margin);
  const dots = entry.queries
    .map((_, query) => ({
      query,
      after: entry.last(protocol, query),
      before: entry.ap("global", protocol, query),
    }))
    .filter(({ before, after }) => before !== null && after !== null);
  if (!entry.reranked) {
    dots.sort((a, b) => a.after - b.after);
    dots.forEach((dot, index) => (dot.before = dots.length > 1 ? index / (dots.length - 1) : 0.5));
  }
  const label = entry.reranked
    ? "AP before and after reranking, a dot a query"
    : "AP of the queries in rising order";
  const chart = svg("svg", {
    viewBox: `0 0 ${size} ${size}`,
    class: "chart",
    role: "img",
    "aria-label": label,
  });
  const frame = { x: margin, y: margin, width: size - 2 * margin, height: size - 2 * margin };
  chart.append(svg("rect", { ...frame, class: "frame" }));
  if (entry.reranked)
    chart.append(
      svg("line", { x1: place(0), y1: place(1), x2: place(1), y2: place(0), class: "diagonal" }),
    );
  for (const value of [0, 0.5, 1]) {
    const text = String(100 * value);
    if (entry.reranked)
      chart.append(
        svg("text", { x: place(value), y: size - margin + 16, "text-anchor": "middle" }, text),
      );
    chart.append(
      svg("text", { x: margin - 6, y: place(1 - value) + 4, "text-anchor": "end" }, text),
    );
  }
  const below = entry.reranked ? `AP before (${protocol}, percent)` : "queries in rising order";
  chart.append(svg("text", { x: size / 2, y: size - 8, "text-anchor": "middle" }, below));
  const side = svg("text", {
    transform: `translate(12 ${size / 2}) rotate(-90)`,
    "text-anchor": "middle",
  });
  side.append(entry.reranked ? "AP after" : `AP (${protocol}, percent)`);
  chart.append(side);
  const selection = svg("rect", { class: "brush", width: 0, height: 0 });
  const shade = (query) => (state.chosen && !state.chosen.includes(query) ? "dot faded" : "dot");
  const hint = element("div", { class: "hint", hidden: true });
  for (const { query, before, after } of dots) {
    const dot = svg("circle", {
      cx: place(before),
      cy: place(1 - after),
      r: query === state.query ? 6 : 4,
      class: query === state.query ? "dot current" : shade(query),
      onpointerenter: (event) => {
        const name = state.data.names[entry.queries[query].image];
        const numbers = entry.reranked ? `${percent(before)} → ${percent(after)}` : percent(after);
        hint.replaceChildren(picture(state, entry.queries[query].image), `${name}: AP ${numbers}`);
        placeHint(hint, event);
      },
      onpointerleave: () => (hint.hidden = true),
    });
    chart.append(dot);
  }
  chart.append(selection);
  const factor = () => size / chart.getBoundingClientRect().width;
  brush(
    chart,
    (area) => {
      const [x0, y0, x1, y1] = area.map((side) => side * factor());
      for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0 }))
        selection.setAttribute(name, value);
    },
    (area, [x, y]) => {
      const scale = factor();
      const distance = (dot) =>
        Math.hypot(place(dot.before) - x * scale, place(1 - dot.after) - y * scale);
      if (!area) {
        const nearest = dots.reduce((a, b) => (distance(a) <= distance(b) ? a : b), dots[0]);
        if (nearest && distance(nearest) < 10)
          state.set({ query: nearest.query, view: "ranking", image: null });
        else state.set({ chosen: null });
        return;
      }
      const [x0, y0, x1, y1] = area.map((side) => side * scale);
      const within = (value, low, high) => value >= low && value <= high;
      const chosen = dots.filter(
        (dot) => within(place(dot.before), x0, x1) && within(place(1 - dot.after), y0, y1),
      );
      state.set({ chosen: rising(chosen.map(({ query }) => query)) });
    },
  );
  return element("div", { class: "plot" }, chart, hint);
}

// PCA and t-SNE of all descriptors: queries are large, images have their label's colour.
function descriptorMap(state) {
  const { entry } = state;
  if (!entry.map) return element("p", {}, "Fewer than four descriptors: there is no map.");
  const size = 340;
  const { images, points } = entry.map;
  const queries = entry.queries.length;
  const place = (index) => [
    12 + points[2 * index] * (size - 24),
    12 + points[2 * index + 1] * (size - 24),
  ];
  const canvas = element("canvas", {
    class: "chart",
    role: "img",
    "aria-label": "map of all descriptors",
  });
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = size * ratio;
  const context = canvas.getContext("2d");
  const hint = element("div", { class: "hint", hidden: true });
  const draw = (area) => {
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size, size);
    for (let index = images.length - 1; index >= 0; index--) {
      const [x, y] = place(index);
      const isQuery = index < queries;
      const label = isQuery ? "query" : entry.label(state.query, images[index]);
      const plain = label === "negative";
      const current = isQuery && index === state.query;
      const out = isQuery
        ? state.chosen && !state.chosen.includes(index)
        : state.region && !state.region.has(images[index]);
      context.globalAlpha = out ? 0.2 : 1;
      context.fillStyle = plain ? "#B5B5B5" : COLOURS[label];
      context.beginPath();
      context.arc(x, y, current ? 7 : isQuery ? 4 : plain ? 2 : 4.5, 0, 2 * Math.PI);
      context.fill();
      if (current) {
        context.strokeStyle = "#111";
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    if (!area) return;
    const [x0, y0, x1, y1] = area;
    context.fillStyle = "rgba(0, 114, 178, 0.15)";
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
  };
  const scale = () => size / canvas.getBoundingClientRect().width;
  const nearest = (x, y) => {
    let [best, least] = [-1, 64];
    for (let index = 0; index < images.length; index++) {
      const [px, py] = place(index);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [index, distance];
    }
    return best;
  };
  brush(
    canvas,
    (area) => draw(area.map((side) => side * scale())),
    (area, start) => {
      if (!area) {
        const index = nearest(...start.map((side) => side * scale()));
        if (index < 0) state.set({ area: null, chosen: null });
        else if (index < queries) state.set({ query: index, view: "ranking", image: null });
        else state.set({ image: images[index], view: "pair" });
        return;
      }
      const sides = area.map((side) => Number(((side * scale() - 12) / (size - 24)).toFixed(3)));
      state.set({ area: sides, chosen: entry.within(sides).queries });
    },
  );
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const index = nearest(
      (event.clientX - box.left) * scale(),
      (event.clientY - box.top) * scale(),
    );
    hint.hidden = index < 0;
    if (index < 0) return;
    hint.replaceChildren(picture(state, images[index]), state.data.names[images[index]]);
    placeHint(hint, event);
  });
  canvas.addEventListener("pointerleave", () => (hint.hidden = true));
  draw(null);
  const shown =
    entry.database > images.length - queries
      ? ` The first ${images.length - queries} of ${entry.database} database images are drawn.`
      : "";
  const text = `Blue: queries. Green, orange: easy and hard images of the chosen query.${shown}`;
  return element("div", { class: "plot" }, canvas, hint, element("p", { class: "small" }, text));
}

// The columns of the table of queries, each a name and a function of a query, and its order of all.
function columnsAndOrder(state) {
  const { entry, protocol, sorting } = state;
  const best = (query) => entry.queries[query].after[protocol][0];
  const ownColumns = [
    ["query", (query) => state.data.names[entry.queries[query].image]],
    ["first", (query) => state.data.names[best(query)] ?? null],
    ["inliers", (query) => entry.inliers(query, best(query))],
    ["shows it", (query) => whole(entry.probability(query, best(query)))],
  ];
  const columns = entry.own
    ? ownColumns
    : [
        ["query", (query) => state.data.names[entry.queries[query].image]],
        [entry.reranked ? "AP before" : "AP", (query) => entry.ap("global", protocol, query)],
        ...(entry.reranked
          ? [
              ["AP after", (query) => entry.last(protocol, query)],
              [
                "change",
                (query) => entry.last(protocol, query) - entry.ap("global", protocol, query),
              ],
            ]
          : []),
        [
          "positives",
          (query) =>
            POSITIVES[protocol].reduce(
              (sum, label) => sum + entry.queries[query].labels[label].length,
              0,
            ),
        ],
        ["last positive at rank", (query) => entry.queries[query].worst[protocol]?.[2] ?? null],
      ];
  const order = [...entry.queries.keys()];
  if (sorting.column !== null && sorting.column < columns.length) {
    const value = columns[sorting.column][1];
    const sign = sorting.falling ? -1 : 1;
    const compare = (a, b) =>
      typeof a === "string" ? a.localeCompare(b) : (a ?? Infinity) - (b ?? Infinity);
    order.sort((a, b) => sign * compare(value(a), value(b)));
  }
  return { columns, order };
}

function queryTable(state) {
  const { entry, sorting } = state;
  const { columns, order } = columnsAndOrder(state);
  const queries = order.filter((query) => !state.chosen || state.chosen.includes(query));
  const head = columns.map(([name], index) =>
    button(name + (sorting.column === index ? (sorting.falling ? " ▼" : " ▲") : ""), () => {
      Object.assign(sorting, {
        falling: sorting.column === index && !sorting.falling,
        column: index,
      });
      state.set({});
    }),
  );
  const rows = queries.map((query) => {
    const open = () => state.set({ query, view: "ranking", image: null });
    const cells = columns.map(([name, value], index) => {
      const cell = value(query);
      if (index === 0) {
        const starred = state.notes.get(Notes.name(entry, query, null, state.data.names)).star
          ? "★ "
          : "";
        return button(
          [picture(state, entry.queries[query].image, { alt: "" }), `${starred}${cell}`],
          open,
          { class: "name" },
        );
      }
      if (cell === null) return "–";
      return name === "change"
        ? signed(100 * cell)
        : name.startsWith("AP")
          ? percent(cell)
          : String(cell);
    });
    const line = row(...cells);
    if (query === state.query) line.className = "current";
    return line;
  });
  const whole = table(head, rows, { class: "queries" });
  brushRows(whole.tBodies[0], (first, last) =>
    state.set({ chosen: rising(queries.slice(first, last + 1)) }),
  );
  return element("div", { class: "scroll" }, whole);
}

// Reports the first and the last of several rows that the mouse is drawn over.
function brushRows(body, ended) {
  let start = null;
  const span = (event) => {
    const row = event.target.closest?.("tr");
    return row && start !== null ? rising([start, row.sectionRowIndex]) : [1, 0];
  };
  body.addEventListener("pointerdown", (event) => {
    start = event.target.closest("tr")?.sectionRowIndex ?? null;
  });
  body.addEventListener("pointerover", (event) => {
    if (!event.buttons) start = null;
    const [first, last] = span(event);
    [...body.rows].forEach((row, index) =>
      row.classList.toggle("brushed", first < last && index >= first && index <= last),
    );
  });
  body.addEventListener("pointerup", (event) => {
    const [first, last] = span(event);
    start = null;
    if (first < last) ended(first, last);
  });
}

// ---------------------------------------------------------------- ranking

function ranking(state) {
  const { entry, query, protocol } = state;
  if (!entry.queries.length) return element("p", {}, "This run has no query.");
  const { image, box } = entry.queries[query];
  const after = entry.reranked ? ` → ${percent(entry.last(protocol, query))}` : "";
  const filters = Object.entries(LETTERS).map(([label, letter]) =>
    option(`${letter} ${label}`, state.labels.has(label), (on) => {
      if (on) state.labels.add(label);
      else state.labels.delete(label);
      state.set({});
    }),
  );
  const grids = entry.reranked ? ["before", "after"] : ["before"];
  return element(
    "div",
    { class: "ranking" },
    element(
      "aside",
      {},
      boxedQuery(state, image, box),
      element("h2", {}, state.data.names[image]),
      element(
        "p",
        {},
        entry.own
          ? entry.queries[query].verdict
          : `Query ${query} of ${entry.queries.length}. AP ${percent(entry.ap("global", protocol, query))}${after} (${protocol}).`,
      ),
      entry.own ? null : worstLine(state),
      element(
        "p",
        {},
        button("◀ query", () => state.step(-1, 0)),
        button("query ▶", () => state.step(1, 0)),
      ),
      noteControls(state, null),
      element(
        "div",
        { class: "filters", role: "group", "aria-label": "labels that are shown" },
        ...(entry.own ? [] : filters),
      ),
      state.chosen || state.region ? selectionLine(state) : null,
    ),
    element(
      "div",
      {},
      neighbours(state),
      ...grids.map((name) => {
        const title = name === "before" ? "Global ranking" : "After reranking";
        const tiles = state
          .shown(name === "after")
          .map((item) => tile(state, item, name === "after"));
        const content = tiles.length ? tiles : [element("p", {}, "No image passes the filters.")];
        return element(
          "section",
          {},
          element("h3", {}, title),
          element("div", { class: "grid" }, ...content),
        );
      }),
    ),
  );
}

// The images nearest to a database image, chosen by a click with Shift or the key «n».
function neighbours(state) {
  if (state.asked === null) return null;
  const images = nearest(state, state.asked);
  const close = button("close", () => state.set({ asked: null }));
  const title = element(
    "h3",
    {},
    `Nearest to ${state.data.names[state.asked]} by descriptor `,
    close,
  );
  if (typeof images === "string") return element("section", {}, title, element("p", {}, images));
  const tiles = images.map((image, index) =>
    tile(
      state,
      { image, label: state.entry.label(state.query, image), ignored: false, rank: index + 1 },
      null,
    ),
  );
  return element(
    "section",
    {},
    title,
    element("div", { class: "grid" }, picture(state, state.asked), ...tiles),
  );
}

// The stored neighbours of an image, or a text while the kernel finds them or where none are known.
function nearest(state, image) {
  const { entry, data, source } = state;
  const known = entry.neighbours;
  if (known[image] || !source.live)
    return known[image] ?? "Its neighbours are not stored in the page.";
  known[image] = "The kernel is searching …";
  const end = (images) => {
    known[image] = images;
    state.set({});
  };
  source.ask({ kind: "neighbours", image }).then(
    ([answer]) => {
      for (const part of ["names", "sizes", "indices"])
        answer.neighbours.forEach((found, place) => (data[part][found] = answer[part][place]));
      end(answer.neighbours);
    },
    (fault) => end(fault.message),
  );
  return known[image];
}

function worstLine(state) {
  const worst = state.entry.queries[state.query].worst[state.protocol];
  if (!worst) return element("p", {}, "No positive image under this protocol.");
  const [image, before, after] = worst;
  const ranks = state.entry.reranked ? `${before} → ${after}` : before;
  const open = button("open", () => state.set({ image, view: "pair" }));
  return element(
    "p",
    {},
    `The positive that ranks last: ${state.data.names[image]}, rank ${ranks}. `,
    open,
  );
}

function boxedQuery(state, image, box) {
  const [width, height] = state.data.sizes[image];
  if (!width) return picture(state, image);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "boxed", role: "img" });
  chart.setAttribute("aria-label", `query ${state.data.names[image]}`);
  const photograph = svg("image", { width, height });
  Promise.resolve(state.source.address(image, true)).then(
    (href) => href && photograph.setAttribute("href", href),
  );
  chart.append(photograph);
  if (box) {
    const [x0, y0, x1, y1] = box;
    chart.append(svg("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: "box" }));
  }
  return chart;
}

// after: whether the tile belongs to the reranked ranking; null: to neighbours, without numbers.
function tile(state, { image, label, ignored, rank }, after = false, entry = state.entry) {
  const { query } = state;
  const similarity = entry.similarity(query, image)?.toFixed(3);
  const inliers = entry.inliers(query, image);
  const shows = whole(entry.probability(query, image));
  const second = inliers === null || after === null ? [] : [`${inliers} inliers`, shows];
  const numbers = after === null ? [] : [similarity, ...second].filter(Boolean);
  const place = rank === null ? "ignored" : `rank ${rank}`;
  const frame = entry.own && label === "negative" ? "junk" : label;
  const states = { ignored, current: image === state.image, stored: entry.pair(query, image) };
  return element(
    "button",
    {
      type: "button",
      class: ["tile", frame, ...Object.keys(states).filter((name) => states[name])].join(" "),
      style: growing(state, image),
      title: state.data.names[image],
      "aria-label": [
        state.data.names[image],
        ...(entry.own ? [] : [label]),
        place,
        ...numbers,
      ].join(", "),
      onclick: (event) => {
        state.number = entry.number;
        if (event.shiftKey) state.ask(image);
        else state.set({ image, after: after ?? state.after, view: "pair" });
      },
    },
    picture(state, image),
    element(
      "span",
      { class: "caption" },
      entry.own ? null : element("b", { class: label }, LETTERS[label]),
      `${entry.own ? "" : " "}${rank ?? place}  ${(after !== null && similarity) || ""}\n${second.join("  ")}`.trimEnd(),
    ),
  );
}

// ---------------------------------------------------------------- pair

// What the pair view shows at first.
const DISPLAY = {
  inliers: true,
  rejected: false,
  outline: true,
  together: true,
  opacity: 0.8,
  number: 200,
  mode: "matches",
  fade: 0.5,
  overlay: "",
  scale: null, // of the overlay; null: the nearest to 1
};
const MODES = ["matches", "fade", "blink", "checkerboard"];
const CROP = 64; // stored pixels of an enlarged patch's side

// A patch with its surroundings: alone it is a few pixels.
const widened = ([x0, y0, x1, y1]) => [2 * x0 - x1, 2 * y0 - y1, 2 * x1 - x0, 2 * y1 - y0];

const project = (h, x, y) => {
  const w = h[6] * x + h[7] * y + h[8];
  return [(h[0] * x + h[1] * y + h[2]) / w, (h[3] * x + h[4] * y + h[5]) / w];
};

class PairCanvas {
  constructor(state, hint, crops) {
    const { entry, query, image } = state;
    Object.assign(this, { state, hint, crops });
    this.images = [entry.queries[query].image, image];
    this.box = entry.queries[query].box;
    this.pair = entry.pair(query, image);
    this.frames = this.images.map(() => ({ scale: 1, x: 0, y: 0 }));
    this.pictures = [null, null];
    this.highlight = -1;
    this.blinking = true;
    this.layers = null; // scores and attention of both photographs, as the kernel sends them
    this.patch = null; // a clicked patch, its map and its nearest patches
    const names = this.images.map((number) => state.data.names[number]);
    this.canvas = element("canvas", {
      class: "pair",
      tabIndex: 0,
      role: "img",
      "aria-label": `query ${names[0]} and ${names[1]} with their matches`,
    });
    this.listen();
    this.images.forEach((number, side) => this.load(number, side));
    new ResizeObserver(() => this.fit()).observe(this.canvas);
  }

  async load(number, side) {
    const address = await this.state.source.address(number, true);
    if (!address) return;
    const picture = new Image();
    picture.onload = () => {
      this.pictures[side] = picture;
      this.fit();
      if (this.pictures.every(Boolean)) this.drawCrops(this.strongest());
    };
    picture.src = address;
  }

  show(pair) {
    this.pair = pair;
    this.highlight = -1;
    this.draw();
    if (this.pictures.every(Boolean)) this.drawCrops(this.strongest());
  }

  overlay(layers) {
    this.layers = layers;
    this.draw();
  }

  // Asks the kernel for the similarity of the clicked patch to all patches of the other photograph.
  async comparePatch(chosen = this.patch?.chosen) {
    if (!chosen) return;
    const { state } = this;
    const question = { kind: "patch", ...state.shownPair, ...chosen };
    this.hint.textContent = "The patch is compared …";
    try {
      const scale = state.display.scale;
      const [answer, [map]] = await state.source.ask({ ...question, scale });
      this.patch = { ...answer, map, chosen };
      const values = answer.nearest.map(
        ({ similarity, scale }) => `${similarity} at scale ${scale}`,
      );
      this.hint.textContent = `Most similar patches: ${values.join(", ")}. Esc ends it.`;
    } catch (fault) {
      this.patch = null;
      this.hint.textContent = fault.message;
    }
    this.drawCrops(this.strongest());
    this.draw();
  }

  endPatch() {
    if (!this.patch) return false;
    this.patch = null;
    this.drawCrops(this.strongest());
    this.draw();
    return true;
  }

  // A map (h, w) of bytes over a box of a photograph: more is brighter.
  drawMap(context, side, bytes, [height, width], [x0, y0, x1, y1]) {
    const small = element("canvas", { width, height });
    const pixels = new ImageData(width, height);
    bytes.forEach((value, index) => {
      pixels.data.set([255, 255 - value / 3, 40, 0.8 * value], 4 * index);
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    const { scale, x, y } = this.frames[side];
    const target = [x + x0 * scale, y + y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale];
    context.imageSmoothingEnabled = false;
    context.fillStyle = "rgba(0, 0, 0, 0.45)";
    context.fillRect(...target);
    context.drawImage(small, ...target);
    context.imageSmoothingEnabled = true;
  }

  drawOverlay(context, side) {
    const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    if (this.patch) {
      const { patch, map, grid, box, chosen, nearest } = this.patch;
      if (side !== chosen.side) this.drawMap(context, side, bytes(map), grid, box);
      const { scale, x, y } = this.frames[side];
      context.strokeStyle = side === chosen.side ? COLOURS.box : COLOURS.inlier;
      context.lineWidth = 2;
      for (const [x0, y0, x1, y1] of side === chosen.side ? [patch] : nearest.map(({ box }) => box))
        context.strokeRect(x + x0 * scale, y + y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
      return;
    }
    if (!this.layers || this.state.display.overlay === "") return;
    const [, height, width] = this.layers.grids[side];
    const start = Number(this.state.display.overlay) * height * width;
    const all = bytes(this.layers.buffers[side]);
    const map = all.subarray(start, start + height * width);
    this.drawMap(context, side, map, [height, width], this.layers.boxes[side]);
  }

  // The width and height of a photograph in stored pixels.
  size(side) {
    const [width, height] = this.state.data.sizes[this.images[side]];
    return width ? [width, height] : [400, 300];
  }

  get single() {
    return this.state.display.mode !== "matches" && this.pair?.homography;
  }

  // Shows both photographs whole, side by side; the warped query alone takes all of the canvas.
  fit() {
    const box = this.canvas.getBoundingClientRect();
    if (!box.width) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    this.width = this.single ? box.width : box.width / 2;
    for (const side of [0, 1]) {
      const [width, height] = this.size(side);
      const scale = Math.min((this.width - 8) / width, (box.height - 8) / height);
      const left = side && !this.single ? this.width : 0;
      this.frames[side] = {
        scale,
        x: left + (this.width - width * scale) / 2,
        y: (box.height - height * scale) / 2,
      };
    }
    this.ratio = ratio;
    this.draw();
  }

  toScreen(side, x, y) {
    const frame = this.frames[side];
    return [frame.x + (x + 0.5) * frame.scale, frame.y + (y + 0.5) * frame.scale];
  }

  sides(x) {
    if (this.single || this.state.display.together) return [0, 1];
    return [x < this.width ? 0 : 1];
  }

  zoom(x, y, factor) {
    const own = x < this.width || this.single ? 0 : 1;
    for (const side of this.sides(x)) {
      const frame = this.frames[side];
      // The same place of the other half stays put too.
      const shift = side === own || this.single ? 0 : side ? this.width : -this.width;
      frame.x = x + shift - (x + shift - frame.x) * factor;
      frame.y = y - (y - frame.y) * factor;
      frame.scale *= factor;
    }
    this.draw();
  }

  pan(x, dx, dy) {
    for (const side of this.sides(x)) {
      this.frames[side].x += dx;
      this.frames[side].y += dy;
    }
    this.draw();
  }

  listen() {
    let last = null;
    let moved = 0; // a press without movement is a click
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(...place(event), Math.exp(-event.deltaY / 400));
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      last = place(event);
      moved = 0;
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (last) {
        moved += Math.abs(x - last[0]) + Math.abs(y - last[1]);
        this.pan(last[0], x - last[0], y - last[1]);
        last = [x, y];
      } else this.hover(x, y);
    });
    this.canvas.addEventListener("pointerup", (event) => {
      last = null;
      if (moved < 4) this.click(...place(event));
    });
    this.canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.endPatch()) event.stopPropagation();
      const middle = [this.width / 2, this.canvas.clientHeight / 2];
      const factor = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
      if (factor) this.zoom(...middle, factor);
      const shift = {
        ArrowLeft: [40, 0],
        ArrowRight: [-40, 0],
        ArrowUp: [0, 40],
        ArrowDown: [0, -40],
      };
      if (event.key === " ") this.click(...middle);
      else if (event.shiftKey && shift[event.key]) this.pan(middle[0], ...shift[event.key]);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  click(x, y) {
    if (this.single || !this.state.source.live || !this.state.entry.features?.tokens) return;
    const side = x < this.width ? 0 : 1;
    const frame = this.frames[side];
    const at = [(x - frame.x) / frame.scale - 0.5, (y - frame.y) / frame.scale - 0.5];
    const [width, height] = this.size(side);
    if (at[0] < 0 || at[1] < 0 || at[0] >= width || at[1] >= height) this.endPatch();
    else this.comparePatch({ side, x: at[0], y: at[1] });
  }

  // Indices of the matches that are drawn, inliers last and so on top.
  drawn() {
    if (!this.pair) return [];
    const { inlier } = this.pair;
    const chosen = [];
    for (const kind of [0, 1])
      for (
        let index = 0, count = 0;
        index < inlier.length && count < this.state.display.number;
        index++
      )
        if (
          inlier[index] === kind &&
          (kind ? this.state.display.inliers : this.state.display.rejected)
        ) {
          chosen.push(index);
          count++;
        }
    return chosen.filter((index) => {
      const [first, second] = this.ends(index);
      return first[0] <= this.width && second[0] >= this.width; // each within its half
    });
  }

  ends(index) {
    const points = this.pair.points;
    return [0, 1].map((side) =>
      this.toScreen(side, points[4 * index + 2 * side], points[4 * index + 2 * side + 1]),
    );
  }

  hover(x, y) {
    let [best, least] = [-1, 100];
    if (this.patch) return;
    if (this.pair && !this.single)
      for (const index of this.drawn())
        for (const [px, py] of this.ends(index)) {
          const distance = (px - x) ** 2 + (py - y) ** 2;
          if (distance < least) [best, least] = [index, distance];
        }
    if (best === this.highlight) return;
    this.highlight = best;
    this.hint.textContent = best < 0 ? "Hover over a match for its numbers." : this.describe(best);
    this.drawCrops(best < 0 ? this.strongest() : [best]);
    this.draw();
  }

  describe(index) {
    const { distance, scale, score, inlier, points, homography } = this.pair;
    const [qx, qy, x, y] = points.slice(4 * index, 4 * index + 4);
    const parts = [inlier[index] ? "inlier" : "rejected", `distance ${distance[index]}`];
    if (score[index] !== null) parts.push(`score ${score[index]}`, `scale ${scale[index]}`);
    if (homography) {
      const [px, py] = project(homography, qx, qy);
      parts.push(`residual ${Math.hypot(px - x, py - y).toFixed(1)} pixels of the photograph`);
    }
    return `Match ${index}: ${parts.join(", ")}.`;
  }

  // The three inliers, or else matches, of least distance.
  strongest() {
    if (!this.pair) return [];
    const { inlier, distance } = this.pair;
    const all = [...inlier.keys()].sort(
      (a, b) => inlier[b] - inlier[a] || distance[a] - distance[b],
    );
    return all.slice(0, 3);
  }

  // Enlarged patches: of the given matches, or of the clicked patch and those nearest to it.
  drawCrops(matches) {
    const around = (index, side) => {
      const [x, y] = this.pair.points.slice(4 * index + 2 * side, 4 * index + 2 * side + 2);
      return [x - CROP / 2, y - CROP / 2, x + CROP / 2, y + CROP / 2];
    };
    if (this.patch) {
      const { patch, nearest, chosen } = this.patch;
      const crops = nearest.map(({ box, similarity }) => {
        const sides = (chosen.side ? [box, patch] : [patch, box]).map(widened);
        return this.crop(
          sides,
          `the chosen patch and one of similarity ${similarity}`,
          COLOURS.inlier,
        );
      });
      this.crops.replaceChildren(...crops);
      return;
    }
    this.crops.replaceChildren(
      ...matches.map((index) =>
        this.crop(
          [around(index, 0), around(index, 1)],
          `the two patches of match ${index}`,
          this.pair.inlier[index] ? COLOURS.inlier : COLOURS.rejected,
        ),
      ),
    );
  }

  crop(boxes, label, colour) {
    const canvas = element("canvas", { width: 196, height: 96, role: "img", "aria-label": label });
    const context = canvas.getContext("2d");
    context.strokeStyle = colour;
    boxes.forEach(([x0, y0, x1, y1], side) => {
      const picture = this.pictures[side];
      if (!picture) return;
      const factor = picture.naturalWidth / this.size(side)[0];
      const source = [x0, y0, x1 - x0, y1 - y0].map((value) => value * factor);
      context.drawImage(picture, ...source, 100 * side, 0, 96, 96);
      context.strokeRect(100 * side + 0.5, 0.5, 95, 95);
    });
    return canvas;
  }

  draw() {
    if (!this.ratio) return;
    const context = this.canvas.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.single) {
      this.drawPhotograph(context, 1);
      this.drawWarped(context);
      return;
    }
    for (const side of [0, 1])
      this.within(context, side, () => {
        this.drawPhotograph(context, side);
        this.drawOverlay(context, side);
      });
    if (this.patch) return;
    if (this.state.display.outline) this.drawOutline(context);
    this.drawMatches(context);
  }

  drawPhotograph(context, side) {
    const [width, height] = this.size(side);
    const { scale, x, y } = this.frames[side];
    if (this.pictures[side])
      context.drawImage(this.pictures[side], x, y, width * scale, height * scale);
    else {
      context.fillStyle = "#999";
      context.fillRect(x, y, width * scale, height * scale);
    }
  }

  corners() {
    const [width, height] = this.size(0);
    const [x0, y0, x1, y1] = this.box ?? [0, 0, width, height];
    return [
      [x0, y0],
      [x1, y0],
      [x1, y1],
      [x0, y1],
    ].map(([x, y]) => [x - 0.5, y - 0.5]);
  }

  drawOutline(context) {
    context.strokeStyle = COLOURS.box;
    context.lineWidth = 2;
    const outline = (side, corners) => {
      context.beginPath();
      corners.forEach(([x, y], index) => {
        const point = this.toScreen(side, x, y);
        if (index) context.lineTo(...point);
        else context.moveTo(...point);
      });
      context.closePath();
      context.stroke();
    };
    if (this.box) this.within(context, 0, () => outline(0, this.corners()));
    const homography = this.pair?.homography;
    // Beyond the horizon of the homography a corner has no place in the image.
    const visible = ([x, y]) =>
      (homography[6] * x + homography[7] * y + homography[8]) * homography[8] > 0;
    if (!homography || !this.corners().every(visible)) return;
    const projected = this.corners().map(([x, y]) => project(homography, x, y));
    this.within(context, 1, () => outline(1, projected));
  }

  // Draws inside one half of the canvas only.
  within(context, side, act) {
    context.save();
    context.beginPath();
    context.rect(side * this.width, 0, this.width, this.canvas.clientHeight);
    context.clip();
    act();
    context.restore();
  }

  drawMatches(context) {
    if (!this.pair) return;
    const [width, height] = this.size(0);
    context.lineWidth = 1;
    for (const index of this.drawn()) {
      const [first, second] = this.ends(index);
      const [x, y] = this.pair.points.slice(4 * index, 4 * index + 2);
      const inlier = this.pair.inlier[index];
      // The hue tells where in the query a match begins, the lightness how far down.
      const hue = (330 * x) / width;
      const colour = inlier ? `hsl(${hue} 95% ${45 + (25 * y) / height}%)` : COLOURS.rejected;
      const current = index === this.highlight;
      context.globalAlpha = current
        ? 1
        : inlier
          ? this.state.display.opacity
          : this.state.display.opacity / 2;
      context.lineWidth = current ? 3 : 1;
      context.strokeStyle = context.fillStyle = colour;
      context.beginPath();
      context.moveTo(...first);
      context.lineTo(...second);
      context.stroke();
      for (const [px, py] of [first, second]) {
        context.beginPath();
        context.arc(px, py, current ? 5 : 2.5, 0, 2 * Math.PI);
        context.fill();
      }
    }
    context.globalAlpha = 1;
  }

  // The query's box, warped onto the database photograph triangle by triangle.
  drawWarped(context) {
    const picture = this.pictures[0];
    if (!picture || (this.state.display.mode === "blink" && !this.blinking)) return;
    const [[x0, y0], , [x1, y1]] = this.corners();
    const factor = picture.naturalWidth / this.size(0)[0];
    const cells = 16;
    context.save();
    if (this.state.display.mode === "checkerboard") {
      context.beginPath();
      for (let column = 0; column * 40 < this.canvas.clientWidth; column++)
        for (let line = 0; line * 40 < this.canvas.clientHeight; line++)
          if ((column + line) % 2) context.rect(column * 40, line * 40, 40, 40);
      context.clip();
    }
    context.globalAlpha = this.state.display.mode === "fade" ? this.state.display.fade : 1;
    const { homography } = this.pair;
    const place = (x, y) => this.toScreen(1, ...project(homography, x, y));
    const front = (x, y) =>
      (homography[6] * x + homography[7] * y + homography[8]) * homography[8] > 0;
    for (let column = 0; column < cells; column++)
      for (let line = 0; line < cells; line++) {
        const xs = [column, column + 1].map((step) => x0 + ((x1 - x0) * step) / cells);
        const ys = [line, line + 1].map((step) => y0 + ((y1 - y0) * step) / cells);
        const square = [
          [xs[0], ys[0]],
          [xs[1], ys[0]],
          [xs[1], ys[1]],
          [xs[0], ys[1]],
        ];
        if (!square.every(([x, y]) => front(x, y))) continue;
        const target = square.map(([x, y]) => place(x, y));
        for (const corners of [
          [0, 1, 2],
          [0, 2, 3],
        ])
          this.drawTriangle(
            context,
            picture,
            factor,
            corners.map((i) => square[i]),
            corners.map((i) => target[i]),
          );
      }
    context.restore();
  }

  drawTriangle(context, picture, factor, source, target) {
    const [[sx0, sy0], [sx1, sy1], [sx2, sy2]] = source.map(([x, y]) => [
      (x + 0.5) * factor,
      (y + 0.5) * factor,
    ]);
    const [[x0, y0], [x1, y1], [x2, y2]] = target;
    const area = (sx1 - sx0) * (sy2 - sy0) - (sx2 - sx0) * (sy1 - sy0);
    if (!area) return;
    const linear = (v0, v1, v2) => {
      const a = ((v1 - v0) * (sy2 - sy0) - (v2 - v0) * (sy1 - sy0)) / area;
      const b = ((v2 - v0) * (sx1 - sx0) - (v1 - v0) * (sx2 - sx0)) / area;
      return [a, b, v0 - a * sx0 - b * sy0];
    };
    const [a, c, e] = linear(x0, x1, x2);
    const [b, d, f] = linear(y0, y1, y2);
    context.save();
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.lineTo(x2, y2);
    context.closePath();
    context.clip();
    context.transform(a, b, c, d, e, f);
    context.drawImage(picture, 0, 0);
    context.restore();
  }
}

const ESTIMATORS = ["degensac", "magsac", "poselib"];
const SETTINGS = { method: "matching", max_keypoints: "match_keypoints" }; // where names differ
const MATCHINGS = ["one_way", "mutual", "ratio", "mutual_ratio"];

// Settings of matching, recomputed by the kernel; turned values stay until the cell is run again.
function knobControls({ entry, knobs, source }, match) {
  if (!entry.matching) return null;
  if (!source.live) {
    const values = Object.entries(entry.matching).map(
      ([name, value]) => `${SETTINGS[name] ?? name} ${value ?? "all"}`,
    );
    const text = `Computed with ${values.join(", ")}. Other values take a notebook's kernel.`;
    return element("p", { class: "small" }, text);
  }
  const turn = (name) => (value) => {
    knobs[name] = value;
    match();
  };
  const value = (name) => knobs[name] ?? entry.matching[name];
  const { most = 1000, scales = [] } = entry.features ?? {};
  const hidden = new Set(knobs.hidden ?? []);
  return element(
    "div",
    { class: "controls", role: "group", "aria-label": "settings of matching" },
    choice("matching", [MATCHINGS, value("method")], turn("method")),
    slider("max_distance", [0.1, 1.4, 0.01, value("max_distance")], turn("max_distance")),
    slider("threshold (pixels)", [1, 64, 1, value("threshold")], turn("threshold")),
    choice("estimator", [ESTIMATORS, value("estimator")], turn("estimator")),
    slider("features", [5, most, 5, value("max_keypoints") ?? most], turn("max_keypoints")),
    ...scales.map((scale) =>
      option(`scale ${scale}`, !hidden.has(scale), (on) => {
        if (on) hidden.delete(scale);
        else hidden.add(scale);
        turn("hidden")([...hidden]);
      }),
    ),
  );
}

// What the network sees, over both photographs; a click on a patch compares it with all others.
function overlayControls(state, view, report) {
  const { features } = state.entry;
  if (!state.source.live || !features?.tokens) return null;
  const display = state.display;
  const heads = state.heads ?? 0;
  const layers = [
    ["", "no overlay"],
    ["0", "feature scores"],
    ["1", "code norm"],
  ];
  for (let head = 1; head <= heads; head++)
    layers.push([String(head + 1), `attention, head ${head}`]);
  const nearest = features.scales.reduce((a, b) => (Math.abs(b - 1) < Math.abs(a - 1) ? b : a));
  display.scale ??= nearest;
  const show = async () => {
    if (display.overlay === "") return view.overlay(null);
    report(null, "The network is looking at both photographs …");
    const question = { kind: "tokens", ...state.shownPair };
    const [answer, buffers] = await state.source.ask({ ...question, scale: display.scale });
    const known = state.heads;
    state.heads = answer.grids[0][0] - 2;
    view.overlay({ ...answer, buffers });
    if (known === undefined && view.canvas.isConnected) state.set({});
    else report(view.pair);
  };
  const shown = () => show().catch((fault) => report(null, fault.message));
  if (display.overlay !== "") shown();
  return element(
    "div",
    { class: "controls", role: "group", "aria-label": "overlays" },
    choice("overlay", [layers, display.overlay], (value) => {
      display.overlay = value;
      shown();
    }),
    choice(
      "scale of the overlay",
      [features.scales.map(String), String(display.scale)],
      (value) => {
        display.scale = Number(value);
        shown();
        view.comparePatch();
      },
    ),
    element(
      "span",
      { class: "small" },
      "Click on a photograph: the patch is compared with all of the other.",
    ),
  );
}

const onFeatures = ({ features }) => (features > 0 ? `on ${features} features ` : "");

function pair(state) {
  const { entry, query, image } = state;
  if (!entry.queries.length) return element("p", {}, "This run has no query.");
  if (image === null) {
    const first = state.shown()[0]?.image;
    if (first === undefined) return element("p", {}, "No image passes the filters.");
    state.image = first;
    return pair(state);
  }
  const hint = element(
    "p",
    { class: "small", "aria-live": "polite" },
    "Hover over a match for its numbers.",
  );
  const crops = element("div", { class: "crops" });
  const view = new PairCanvas(state, hint, crops);
  const stored = view.pair;
  const change = (name) => (value) => {
    state.display[name] = value;
    view.draw();
  };
  const modes = MODES.map((name) => [name, name === "matches" ? name : `warped query: ${name}`]);
  const mode = choice("display", [modes, state.display.mode], (name) => {
    state.display.mode = name;
    state.set({});
  });
  clearInterval(state.blinker);
  if (state.display.mode === "blink" && stored?.homography)
    state.blinker = setInterval(() => {
      view.blinking = !view.blinking;
      view.draw();
    }, 600);
  const item = state.shown().find((candidate) => candidate.image === image);
  const label = entry.label(query, image);
  const place = item
    ? item.rank === null
      ? "ignored"
      : `rank ${item.rank} ${entry.searched ? "of the results" : state.after && entry.reranked ? "after reranking" : "of the global ranking"}`
    : "not in the shown ranking";
  const similarity = entry.similarity(query, image);
  const shows = whole(entry.probability(query, image));
  const known = [place];
  if (shows) known.push(`shows it with ${shows}`);
  if (!entry.own) known.push(label);
  if (similarity !== null) known.push(`similarity ${similarity.toFixed(3)}`);
  if (entry.inliers(query, image) !== null)
    known.push(`${entry.inliers(query, image)} inliers as counted by reranking`);
  const facts = element("p", { "aria-live": "polite" });
  const report = (result, fault) => {
    const parts = [...known];
    let remark = fault ?? "";
    if (result) {
      const inliers =
        result.count === undefined ? "" : `${result.count} inliers ${onFeatures(result)}of `;
      const cut =
        result.inlier.length === result.matches
          ? ""
          : `, of which ${result.inlier.length} are drawn at most`;
      parts.push(`${inliers}${result.matches} matches${cut}`);
      if (!result.homography) remark = "No homography fits these matches.";
      else if (result.doubt) remark = `The homography is doubtful: ${result.doubt}.`;
    } else if (!fault)
      remark = state.source.live
        ? "The kernel is matching …"
        : "The matches of this pair are not stored in the page; those of underlined tiles are.";
    facts.textContent = `${parts.join(", ")}. ${remark}`;
  };
  report(stored);
  const asked = ++state.asking; // an answer to an older view is not drawn
  let [busy, again] = [false, false]; // a slider in motion asks anew when the last answer is there
  const match = async () => {
    again = busy;
    if (busy) return;
    busy = true;
    try {
      const settings = { ...entry.matching, ...state.knobs };
      const question = { kind: "pair", ...state.shownPair, settings };
      const [answer] = await state.source.ask(question);
      if (asked === state.asking) {
        view.show(answer.pair);
        report(answer.pair);
      }
    } catch (fault) {
      report(null, fault.message); // the last picture stays
    }
    busy = false;
    if (again && asked === state.asking) match();
  };
  if (state.source.live) match();
  return element(
    "div",
    { class: "pairview" },
    element(
      "h2",
      {},
      `${state.data.names[entry.queries[query].image]}  –  ${state.data.names[image]}`,
    ),
    facts,
    knobControls(state, match),
    overlayControls(state, view, report),
    element(
      "div",
      { class: "controls" },
      button("◀", () => state.step(0, -1), { "aria-label": "previous image" }),
      button("▶", () => state.step(0, 1), { "aria-label": "next image" }),
      mode,
      option("inliers", state.display.inliers, change("inliers")),
      option("rejected", state.display.rejected, change("rejected")),
      option("outline", state.display.outline, change("outline")),
      option("move together", state.display.together, change("together")),
      slider("opacity", [0.1, 1, 0.05, state.display.opacity], change("opacity")),
      slider("most lines", [5, 1000, 5, state.display.number], change("number")),
      state.display.mode === "fade"
        ? slider("query", [0, 1, 0.05, state.display.fade], change("fade"))
        : null,
      button("whole (0)", () => view.fit()),
      noteControls(state, image),
      entry.searched ? listButton(state, image) : null,
    ),
    view.canvas,
    hint,
    crops,
  );
}

// ---------------------------------------------------------------- own photographs

const LARGEST_DROPPED = 9 * 2 ** 20; // bytes: a Jupyter server takes messages of 10 MiB

// Asks the kernel for a search; what is shown stays where it fails.
function search(state, question, buffers) {
  state.busy = "Searching …";
  state.set({});
  state.source.ask(question, buffers).then(
    ([{ query, name, size }]) => {
      state.data.names[query.image] = name;
      state.data.sizes[query.image] = size;
      Object.assign(state.entry.queries, [query]);
      state.entry.labels = [new Map()];
      state.busy = null;
      state.set({ image: null, query: 0 });
    },
    (fault) => {
      state.busy = fault.message;
      state.set({});
    },
  );
}

async function drop(state, file) {
  if (!file) return;
  if (file.size > LARGEST_DROPPED) {
    state.busy = "The photograph is larger than 9 MB: put it into the folder.";
    state.set({});
    return;
  }
  search(state, { kind: "drop", name: file.name }, [await file.arrayBuffer()]);
}

function ownPhotographs(state) {
  const { entry, data } = state;
  const { image, box, before, verdict } = entry.queries[0];
  const names = entry.photographs.map((number) => [String(number), data.names[number]]);
  if (!entry.photographs.includes(image)) names.unshift([String(image), data.names[image]]);
  const ask = (number, drawn) => search(state, { kind: "search", image: number, box: drawn });
  const file = element("input", {
    type: "file",
    accept: "image/*",
    "aria-label": "another photograph as the query",
    onchange: () => drop(state, file.files[0]),
  });
  const sides = box ?? [0, 0, ...data.sizes[image]];
  const typed = ["left", "top", "right", "bottom"].map((name, index) =>
    element("input", {
      type: "number",
      min: 0,
      value: sides[index],
      "aria-label": `${name} of the box`,
    }),
  );
  return element(
    "div",
    {
      class: "ranking",
      ondragover: (event) => event.preventDefault(),
      ondrop: (event) => {
        event.preventDefault();
        drop(state, event.dataTransfer.files[0]);
      },
    },
    element(
      "aside",
      {},
      choice("query", [names, String(image)], (value) => ask(Number(value), null)),
      drawnBox(state, image, box, (drawn) => ask(image, drawn)),
      element(
        "p",
        { class: "small" },
        "Drag on the photograph to search with a box; a click searches with all of it. Or drop another photograph here: ",
        file,
      ),
      element(
        "p",
        { class: "sides", role: "group", "aria-label": "box in pixels" },
        ...typed,
        button("search with this box", () =>
          ask(
            image,
            typed.map((side) => Number(side.value)),
          ),
        ),
      ),
      element("p", { role: "status" }, state.busy ?? ""),
      element("p", {}, verdict),
      pairList(state),
    ),
    element(
      "section",
      {},
      element("h2", {}, `${before.length} photographs, best first`),
      element(
        "div",
        { class: "grid results" },
        ...before.map((number, index) => ownTile(state, number, index)),
      ),
    ),
  );
}

// The query with its box; a rectangle drawn by the mouse is reported in pixels of the photograph.
function drawnBox(state, image, box, chosen) {
  const chart = boxedQuery(state, image, box);
  const [width, height] = state.data.sizes[image];
  if (!width) return chart;
  const drawn = svg("rect", { class: "box", width: 0, height: 0 });
  chart.append(drawn);
  const inside = (area) => {
    const frame = chart.getBoundingClientRect();
    const scale = Math.min(frame.width / width, frame.height / height);
    const margins = [(frame.width - width * scale) / 2, (frame.height - height * scale) / 2];
    return area.map((side, index) =>
      clamp(Math.round((side - margins[index % 2]) / scale), 0, index % 2 ? height : width),
    );
  };
  brush(
    chart,
    (area) => {
      const [x0, y0, x1, y1] = inside(area);
      for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0 }))
        drawn.setAttribute(name, value);
    },
    (area) => chosen(area && inside(area)),
  );
  return chart;
}

function ownTile(state, image, index) {
  const item = { image, label: state.entry.label(0, image), ignored: false, rank: index + 1 };
  const parts = [tile(state, item), listButton(state, image)];
  return element("span", { class: "own", style: growing(state, image) }, ...parts);
}

const listed = (state, image) => {
  const query = state.entry.queries[0].image;
  return state.list.findIndex(([a, b]) => a === query && b === image);
};

function toggleListed(state, image) {
  if (image === null) return;
  const position = listed(state, image);
  if (position < 0) state.list.push([state.entry.queries[0].image, image]);
  else state.list.splice(position, 1);
  state.set({});
}

function listButton(state, image) {
  const on = listed(state, image) >= 0;
  return button(on ? "✓ in the list" : "+ pair", () => toggleListed(state, image), {
    "aria-pressed": String(on),
    "aria-label": `${state.data.names[image]} in the list of pairs`,
  });
}

// Pairs to take away, a line each, as hloc and COLMAP read them; both end a name at a blank.
function pairList(state) {
  const names = state.list.map((pair) => pair.map((image) => state.data.names[image]));
  const unreadable = names.flat().find((name) => /\s|^#/.test(name));
  const text = names.map((pair) => `${pair.join(" ")}\n`).join("");
  return element(
    "details",
    { open: names.length > 0 },
    element("summary", {}, `${names.length} pairs in the list`),
    element("ul", {}, ...names.map((pair) => element("li", {}, pair.join(" – ")))),
    unreadable
      ? element("p", {}, `pairs.txt cannot hold the name ${unreadable}: rename it.`)
      : button("pairs.txt", () => save("pairs.txt", text), { disabled: !names.length }),
  );
}

// ---------------------------------------------------------------- compare

// Two runs, or the two stages of one: each side an entry and whether it is reranked.
function compare(state) {
  const { entry, protocol, query, data } = state;
  const sides = state.entries
    .filter((one) => !one.own && (one !== entry || one.reranked))
    .map(({ number, title }) => [
      String(number),
      number === entry.number ? "its global ranking" : title,
    ]);
  if (!sides.length)
    return element("p", {}, "One run is in this page: `vitgal report RUN RUN` compares two.");
  const known = sides.some(([number]) => number === String(state.other));
  if (!known) state.other = Number(sides[0][0]);
  const other = state.entries[state.other];
  const select = choice("what to compare with", [sides, String(other.number)], (number) =>
    state.set({ other: Number(number) }),
  );
  const head = element("p", {}, `${entry.title} (shown in the other views) against `, select);
  // In the order of the tests' sentences.
  const pair = [entry, other].sort((a, b) => a.number - b.number);
  const stages = entry === other;
  const found = stages
    ? { tests: entry.tests }
    : data.comparisons.find(
        ({ first, second }) => first === pair[0].number && second === pair[1].number,
      );
  if (!found || found.reason || !entry.queries.length) {
    const reason = found
      ? (found.reason ?? "This run has no query.")
      : "The two were made on different data sets: their scores cannot be compared.";
    return element("div", {}, head, element("p", {}, reason));
  }
  const titles = stages ? ["global", "reranked"] : pair.map(({ title }) => title);
  const settings = pair.map((one) => new Map(one.settings));
  const names = [...new Set(settings.flatMap((values) => [...values.keys()]))];
  const differing = names.filter((name) => settings[0].get(name) !== settings[1].get(name));
  const last = (one, side) => one.stages[stages ? side : one.stages.length - 1];
  const changes = entry.queries
    .map((_, index) => [
      index,
      ...pair.map((one, side) => one.ap(last(one, side), protocol, index)),
    ])
    .filter(([, a, b]) => a !== null && b !== null)
    .sort(([, a, b], [, c, d]) => Math.abs(d - c) - Math.abs(b - a));
  const rows = changes.map(([index, a, b]) => {
    const { image } = entry.queries[index];
    const title = [picture(state, image, { alt: "" }), data.names[image]];
    const name = button(title, () => state.set({ query: index }), { class: "name" });
    const line = row(name, percent(a), percent(b), signed(100 * (b - a)));
    if (index === query) line.className = "current";
    return line;
  });
  const grids = pair.map((one, side) => {
    const after = !stages || side === 1;
    const items = one.ranking(query, protocol, after).slice(0, 24);
    const tiles = items.map((item) => tile(state, item, after && one.reranked, one));
    return element(
      "section",
      {},
      element("h3", {}, titles[side]),
      element("div", { class: "grid" }, ...tiles),
    );
  });
  return element(
    "div",
    { class: "compare" },
    head,
    element("h2", {}, "What was set differently"),
    differing.length
      ? table(
          ["setting", ...titles],
          differing.map((name) => row(name, ...settings.map((values) => values.get(name) ?? "–"))),
        )
      : element("p", {}, stages ? "One run before and after reranking." : "No setting differs."),
    element("h2", {}, "Scores"),
    table(
      ["", ...titles],
      PROTOCOLS.filter((name) => name in (found.tests ?? {})).map((name) =>
        row(
          capital(name),
          ...pair.map((one, side) => percent(one.scores[last(one, side)][name].map)),
        ),
      ),
    ),
    ...Object.entries(found.tests ?? {}).map(([name, sentence]) =>
      element("p", {}, `${capital(name)}: ${sentence}`),
    ),
    element("h2", {}, `Queries that differ most (${protocol})`),
    element(
      "div",
      { class: "scroll" },
      table(["query", ...titles, "change"], rows, { class: "queries" }),
    ),
    element("h2", {}, `Rankings of ${data.names[entry.queries[query].image]}`),
    ...grids,
  );
}

// ---------------------------------------------------------------- the page

function header(state) {
  const titled = state.entries.map(({ number, title }) => [String(number), title]);
  const select = choice("run and data set", [titled, String(state.number)], (value) => {
    const nothing = { image: null, asked: null, chosen: null, area: null };
    state.set({ number: Number(value), query: 0, ...nothing });
  });
  const titles = { own: "Own photographs" };
  const tabs = state.entry.views.map((name) =>
    button(titles[name] ?? capital(name), () => state.set({ view: name }), {
      "aria-current": state.view === name ? "page" : null,
    }),
  );
  const protocols = (state.entry.own ? [] : state.entry.protocols()).map((name) =>
    button(capital(name), () => state.set({ protocol: name }), {
      "aria-pressed": String(state.protocol === name),
    }),
  );
  return element(
    "header",
    {},
    element("h1", {}, "vitgal"),
    select,
    element("nav", { "aria-label": "views" }, ...tabs),
    protocols.length
      ? element("span", { role: "group", "aria-label": "protocol" }, ...protocols)
      : null,
    parametersButton(state),
    button("notes.json", () => state.notes.download(), { title: "save stars and notes" }),
    button("?", help, { "aria-label": "keys" }),
  );
}

function help() {
  if (document.querySelector("dialog")) return;
  const dialog = element(
    "dialog",
    { class: "vitgal-dialog", "aria-label": "keys", onclose: () => dialog.remove() },
    element("h2", {}, "Keys"),
    table(
      ["key", "what it does"],
      KEYS.map(([key, text]) => row(element("kbd", {}, key), text)),
    ),
    button("close", () => dialog.close()),
  );
  document.body.append(dialog);
  dialog.showModal();
}

function onKey(state, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]"))
    return;
  const within = event.target.closest?.("input, select, textarea");
  if (within && (event.key !== "Escape" || event.target.tagName === "SELECT")) return;
  const onButton = event.target.closest?.("button") && event.key === "Enter";
  if (onButton) return;
  const back = {
    pair: state.entry.searched ? "own" : "ranking",
    ranking: "overview",
    compare: "overview",
  };
  const grows = event.shiftKey && state.view === "overview";
  const turn = (step) => (grows ? state.extend(step) : state.step(step, 0));
  const actions = {
    ArrowUp: () => turn(-1),
    ArrowDown: () => turn(1),
    ArrowLeft: () => state.step(0, -1),
    ArrowRight: () => state.step(0, 1),
    Enter: () => state.set({ view: "pair" }),
    Escape: () =>
      back[state.view]
        ? state.set({ view: back[state.view] })
        : state.set({ chosen: null, area: null }),
    a: () => state.entry.searched && toggleListed(state, state.image),
    p: () => {
      const names = state.entry.protocols();
      if (names.length)
        state.set({ protocol: names[(names.indexOf(state.protocol) + 1) % names.length] });
    },
    n: () => state.image !== null && state.ask(state.image),
    s: () => toggleStar(state, state.view === "pair" ? state.image : null),
    0: () => state.set({}),
    "?": help,
  };
  state.entry.views.forEach(
    (name, index) => (actions[String(index + 1)] = () => state.set({ view: name })),
  );
  const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
  if (!action) return;
  event.preventDefault();
  action();
}

// Draws the instrument into an element; `data`: see the top. Returns the state that views share.
//
// options: `source`, of images and pairs; None: those stored in `data`. `start`: see State.
export function mount(root, data, { source = new StoredSource(data), start = {} } = {}) {
  root.classList.add("vitgal");
  if (!data.entries.length) {
    root.append(element("p", {}, "There is no result to show."));
    return null;
  }
  const state = new State(data, source, start);
  const draw = () => {
    clearInterval(state.blinker);
    const focus = document.activeElement?.getAttribute?.("aria-label");
    const inside = root.contains(document.activeElement);
    const top = [root.querySelector(".scroll")?.scrollTop ?? 0, window.scrollY];
    const view = { overview, ranking, pair, compare, own: ownPhotographs }[state.view](state);
    const changed = root.dataset.view !== state.view;
    root.dataset.view = state.view;
    root.replaceChildren(header(state), element("main", {}, view));
    const scroll = root.querySelector(".scroll");
    if (!changed && scroll) scroll.scrollTop = top[0];
    if (state.addressed) window.scrollTo(0, changed ? 0 : top[1]);
    const again = focus ? root.querySelector(`[aria-label="${CSS.escape(focus)}"]`) : null;
    if (again) again.focus({ preventScroll: true });
    else if (inside && !state.addressed) root.focus({ preventScroll: true });
    if (state.addressed) root.querySelector(".tile.current")?.scrollIntoView({ block: "nearest" });
  };
  state.listeners.push(draw);
  if (state.addressed) {
    document.addEventListener("keydown", (event) => onKey(state, event));
    window.addEventListener("hashchange", () => {
      state.readAddress();
      draw();
    });
  } else {
    root.tabIndex = 0; // keys work only where the viewer has the focus, so that the notebook does not see them
    root.dataset.lmSuppressShortcuts = "true";
    root.addEventListener("keydown", (event) => onKey(state, event));
  }
  draw();
  return state;
}

// The widget of vitgal.viz.Instrument, by anywidget.
export default {
  render({ model, el }) {
    const source = new KernelSource(model);
    el.textContent = "Reading the run …";
    source.ask({ kind: "document" }).then(
      ([{ document: data }]) => {
        el.textContent = "";
        mount(el, data, { source, start: model.get("start") });
      },
      (fault) => (el.textContent = fault.message),
    );
  },
};
