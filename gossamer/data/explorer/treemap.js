// A zoomable treemap of images on a canvas: the tree, its layout, thumbnails, and the component.
// The layout is that of gossamer/data/treemap.py; the tests compare the two box by box.

export const OUTER = 10, INNER = 10, TOP = 10, LABEL = 20;
const ROUNDING = 1e-6;
export const DURATION = 750; // milliseconds of a zoom

// The tree

/** Nodes as far as they were loaded; the rest is asked for when the layout meets it. */
export class Tree {
  constructor(top, order, loadChunk) {
    this.root = top.root;
    this.size = top.size;
    this.order = order; // rows of images in leaf order
    this.nodes = new Map();
    this.loading = new Map();
    this.loadChunk = loadChunk;
    this.add(top.chunk);
  }

  add(chunk) {
    for (let i = 0; i < chunk.node.length; i++) {
      const known = this.nodes.get(chunk.node[i]);
      if (known && known.left >= 0) continue;
      this.nodes.set(chunk.node[i], {
        id: chunk.node[i], left: chunk.left[i], right: chunk.right[i], start: chunk.start[i],
        count: chunk.count[i], height: chunk.height[i], levels: chunk.levels[i],
      });
    }
  }

  get(id) { return this.nodes.get(id); }

  /** Whether a node's children are not loaded yet. */
  isOpen(node) { return node.count > 1 && node.left < 0; }

  load(id) {
    if (!this.loading.has(id)) {
      this.loading.set(id, this.loadChunk(id).then((chunk) => this.add(chunk)).catch((error) => {
        this.loading.delete(id);
        throw error;
      }));
    }
    return this.loading.get(id);
  }
}

// Layout

export function canSplit(box, thumb) {
  return box.x1 - box.x0 >= 2 * thumb + INNER + 2 * OUTER
    && box.y1 - box.y0 >= 2 * thumb + 3 * TOP + 2 * OUTER + INNER;
}

export function splitBox(box, first, second, thumb) {
  const width = box.x1 - box.x0, height = box.y1 - box.y0;
  const beside = width >= height;
  const length = beside ? width : height, across = beside ? height : width;
  const label = beside ? 0 : LABEL;
  const total = Math.floor(length / thumb);
  const small = Math.max(1, Math.floor((total * Math.min(first, second)) / (first + second)));
  let cut = first < second ? small * thumb : length - small * thumb;
  if (!beside) cut -= TOP + OUTER;
  let begin = beside ? OUTER : OUTER + TOP, end = length - OUTER;
  let stop = cut - INNER / 2, go = cut + INNER / 2;
  if (stop - begin < thumb + label) {
    go += thumb + label - (stop - begin);
    stop = begin + thumb + label;
  }
  if (end - go < thumb + label) {
    stop -= thumb + label - (end - go);
    go = end - thumb - label;
  }
  let low = beside ? OUTER + TOP : OUTER, high = across - OUTER;
  if (high - low < thumb + (beside ? LABEL : 0)) {
    begin = 0; end = length; low = 0; high = across;
    stop = go = Math.min(Math.max(cut, 0), length);
  }
  const along = (from, to) => (beside
    ? { x0: box.x0 + from, y0: box.y0 + low, x1: box.x0 + to, y1: box.y0 + high }
    : { x0: box.x0 + low, y0: box.y0 + from, x1: box.x0 + high, y1: box.y0 + to });
  return [along(begin, stop), along(go, end)];
}

export function grid(box, thumb) {
  const width = box.x1 - box.x0 + ROUNDING, height = box.y1 - box.y0 + ROUNDING;
  const label = height >= thumb + LABEL ? LABEL : 0;
  return { columns: Math.floor(width / thumb), rows: Math.floor((height - label) / thumb), label };
}

const URGENCY = {
  breadth: null,
  min_merging_distance: (node) => -node.height,
  max_node_count: (node) => -node.count,
};

