// The explorer: controls, class table, details, search and selection around the treemap.
// Everything that comes out of files (names, classes) enters the page as text, never as markup.

import { Thumbnails, Tree, TreeMap } from "./treemap.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const number = (value) => value.toLocaleString("en");

function element(tag, text = "", options = {}) {
  const made = Object.assign(document.createElement(tag), options);
  made.textContent = text;
  return made;
}

async function load(path, kind) {
  const response = await fetch(path);
  if (!response.ok) {
    const sentence = await response.json().then((value) => value.error, () => response.statusText);
    throw new Error(sentence);
  }
  if (kind === "json") return response.json();
  if (kind === "blob") return response.blob();
  return new Int32Array(await response.arrayBuffer());
}

function complain(error) {
  $("problem").textContent = String(error.message ?? error);
  $("problem").hidden = false;
  setTimeout(() => { $("problem").hidden = true; }, 8000);
}

/** Waits until nothing new came for a while. */
function calm(work, pause = 120) {
  let waiting;
  return (...given) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => work(...given), pause);
  };
}

class Explorer {
  static async open() {
    const self = new Explorer();
    self.meta = await load("data/meta.json", "json");
    self.truth = await load("data/labels.bin");
    self.infos = new Map();
    self.trees = new Map();
    self.selected = new Uint8Array(self.meta.count);
    self.count = 0;
    self.which = "all";
    self.sorting = { column: "actual", down: true };
    self.turn = 0;
    self.build();
    await self.useView(self.meta.views[0].key);
    return self;
  }

  build() {
    const { meta } = this;
    document.title = `${meta.title} – explorer`;
    $("title").textContent = meta.title;
    const skipped = meta.skipped ? `, ${number(meta.skipped)} left out` : "";
    $("summary").textContent = `${number(meta.count)} images${skipped}`;
    this.thumbnails = new Thumbnails(meta.side, async (key, rows) => {
      const path = meta.static ? `data/sheet-${key}.png` : `data/sheet.png?rows=${rows.join(",")}`;
      return createImageBitmap(await load(path, "blob"));
    }, () => { this.map.draw(); this.paintSimilar(); }, { fixed: meta.static ? meta.count : 0 });
    this.map = new TreeMap($("map"), this.thumbnails);
    this.map.describe = (node, brief) => this.label(node, brief);
    this.map.isWrong = (row) => this.isWrong(row);
    this.map.isSelected = (row) => this.selected[row] === 1;

    for (const view of meta.views) $("view").append(element("option", view.name, { value: view.key }));
    $("view-choice").hidden = meta.views.length < 2;
    for (const name of meta.classes) $("classes").append(element("option", "", { value: name }));
    $("class-choice").hidden = meta.classes.length === 0;
    $("search").closest("label").hidden = Boolean(meta.static);
    this.listen();
  }