/**
 * The cells below a root, parents before their children. `missing` lists nodes whose children have
 * to be loaded before the layout is complete.
 */
export function layout(tree, root, width, height, thumb, k, rule) {
  const top = { node: tree.get(root), box: { x0: 0, y0: 0, x1: width, y1: height }, depth: 0 };
  const urgency = URGENCY[rule];
  const cells = [top], frontier = [top], whole = [], missing = [];
  let shown = 1;
  while (frontier.length && shown < k) {
    let next = 0;
    if (urgency) {
      for (let i = 1; i < frontier.length; i++) {
        if (urgency(frontier[i].node) < urgency(frontier[next].node)) next = i;
      }
    }
    const [cell] = frontier.splice(next, 1);
    if (cell.node.count === 1 || !canSplit(cell.box, thumb)) { whole.push(cell); continue; }
    if (tree.isOpen(cell.node)) { missing.push(cell.node.id); whole.push(cell); continue; }
    const children = [tree.get(cell.node.left), tree.get(cell.node.right)];
    const boxes = splitBox(cell.box, children[0].count, children[1].count, thumb);
    children.forEach((node, i) => {
      const child = { node, box: boxes[i], depth: cell.depth + 1 };
      frontier.push(child);
      cells.push(child);
    });
    shown += 1;
  }
  for (const cell of [...whole, ...frontier]) {
    const { columns, rows, label } = grid(cell.box, thumb);
    const places = columns * rows;
    const stride = places ? Math.max(1, Math.floor(cell.node.count / places)) : 1;
    const count = Math.min(places, Math.ceil(cell.node.count / stride));
    Object.assign(cell, { leaf: true, columns, label, stride, images: count });
  }
  return { cells, missing };
}

/** The row of the image in a place of a cell. */
export function rowAt(tree, cell, place) {
  return tree.order[cell.node.start + place * cell.stride];
}

// Thumbnails

/** Fetches sheets of thumbnails and says where on them an image is. */
export class Thumbnails {
  constructor(side, fetchSheet, onLoad, { fixed = 0, limit = 128 } = {}) {
    Object.assign(this, { side, fetchSheet, onLoad, fixed, limit });
    this.places = new Map(); // row -> { sheet, x, y }
    this.asked = new Set();
    this.sheets = [];
  }

  get(row) { return this.places.get(row); }

  /** Asks for what is missing of these rows, 256 at a time; resolves when it is there. */
  want(rows) {
    const missing = [];
    for (const row of rows) {
      if (!this.places.has(row) && !this.asked.has(row)) {
        this.asked.add(row);
        missing.push(row);
      }
    }
    if (!missing.length) return Promise.resolve();
    const groups = new Map();
    missing.forEach((row, i) => {
      // Written galleries have sheets in the order of rows; a server makes them to measure.
      const key = Math.floor((this.fixed ? row : i) / 256);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    });
    return Promise.all([...groups].map(([key, group]) => this.loadGroup(key, group)));
  }

  async loadGroup(key, group) {
    let rows = group;
    if (this.fixed) {
      const count = Math.min(256, this.fixed - key * 256);
      rows = Array.from({ length: count }, (_, i) => key * 256 + i);
      rows.forEach((row) => this.asked.add(row));
    }
    try {
      const image = await this.fetchSheet(key, rows);
      const columns = Math.min(16, rows.length);
      rows.forEach((row, i) => this.places.set(row, {
        image, x: (i % columns) * this.side, y: Math.floor(i / columns) * this.side,
      }));
      this.sheets.push({ image, rows });
      if (this.sheets.length > this.limit) this.forget(this.sheets.shift());
      this.onLoad();
    } finally {
      rows.forEach((row) => this.asked.delete(row));
    }
  }

  forget({ image, rows }) {
    for (const row of rows) {
      if (this.places.get(row)?.image === image) this.places.delete(row);
    }
    image.close?.();
  }
}

// The component

const FADED = 0.25;
const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const inside = (box, x, y) => x >= box.x0 && x < box.x1 && y >= box.y0 && y < box.y1;
const ease = (t) => (t < 0.5 ? 4 * t ** 3 : 1 - (2 - 2 * t) ** 3 / 2);

/**
 * Draws a tree on a canvas. Fires `imageclick`, `imageenter`, `imageleave`, `clusterclick`,
 * `clusterenter`, `clusterleave` and `change`, with `detail` saying which image or cluster.
 */
export class TreeMap extends EventTarget {
  constructor(canvas, thumbnails) {
    super();
    this.canvas = canvas;
    this.thumbnails = thumbnails;
    this.options = { k: 8, thumb: 32, rule: "breadth", outlineWrong: false, focusWrong: false };
    this.describe = (node) => `${node.count} images`;
    this.isWrong = () => false;
    this.isSelected = () => false;
    this.highlight = null; // rows that stay opaque, as a Set or a function of the row
    this.marked = -1; // a row with a strong frame
    this.stack = [];
    this.cells = [];
    this.hovered = { cell: null, row: -1 };
    this.focus = null; // id of the node that the keyboard is at
    this.place = -1; // the place in it, when the keyboard walks over images
    this.animation = null;
    canvas.tabIndex = 0;
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    canvas.addEventListener("pointerleave", () => this.hover(null, -1));
    canvas.addEventListener("click", (event) => this.onClick(event));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => this.draw());
    new ResizeObserver(() => this.relayout()).observe(canvas);
  }

  emit(name, detail = {}) { this.dispatchEvent(new CustomEvent(name, { detail })); }

  show(tree, root = tree.root, stack = []) {
    this.tree = tree;
    this.root = root;
    this.stack = stack;
    this.focus = null;
    this.place = -1;
    return this.relayout();
  }

  set(options) {
    Object.assign(this.options, options);
    return this.relayout();
  }

  get node() { return this.tree.get(this.root); }

  async compute(root) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const { k, rule } = this.options;
    const thumb = Math.min(this.options.thumb, width, height);
    for (;;) {
      if (this.tree.isOpen(this.tree.get(root))) await this.tree.load(root);
      const found = layout(this.tree, root, width, height, thumb, k, rule);
      if (!found.missing.length) return found.cells;
      await Promise.all(found.missing.map((id) => this.tree.load(id)));
    }
  }

  async relayout() {
    if (!this.tree || !this.canvas.clientWidth || !this.canvas.clientHeight) return;
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const cells = await this.compute(this.root);
    if (turn !== this.turn) return; // a later wish overtook this one
    this.adopt(cells);
    this.draw();
    this.emit("change");
  }

  adopt(cells) {
    this.cells = cells;
    this.hovered = { cell: null, row: -1 };
    if (!cells.some((cell) => cell.node.id === this.focus)) { this.focus = null; this.place = -1; }
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale)
        || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    this.loaded = this.thumbnails.want(this.rows());
  }

  /** Rows of all images on the screen. */
  * rows() {
    for (const cell of this.cells) {
      if (cell.leaf) for (let i = 0; i < cell.images; i++) yield rowAt(this.tree, cell, i);
    }
  }

  // Drawing

  draw() {
    if (this.drawing || this.animation) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      if (!this.animation) this.paint(this.canvas, this.cells);
    });
  }

  paint(canvas, cells) {
    const context = canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const deepest = Math.max(1, cells[0]?.node.levels ?? 1);
    for (const cell of cells) this.paintCell(context, cell, deepest);
    this.paintMarks(context, cells);
  }

  paintCell(context, cell, deepest) {
    const { x0, y0, x1, y1 } = cell.box;
    // Grey by what is left of the tree: the higher the cluster, the darker its frame.
    const light = 97 - 24 * (cell.node.levels / deepest);
    context.fillStyle = `hsl(215 12% ${light}%)`;
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
    context.strokeStyle = "#5b6472";
    context.lineWidth = cell === this.hovered.cell ? 2 : 0.75;
    context.strokeRect(x0 + 0.5, y0 + 0.5, x1 - x0 - 1, y1 - y0 - 1);
    if (cell.leaf) this.paintImages(context, cell);
    const room = cell.leaf ? cell.label : OUTER + TOP;
    if (room) this.paintLabel(context, cell, room);
  }

  paintLabel(context, cell, room) {
    const { x0, y0, x1 } = cell.box;
    context.save();
    context.beginPath();
    context.rect(x0 + 4, y0, x1 - x0 - 8, room);
    context.clip();
    context.fillStyle = "#14181f";
    context.font = `${cell.depth ? "" : "600 "}12px system-ui, sans-serif`;
    context.textBaseline = "middle";
    const texts = [this.describe(cell.node), this.describe(cell.node, true)];
    const text = context.measureText(texts[0]).width <= x1 - x0 - 10 ? texts[0] : texts[1];
    context.fillText(text, x0 + 5, y0 + room / 2 + 0.5);
    context.restore();
  }

  paintImages(context, cell) {
    const thumb = Math.min(this.options.thumb, cell.box.x1 - cell.box.x0 + ROUNDING);
    const { side } = this.thumbnails;
    context.imageSmoothingEnabled = thumb * (devicePixelRatio || 1) < side * 2;
    for (let i = 0; i < cell.images; i++) {
      const row = rowAt(this.tree, cell, i);
      const [x, y] = this.spot(cell, i);
      const place = this.thumbnails.get(row);
      context.globalAlpha = this.opaque(row) ? 1 : FADED;
      if (place) {
        context.drawImage(place.image, place.x, place.y, side, side, x, y, thumb - 1, thumb - 1);
      } else {
        context.fillStyle = "#c3c9d2";
        context.fillRect(x, y, thumb - 1, thumb - 1);
      }
    }
    context.globalAlpha = 1;
  }

  opaque(row) {
    if (row === this.marked) return true;
    if (this.highlight) {
      return this.highlight instanceof Set ? this.highlight.has(row) : this.highlight(row);
    }
    return !this.options.focusWrong || this.isWrong(row);
  }

  spot(cell, place) {
    const { thumb } = this.options;
    return [
      cell.box.x0 + (place % cell.columns) * thumb,
      cell.box.y0 + cell.label + Math.floor(place / cell.columns) * thumb,
    ];
  }

  paintMarks(context, cells) {
    const { thumb } = this.options;
    const focused = document.activeElement === this.canvas;
    for (const cell of cells) {
      if (cell.leaf) {
        for (let i = 0; i < cell.images; i++) {
          const row = rowAt(this.tree, cell, i);
          const [x, y] = this.spot(cell, i);
          // A red frame and a notch in the corner: the notch needs no colour to be seen.
          if (this.options.outlineWrong && this.isWrong(row)) {
            context.strokeStyle = "#d0021b";
            context.lineWidth = 2;
            context.strokeRect(x + 1, y + 1, thumb - 3, thumb - 3);
            this.notch(context, x + thumb - 1, y, -9, 9, "#d0021b");
          }
          if (this.isSelected(row)) {
            context.strokeStyle = "#fff";
            context.lineWidth = 4;
            context.strokeRect(x + 2, y + 2, thumb - 5, thumb - 5);
            context.strokeStyle = "#0b57d0";
            context.lineWidth = 2;
            context.strokeRect(x + 1, y + 1, thumb - 3, thumb - 3);
            this.notch(context, x, y + thumb - 1, 10, -10, "#0b57d0");
          }
          if (row === this.marked || row === this.hovered.row) {
            context.strokeStyle = "#000";
            context.lineWidth = 3;
            context.strokeRect(x - 0.5, y - 0.5, thumb, thumb);
            context.strokeStyle = "#ffd54a";
            context.lineWidth = 1.5;
            context.strokeRect(x - 0.5, y - 0.5, thumb, thumb);
          }
          if (focused && cell.node.id === this.focus && i === this.place) {
            this.ring(context, x, y, thumb - 1, thumb - 1);
          }
        }
      }
      if (focused && cell.node.id === this.focus && this.place < 0) {
        const { x0, y0, x1, y1 } = cell.box;
        this.ring(context, x0, y0, x1 - x0, y1 - y0);
      }
    }
  }

  notch(context, x, y, dx, dy, colour) {
    context.fillStyle = colour;
    context.strokeStyle = "#fff";
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x + dx, y);
    context.lineTo(x, y + dy);
    context.closePath();
    context.fill();
    context.stroke();
  }

  ring(context, x, y, width, height) {
    for (const [line, colour] of [[5, "#fff"], [3, "#0b57d0"]]) {
      context.lineWidth = line;
      context.strokeStyle = colour;
      context.strokeRect(x + 2, y + 2, width - 4, height - 4);
    }
  }

  // Zoom

  async zoomIn(id) {
    const cell = this.cells.find((one) => one.node.id === id);
    if (!cell || cell.node.count === 1 || id === this.root) return;
    await this.zoom(id, [...this.stack, this.root], cell.box, true);
  }

  async zoomOut() {
    if (!this.stack.length) return;
    const inner = this.root;
    await this.zoom(this.stack.at(-1), this.stack.slice(0, -1), inner, false);
    this.focus = this.cells.some((cell) => cell.node.id === inner) ? inner : null;
    this.draw();
  }

  async zoom(root, stack, where, inwards) {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const before = this.cells;
    const cells = await this.compute(root);
    if (turn !== this.turn) return;
    const picture = (drawn) => {
      const canvas = document.createElement("canvas");
      canvas.width = this.canvas.width;
      canvas.height = this.canvas.height;
      this.paint(canvas, drawn);
      return canvas;
    };
    const full = { x0: 0, y0: 0, x1: this.canvas.clientWidth, y1: this.canvas.clientHeight };
    const old = reduced() ? null : picture(before);
    this.root = root;
    this.stack = stack;
    this.focus = null;
    this.place = -1;
    this.adopt(cells);
    this.emit("change");
    const small = inwards ? where : cells.find((cell) => cell.node.id === where)?.box;
    if (old && small) {
      const next = picture(cells);
      await this.animate(inwards ? old : next, inwards ? next : old, inwards
        ? [small, full] : [full, small]);
    }
    this.draw();
  }

  /** Moves `inner` from one rectangle to another above `outer`, which moves along with it. */
  animate(outer, inner, [from, to]) {
    const context = this.canvas.getContext("2d");
    const began = performance.now();
    const scale = devicePixelRatio || 1;
    const small = from.x1 - from.x0 < to.x1 - to.x0 ? from : to;
    return new Promise((resolve) => {
      const token = (this.animation = {});
      const frame = (now) => {
        if (this.animation !== token) { resolve(); return; }
        const done = Math.max(0, Math.min(1, (now - began) / DURATION));
        const t = ease(done);
        const box = {};
        for (const side of ["x0", "y0", "x1", "y1"]) box[side] = from[side] + t * (to[side] - from[side]);
        const wide = (box.x1 - box.x0) / (small.x1 - small.x0);
        const high = (box.y1 - box.y0) / (small.y1 - small.y0);
        context.setTransform(1, 0, 0, 1, 0, 0);
        context.clearRect(0, 0, this.canvas.width, this.canvas.height);
        context.drawImage(outer, scale * (box.x0 - small.x0 * wide), scale * (box.y0 - small.y0 * high),
          outer.width * wide, outer.height * high);
        context.drawImage(inner, scale * box.x0, scale * box.y0,
          scale * (box.x1 - box.x0), scale * (box.y1 - box.y0));
        if (done < 1) { requestAnimationFrame(frame); return; }
        this.animation = null;
        resolve();
      };
      requestAnimationFrame(frame);
    });
  }

  // Pointer

  /** The deepest cell and the image at a point of the canvas. */
  at(x, y) {
    let cell = null;
    for (const one of this.cells) if (inside(one.box, x, y)) cell = one;
    let place = -1;
    if (cell?.leaf) {
      const { thumb } = this.options;
      const column = Math.floor((x - cell.box.x0) / thumb);
      const line = Math.floor((y - cell.box.y0 - cell.label) / thumb);
      const found = line * cell.columns + column;
      if (line >= 0 && column < cell.columns && found < cell.images) place = found;
    }
    return { cell, place, row: place < 0 ? -1 : rowAt(this.tree, cell, place) };
  }

  onMove(event) {
    const { cell, row } = this.at(event.offsetX, event.offsetY);
    this.hover(cell, row, event);
  }

  hover(cell, row, event = null) {
    const before = this.hovered;
    if (cell !== before.cell) {
      if (before.cell) this.emit("clusterleave", { node: before.cell.node });
    }
    if (row !== before.row && before.row >= 0) this.emit("imageleave", { row: before.row });
    this.hovered = { cell, row };
    if (cell) this.emit("clusterenter", { node: cell.node, row, event });
    if (row >= 0 && row !== before.row) this.emit("imageenter", { row, event });
    if (cell !== before.cell || row !== before.row) this.draw();
  }

  onClick(event) {
    const { cell, row } = this.at(event.offsetX, event.offsetY);
    if (!cell) return;
    if (row >= 0) this.emit("imageclick", { row, event });
    else this.clickCluster(cell);
  }

  clickCluster(cell) {
    this.emit("clusterclick", { node: cell.node });
    if (cell.node.id === this.root) this.zoomOut();
    else this.zoomIn(cell.node.id);
  }

  // Keyboard

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const cell = this.cells.find((one) => one.node.id === this.focus);
    if (event.key in arrows) this.step(cell, arrows[event.key]);
    else if (event.key === "Enter" && cell && this.place >= 0) {
      this.emit("imageclick", { row: rowAt(this.tree, cell, this.place), event });
    } else if (event.key === "Enter" && cell) this.clickCluster(cell);
    else if (event.key === " " && cell) this.place = this.place < 0 && cell.images ? 0 : -1;
    else if (event.key === "Escape" && this.place >= 0) this.place = -1;
    else if (event.key === "Escape" || event.key === "Backspace") this.zoomOut();
    else if (event.key === "s" && cell) {
      this.emit("select", this.place < 0
        ? { node: cell.node } : { row: rowAt(this.tree, cell, this.place) });
    } else return;
    event.preventDefault();
    const now = this.cells.find((one) => one.node.id === this.focus);
    this.emit("focuschange", {
      node: now?.node, row: now && this.place >= 0 ? rowAt(this.tree, now, this.place) : -1,
    });
    this.draw();
  }

  step(cell, [dx, dy]) {
    const leaves = this.cells.filter((one) => one.leaf);
    if (!cell) { this.focus = leaves[0]?.node.id ?? null; return; }
    if (this.place >= 0) {
      const next = this.place + dx + dy * cell.columns;
      if (next >= 0 && next < cell.images) this.place = next;
      return;
    }
    const middle = ({ box }) => [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2];
    const [x, y] = middle(cell);
    let best = Infinity;
    for (const one of leaves) {
      const [ox, oy] = middle(one);
      const ahead = (ox - x) * dx + (oy - y) * dy;
      const aside = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
      if (one !== cell && ahead > 1 && ahead + 2 * aside < best) {
        best = ahead + 2 * aside;
        this.focus = one.node.id;
      }
    }
  }
}