  listen() {
    const { map } = this;
    $("view").addEventListener("change", () => this.useView($("view").value).catch(complain));
    for (const id of ["k", "thumb"]) {
      $(id).addEventListener("input", () => {
        $(`${id}-value`).textContent = $(id).value;
        map.set({ [id]: Number($(id).value) }).catch(complain);
      });
    }
    $("rule").addEventListener("change", () => map.set({ rule: $("rule").value }).catch(complain));
    $("outline-wrong").addEventListener("change", () => {
      map.options.outlineWrong = $("outline-wrong").checked;
      map.draw();
    });
    $("focus-wrong").addEventListener("change", () => {
      map.options.focusWrong = $("focus-wrong").checked;
      map.draw();
    });
    $("class").addEventListener("input", () => this.filterClass($("class").value).catch(complain));
    $("class-clear").addEventListener("click", () => {
      $("class").value = "";
      this.filterClass("").catch(complain);
    });
    $("search").addEventListener("input", calm(() => this.search($("search").value).catch(complain)));
    $("out").addEventListener("click", () => map.zoomOut().catch(complain));
    $("details-close").addEventListener("click", () => this.closeDetails());
    $("select-image").addEventListener("click", () => this.toggle([this.detailed]));
    $("select-similar").addEventListener("click", async () => {
      const info = await this.info(this.detailed);
      this.select([this.detailed, ...info.similar.map(([row]) => row)]);
    });
    $("select-cluster").addEventListener("click", () => this.select(this.rowsOf(map.node)));
    $("select-highlighted").addEventListener("click", () => this.selectHighlighted());
    $("select-none").addEventListener("click", () => {
      this.selected.fill(0);
      this.selectionChanged();
    });
    $("export").addEventListener("click", () => this.exportIndex().catch(complain));
    $("export-names").addEventListener("click", () => this.exportNames().catch(complain));
    $("table-search").addEventListener("input", () => this.fillTable());

    map.addEventListener("change", () => this.mapChanged());
    map.addEventListener("imageclick", ({ detail }) => {
      if (detail.event?.shiftKey) this.toggle([detail.row]);
      else this.details(detail.row).catch(complain);
    });
    map.addEventListener("clusterenter", ({ detail }) => this.tip(detail));
    map.addEventListener("clusterleave", () => { $("tip").hidden = true; });
    map.addEventListener("imageenter", ({ detail }) => this.hoverSimilar(detail.row).catch(complain));
    map.addEventListener("imageleave", () => this.hoverSimilar(-1));
    map.addEventListener("select", ({ detail }) => {
      if (detail.node) this.toggle(this.rowsOf(detail.node));
      else this.toggle([detail.row]);
    });
    map.addEventListener("focuschange", ({ detail }) => {
      if (detail.row >= 0) this.say(this.imageText(detail.row));
      else if (detail.node) this.say(this.label(detail.node));
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target === document.body) map.zoomOut().catch(complain);
    });
  }

  // Views and trees

  get view() { return this.meta.views.find((view) => view.key === this.key); }

  async useView(key) {
    const predicted = await load(`data/${key}/predictions.bin`);
    this.key = key;
    this.predicted = predicted;
    this.closeDetails();
    for (const part of document.querySelectorAll(".wrongs")) part.hidden = !this.view.predictions;
    $("table").hidden = !this.view.predictions || !this.meta.classes.length;
    const { about } = this.view;
    $("about").textContent = `${this.view.name}; scaled: ${about.normalise}; linkage: ${about.linkage}, `
      + `${about.route === "micro" ? "approximate (small clusters first)" : "exact"}`;
    await this.useTree(this.which);
  }

  async useTree(which, root, stack) {
    const turn = (this.turn += 1);
    const key = `${this.key}/${which}`;
    if (!this.trees.has(key)) {
      const [top, order] = await Promise.all([
        load(`data/${key}/top.json`, "json"), load(`data/${key}/order.bin`),
      ]);
      this.trees.set(key, new Tree(top, order, (id) => load(`data/${key}/node-${id}.json`, "json")));
    }
    if (turn !== this.turn) return;
    this.which = which;
    this.tree = this.trees.get(key);
    this.sums = this.runningSums();
    await this.map.show(this.tree, root, stack);
  }

  /** Right answers and known classes up to each place of the leaf order. */
  runningSums() {
    const { order } = this.tree;
    const right = new Int32Array(order.length + 1), known = new Int32Array(order.length + 1);
    for (let i = 0; i < order.length; i++) {
      const row = order[i];
      const seen = this.truth[row] >= 0 && this.predicted[row] >= 0;
      known[i + 1] = known[i] + (seen ? 1 : 0);
      right[i + 1] = right[i] + (seen && this.truth[row] === this.predicted[row] ? 1 : 0);
    }
    return { right, known };
  }

  async filterClass(text) {
    const wanted = text.trim();
    const label = this.meta.classes.indexOf(wanted);
    $("class-clear").disabled = wanted === "";
    if (wanted === "" && this.which !== "all") {
      const back = this.before ?? {};
      this.before = null;
      await this.useTree("all", back.key === this.key ? back.root : undefined,
        back.key === this.key ? back.stack : undefined);
    } else if (label >= 0 && String(label) !== this.which) {
      if (this.which === "all") {
        this.before = { key: this.key, root: this.map.root, stack: this.map.stack };
      }
      await this.useTree(String(label));
    }
  }

  rowsOf(node) { return this.tree.order.subarray(node.start, node.start + node.count); }

  isWrong(row) {
    return this.truth[row] >= 0 && this.predicted[row] >= 0 && this.truth[row] !== this.predicted[row];
  }

  accuracy(node) {
    const stop = node.start + node.count;
    const known = this.sums.known[stop] - this.sums.known[node.start];
    return known ? (this.sums.right[stop] - this.sums.right[node.start]) / known : null;
  }

  /** What a cluster is called; `brief` where there is little room. */
  label(node, brief = false) {
    const accuracy = this.accuracy(node);
    if (brief) return accuracy === null ? number(node.count) : `${number(node.count)}, ${percent(accuracy)}`;
    const images = `${number(node.count)} image${node.count === 1 ? "" : "s"}`;
    return accuracy === null ? images : `${images}, ${percent(accuracy)} accuracy`;
  }

  className(label) { return label < 0 ? "unknown" : this.meta.classes[label]; }

  imageText(row) {
    const lines = [`image ${row}`];
    if (this.meta.classes.length) lines.push(`true: ${this.className(this.truth[row])}`);
    if (this.view.predictions) {
      lines.push(`predicted: ${this.className(this.predicted[row])}${this.isWrong(row) ? " (wrong)" : ""}`);
    }
    return lines.join("\n");
  }

  say(text) { $("live").textContent = text; }

  mapChanged() {
    const { map } = this;
    $("out").disabled = map.stack.length === 0;
    $("path").replaceChildren(...map.stack.map((id, depth) => {
      const button = element("button", number(this.tree.get(id).count), {
        type: "button", title: "Back to this cluster",
      });
      button.addEventListener("click", () => {
        map.show(this.tree, id, map.stack.slice(0, depth)).catch(complain);
      });
      return button;
    }));
    this.say(`${this.label(map.node)} in ${map.cells.filter((cell) => cell.leaf).length} clusters`);
    this.fillTable();
  }

  // Tooltips and highlights

  tip({ node, row, event }) {
    const tip = $("tip");
    if (!event) { tip.hidden = true; return; }
    let text = this.label(node);
    if (row >= 0) text = this.imageText(row);
    else if (node.id === this.map.root) {
      text += this.map.stack.length ? "\nclick to go back" : "\nthis is everything";
    } else text += node.count === 1 ? "\na single image" : "\nclick to go in";
    tip.textContent = text;
    tip.hidden = false;
    const { clientWidth: width, clientHeight: height } = $("stage");
    const left = event.offsetX + 16, top = event.offsetY + 18;
    tip.style.left = `${Math.max(0, left + tip.offsetWidth > width ? left - tip.offsetWidth - 30 : left)}px`;
    tip.style.top = `${Math.max(0, top + tip.offsetHeight > height ? top - tip.offsetHeight - 36 : top)}px`;
  }

  highlight(rows) {
    this.map.highlight = rows;
    this.map.draw();
  }

  async hoverSimilar(row) {
    this.hovered = row;
    if (!$("similar-hover").checked || row < 0) { this.highlight(this.found ?? null); return; }
    const info = await this.info(row);
    if (this.hovered === row) this.highlight(new Set([row, ...info.similar.map(([other]) => other)]));
  }

  async search(text) {
    this.found = text.trim() ? new Set(await load(
      `data/search.json?text=${encodeURIComponent(text.trim())}`, "json")) : null;
    this.highlight(this.found);
    if (this.found) this.say(`${number(this.found.size)} names found`);
  }

  selectHighlighted() {
    const wanted = this.pinned ?? this.found;
    if (wanted) this.select([...wanted]);
  }

  // Details

  info(row) {
    const { meta } = this;
    const key = `${this.key}/${row}`;
    if (!this.infos.has(key)) {
      const block = Math.floor(row / 256);
      const found = meta.static
        ? load(`data/${this.key}/infos-${block}.json`, "json").then((all) => all[row - 256 * block])
        : load(`data/${this.key}/info-${row}.json`, "json");
      this.infos.set(key, found.catch((error) => { this.infos.delete(key); throw error; }));
    }
    return this.infos.get(key);
  }

  async details(row) {
    const info = await this.info(row);
    this.detailed = row;
    const wrong = this.isWrong(row);
    const facts = [["Id", String(row)], ["Name", info.name]];
    if (this.meta.classes.length) facts.push(["True class", this.className(this.truth[row])]);
    if (this.view.predictions) {
      facts.push(["Predicted class", this.className(this.predicted[row]) + (wrong ? " ✗ wrong" : " ✓")]);
    }
    $("facts").replaceChildren(...facts.flatMap(([name, value]) => [
      element("dt", name),
      element("dd", value, { className: wrong && name.startsWith("Predicted") ? "wrong" : "" }),
    ]));
    const image = $("enlarged");
    image.className = wrong ? "wrong" : "";
    image.alt = `image ${row}`;
    image.classList.toggle("small", this.meta.side < 48);
    await this.enlarge(row);
    this.similar = info.similar;
    $("similar").replaceChildren(...info.similar.map(([other, distance]) => this.similarItem(other, distance)));
    $("details").hidden = false;
    this.pinned = new Set([row, ...info.similar.map(([other]) => other)]);
    await this.thumbnails.want([row, ...info.similar.map(([other]) => other)]);
    this.paintSimilar();
    this.say(this.imageText(row));
  }

  async enlarge(row) {
    const image = $("enlarged");
    if (!this.meta.static) { image.src = `data/image-${row}.png`; return; }
    await this.thumbnails.want([row]);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = this.meta.side;
    this.paintThumb(canvas, row);
    image.src = canvas.toDataURL();
  }

  similarItem(row, distance) {
    const item = element("li", "", { tabIndex: 0, className: this.isWrong(row) ? "wrong" : "" });
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = this.meta.side;
    canvas.dataset.row = row;
    item.append(canvas, element("span", distance.toPrecision(3)));
    item.title = `${this.imageText(row)}\ndistance ${distance.toPrecision(4)}`;
    item.setAttribute("role", "button");
    item.setAttribute("aria-label", item.title);
    const mark = (at) => { this.map.marked = at; this.highlight(at < 0 ? this.found ?? null : this.pinned); };
    item.addEventListener("pointerenter", () => mark(row));
    item.addEventListener("pointerleave", () => mark(-1));
    item.addEventListener("focus", () => mark(row));
    item.addEventListener("blur", () => mark(-1));
    item.addEventListener("click", () => this.details(row).catch(complain));
    item.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.details(row).catch(complain);
    });
    return item;
  }

  paintThumb(canvas, row) {
    const place = this.thumbnails.get(row);
    const { side } = this.meta;
    if (place) canvas.getContext("2d").drawImage(place.image, place.x, place.y, side, side, 0, 0, side, side);
  }

  paintSimilar() {
    for (const canvas of $("similar").querySelectorAll("canvas")) {
      this.paintThumb(canvas, Number(canvas.dataset.row));
    }
  }

  closeDetails() {
    $("details").hidden = true;
    this.detailed = -1;
    this.pinned = null;
    if (this.map) { this.map.marked = -1; this.highlight(this.found ?? null); }
  }

  // Selection

  select(rows) {
    for (const row of rows) this.selected[row] = 1;
    this.selectionChanged();
  }

  toggle(rows) {
    let all = true;
    for (const row of rows) all &&= this.selected[row] === 1;
    for (const row of rows) this.selected[row] = all ? 0 : 1;
    this.selectionChanged();
  }

  selectionChanged() {
    this.count = this.selected.reduce((sum, one) => sum + one, 0);
    $("selected").textContent = number(this.count);
    for (const id of ["select-none", "export", "export-names"]) $(id).disabled = this.count === 0;
    $("export").hidden = Boolean(this.meta.static);
    this.say(`${number(this.count)} images are selected`);
    this.map.draw();
  }

  ranges() {
    const ranges = [];
    for (let row = 0; row < this.selected.length; row++) {
      if (!this.selected[row]) continue;
      const start = row;
      while (row < this.selected.length && this.selected[row]) row += 1;
      ranges.push([start, row]);
    }
    return ranges;
  }

  async exportIndex() {
    const response = await fetch("data/export", { method: "POST", body: JSON.stringify({ rows: this.ranges() }) });
    if (!response.ok) throw new Error((await response.json()).error);
    this.save(await response.blob(), "selection.parquet");
  }

  async exportNames() {
    const rows = this.ranges().flatMap(([start, stop]) =>
      Array.from({ length: stop - start }, (_, i) => start + i));
    const names = [];
    for (let i = 0; i < rows.length; i += 256) {
      const part = rows.slice(i, i + 256);
      names.push(...(this.meta.static
        ? (await Promise.all(part.map((row) => this.info(row)))).map((info) => info.name)
        : await load(`data/names.json?rows=${part.join(",")}`, "json")));
    }
    const value = rows.map((row, i) => ({ row, name: names[i] }));
    this.save(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }), "selection.json");
  }

  save(blob, name) {
    const link = element("a", "", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // Class table

  columns() {
    const truth = (row) => this.truth[row], said = (row) => this.predicted[row];
    return [
      { key: "name", title: "Class" },
      { key: "actual", title: "Actual", rows: (c) => (row) => truth(row) === c },
      { key: "predicted", title: "Predicted", rows: (c) => (row) => truth(row) >= 0 && said(row) === c },
      { key: "accuracy", title: "Accuracy", rate: true,
        rows: (c) => (row) => truth(row) === c && said(row) === c },
      { key: "missed", title: "Missed", rate: true,
        help: "False negative rate: wrong / actual", rows: (c) => (row) => truth(row) === c && said(row) !== c },
      { key: "claimed", title: "Claimed", rate: true,
        help: "False positive rate: wrongly predicted / predicted",
        rows: (c) => (row) => truth(row) >= 0 && said(row) === c && truth(row) !== c },
    ];
  }

  /** Counts and rates of each class among the images of a node; 0 / 0 is 0. */
  classRows(node) {
    const classes = this.meta.classes.length;
    const actual = new Int32Array(classes), predicted = new Int32Array(classes), right = new Int32Array(classes);
    for (const row of this.rowsOf(node)) {
      if (this.truth[row] < 0 || this.predicted[row] < 0) continue;
      actual[this.truth[row]] += 1;
      predicted[this.predicted[row]] += 1;
      if (this.truth[row] === this.predicted[row]) right[this.truth[row]] += 1;
    }
    const ratio = (part, whole) => (whole ? part / whole : 0);
    return this.meta.classes.map((name, c) => ({
      c, name, actual: actual[c], predicted: predicted[c],
      accuracy: ratio(right[c], actual[c]),
      missed: ratio(actual[c] - right[c], actual[c]),
      claimed: ratio(predicted[c] - right[c], predicted[c]),
    }));
  }

  fillTable() {
    if ($("table").hidden || !this.tree) return;
    const { node } = this.map;
    const accuracy = this.accuracy(node);
    $("table-summary").textContent = `${accuracy === null ? "no known class" : `${percent(accuracy)} accuracy`}, `
      + `${number(node.count)} images, ${percent(node.count / this.meta.count)} of all`;
    const columns = this.columns();
    const { column, down } = this.sorting;
    $("table-head").replaceChildren(...columns.map((one) => this.headCell(one)));
    const wanted = $("table-search").value.trim().toLowerCase();
    const rows = this.classRows(node);
    const largest = Math.max(1, ...rows.map((row) => Math.max(row.actual, row.predicted)));
    const sign = down ? -1 : 1;
    rows.sort((a, b) => (column === "name"
      ? sign * a.name.localeCompare(b.name) : sign * (a[column] - b[column])) || a.c - b.c);
    $("table-body").replaceChildren(...rows
      .filter((row) => row.name.toLowerCase().includes(wanted) && (row.actual || row.predicted || wanted))
      .map((row) => {
        const line = document.createElement("tr");
        line.append(...columns.map((one) => this.tableCell(one, row, largest)));
        return line;
      }));
  }

  headCell(column) {
    const sorted = this.sorting.column === column.key;
    const arrow = sorted ? (this.sorting.down ? " ▼" : " ▲") : "";
    const cell = element("th", column.title + arrow, { tabIndex: 0, title: column.help ?? "" });
    cell.scope = "col";
    cell.dataset.column = column.key;
    if (sorted) cell.setAttribute("aria-sort", this.sorting.down ? "descending" : "ascending");
    const sort = () => {
      this.sorting = { column: column.key, down: sorted ? !this.sorting.down : column.key !== "name" };
      this.fillTable();
      $("table-head").querySelector(`[data-column="${column.key}"]`).focus();
    };
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
    return cell;
  }

  tableCell(column, row, largest) {
    if (column.key === "name") return element("td", row.name);
    const value = row[column.key];
    const cell = element("td", column.rate ? percent(value) : number(value), { tabIndex: 0 });
    const bar = element("span", "", { className: column.rate ? "bar rate" : "bar" });
    bar.style.width = `${100 * (column.rate ? value : value / largest)}%`;
    cell.append(bar);
    const on = () => { this.highlight(column.rows(row.c)); };
    const off = () => { this.highlight(this.found ?? null); };
    cell.addEventListener("pointerenter", on);
    cell.addEventListener("pointerleave", off);
    cell.addEventListener("focus", on);
    cell.addEventListener("blur", off);
    return cell;
  }
}

Explorer.open().then((explorer) => { window.explorer = explorer; }).catch(complain);
