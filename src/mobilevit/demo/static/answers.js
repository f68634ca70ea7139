// How answers are shown: bars of a classifier, boxes of a detector, the mask of a segmentation network.
//
// Each of the three has `show(result, image, stage)`, `clear(invitation)`, `summary(result)`, short and long, of any
// result, and `spoken` for what is shown.

const TOP = 5;
const SPOKEN = 8; // of things found; nobody listens to a hundred
const FRAME = 3; // CSS pixels, as below
const FONT = 13;
const LEAST_NAMED = 0.005; // of the pixels, on the image and to listeners
const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const whole = (share) => `${Math.round(100 * share)} %`;
const spoken = (share) => `${Math.round(100 * share)} percent`;

class View {
  places = false; // whether it says where things are

  constructor(network) {
    this.network = network;
  }

  name(index) {
    return this.network.class_names[index] ?? `class ${index}`;
  }

  headline(text, share = "") {
    $("best-class").textContent = text;
    $("best-share").textContent = share;
  }

  /** One row each of `entries`, {name, share, shown, colour, data}; rows that are there are changed, not replaced. */
  rows(entries) {
    const list = $("bars");
    while (list.children.length > entries.length) list.lastChild.remove();
    while (list.children.length < entries.length) {
      const bar = document.createElement("li");
      bar.className = "bar";
      bar.innerHTML = "<i></i><span class=name></span><span class=share></span>";
      list.append(bar);
    }
    entries.forEach(({ name, share, shown, colour, data = {} }, i) => {
      const bar = list.children[i];
      bar.title = name.trim();
      bar.style.setProperty("--share", share);
      bar.querySelector(".name").textContent = name;
      bar.querySelector(".share").textContent = shown;
      if (colour !== undefined) bar.style.setProperty("--class", colour);
      for (const key of Object.keys(bar.dataset)) if (!(key in data)) delete bar.dataset[key];
      Object.assign(bar.dataset, data);
    });
  }
}

export class Bars extends View {
  constructor(network) {
    super(network);
    this.number = Math.min(TOP, network.num_classes);
    this.clear("");
  }

  #best({ probabilities }) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    return order.slice(0, this.number).map((index) => ({
      name: this.name(index),
      share: probabilities[index],
      shown: percent(probabilities[index]),
      data: { index, probability: probabilities[index] },
    }));
  }

  summary(result) {
    const [{ name, shown }] = this.#best(result);
    return [name, `${name}, ${shown}`];
  }

  show(result) {
    const best = this.#best(result);
    this.headline(best[0].name, best[0].shown);
    this.rows(best);
    this.spoken = `${best[0].name}, ${spoken(best[0].share)}`;
  }

  clear(invitation) {
    this.headline(invitation);
    this.rows(Array(this.number).fill({ name: "\u00a0", share: 0, shown: "" }));
  }
}

/** What draws on the image: a canvas over it, of its ratio, and a slider that says how. */
class Overlay extends View {
  places = true;

  constructor(network, changed, { list, slider, least }) {
    super(network);
    $("bars").setAttribute("aria-label", list);
    const setting = document.createElement("p");
    setting.className = "setting";
    setting.innerHTML = '<label for="slider"></label><input type="range" id="slider"><output for="slider"></output>';
    const [label, input, output] = setting.children;
    label.textContent = slider;
    Object.assign(input, { min: least, max: 1 - least, step: 0.01, value: network.shown });
    $("bars").before(setting);
    const slide = () => {
      this.slid = input.valueAsNumber;
      output.textContent = whole(this.slid);
      input.setAttribute("aria-valuetext", spoken(this.slid));
    };
    input.addEventListener("input", () => {
      slide();
      if (!this.result) return;
      this.#update(false);
      changed();
    });
    slide();
    this.canvas = document.createElement("canvas");
    this.canvas.className = "marks";
    this.canvas.setAttribute("aria-hidden", true); // the list says the same
    this.resized = new ResizeObserver(() => this.result && this.#draw());
  }

  show(result, image, stage) {
    this.result = result;
    if (this.canvas.parentElement !== stage) {
      this.resized.disconnect();
      stage.append(this.canvas);
      this.resized.observe(stage);
    }
    stage.style.aspectRatio = `${image.width} / ${image.height}`;
    this.image = image;
    this.#update(true);
  }

  clear(invitation) {
    this.result = null;
    this.canvas.remove();
    this.headline(invitation);
    this.rows([]);
    this.#scrolls();
  }

  #update(isNew) {
    this.describe(isNew);
    this.#scrolls();
    this.#draw();
  }

  /** A list that is longer than its place is scrolled by keys too. */
  #scrolls() {
    const list = $("bars");
    if (list.scrollHeight > list.clientHeight) list.tabIndex = 0;
    else list.removeAttribute("tabindex");
  }

  #draw() {
    const { width, height, canvas: frame } = this.image;
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    const pixels = devicePixelRatio || 1;
    const scale = Math.min(clientWidth / width, clientHeight / height) * pixels;
    this.canvas.width = Math.max(1, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round(height * scale));
    const context = this.canvas.getContext("2d");
    // What passes by is shown as it was when the network saw it.
    if (frame) context.drawImage(frame, 0, 0, this.canvas.width, this.canvas.height);
    context.scale(pixels, pixels);
    this.paint(context, this.canvas.width / pixels, this.canvas.height / pixels);
  }

  rgb(index) {
    return this.network.palette[index % this.network.palette.length];
  }

  colour(index) {
    return `rgb(${this.rgb(index)})`;
  }

  /** Black or white, whichever is further from the colour of a class (WCAG 2.2). */
  ink(index) {
    const [r, g, b] = this.rgb(index).map((v) => (v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "black" : "white";
  }

  /** Write `text` at the first of `places` (width, height -> [x, y] each) that is free; in the image in any case. */
  label(context, index, text, taken, places, frame) {
    context.font = `600 ${FONT}px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    const width = Math.min(context.measureText(text).width + 10, frame.width);
    const height = FONT + 7;
    const inside = places(width, height).map(([x, y]) => ({
      x: Math.max(0, Math.min(x, frame.width - width)),
      y: Math.max(0, Math.min(y, frame.height - height)),
      fits: y >= 0 && y + height <= frame.height,
    }));
    const meets = ({ x, y }) =>
      taken.some((one) => x < one.x + one.width && one.x < x + width && y < one.y + height && one.y < y + height);
    const { x, y } = inside.find((at) => at.fits && !meets(at)) ?? inside.find((at) => at.fits) ?? inside[0];
    taken.push({ x, y, width });
    context.fillStyle = this.colour(index);
    context.fillRect(x, y, width, height);
    context.fillStyle = this.ink(index);
    context.fillText(text, x + 5, y + height / 2 + 1, width - 10);
  }
}

export class Boxes extends Overlay {
  constructor(network, changed) {
    super(network, changed, { list: "What was found, best first", slider: "Score above", least: 0.01 });
  }

  /** What has a score above the slider's: its class, score and box [x1, y1, x2, y2] in shares of the image. */
  #found({ boxes, scores, labels }) {
    const found = [];
    for (let i = 0; i < labels.length && labels[i] >= 0 && scores[i] > this.slid; i++) {
      const box = Array.from(boxes.slice(4 * i, 4 * i + 4), (v) => Math.min(1, Math.max(0, v)));
      if (box[0] < box[2] && box[1] < box[3]) found.push({ index: labels[i], score: scores[i], box });
    }
    return found;
  }

  summary(result) {
    const found = this.#found(result);
    const names = found.map(({ index, score }) => `${this.name(index)}, ${whole(score)}`);
    return [found.length ? `${found.length} found` : "nothing", names.join("; ") || "nothing found"];
  }

  describe() {
    const { width, height } = this.image;
    const found = (this.found = this.#found(this.result));
    this.headline(found.length ? `${found.length} found` : `Nothing above ${whole(this.slid)}`);
    this.rows(
      found.map(({ index, score, box }) => ({
        name: this.name(index),
        share: score,
        shown: percent(score),
        colour: this.colour(index),
        data: { index, score, box: box.map((v, i) => v * (i % 2 ? height : width)).join(" ") },
      })),
    );
    const said = found.slice(0, SPOKEN).map(({ index, score }) => `${this.name(index)} ${spoken(score)}`);
    this.spoken = [`${found.length || "nothing"} found`, ...said].join(", ");
  }

  paint(context, width, height) {
    const framed = this.found.map(({ index, score, box: [x1, y1, x2, y2] }) => ({
      index,
      text: `${this.name(index)} ${whole(score)}`,
      box: [x1 * width, y1 * height, x2 * width, y2 * height],
    }));
    for (const { index, box } of framed.toReversed()) {
      // A frame in the colour between two thin ones of the opposite lightness: seen on every ground.
      const [x, y] = [box[0] + FRAME / 2, box[1] + FRAME / 2];
      const size = [Math.max(0, box[2] - box[0] - FRAME), Math.max(0, box[3] - box[1] - FRAME)];
      for (const [line, ink] of [
        [FRAME + 2, this.ink(index)],
        [FRAME, this.colour(index)],
      ]) {
        context.lineWidth = line;
        context.strokeStyle = ink;
        context.strokeRect(x, y, ...size);
      }
    }
    const taken = [];
    for (const { index, text, box } of framed) {
      const [x1, y1, x2, y2] = box;
      const places = (w, h) => [y1 - h, y1, y2, y2 - h].flatMap((y) => [x1, x2 - w].map((x) => [x, y]));
      this.label(context, index, text, taken, places, { width, height });
    }
  }
}

export class Mask extends Overlay {
  constructor(network, changed) {
    super(network, changed, { list: "Classes and their shares of the image", slider: "Opacity", least: 0 });
    this.paintings = [document.createElement("canvas"), document.createElement("canvas")];
  }

  #isPainted(index) {
    return this.name(index).toLowerCase() !== "background";
  }

  /** The classes that are there, {index, share}, the largest first. */
  #classes({ classes }) {
    const counts = new Map();
    for (const index of classes) counts.set(index, (counts.get(index) ?? 0) + 1);
    const shares = Array.from(counts, ([index, count]) => ({ index, share: count / classes.length }));
    return shares.sort((a, b) => b.share - a.share);
  }

  summary(result) {
    const found = this.#classes(result);
    const most = found.find(({ index }) => this.#isPainted(index)) ?? found[0];
    return [this.name(most.index), found.map(({ index, share }) => `${this.name(index)}, ${percent(share)}`).join("; ")];
  }

  describe(isNew) {
    if (!isNew) return; // how opaque it is changes nothing of what is found
    const found = this.#classes(this.result);
    const painted = found.filter(({ index }) => this.#isPainted(index));
    const most = painted[0] ?? found[0];
    this.headline(this.name(most.index), percent(most.share));
    this.rows(
      found.map(({ index, share }) => ({
        name: this.name(index),
        share,
        shown: share < 0.001 ? "< 0.1 %" : percent(share),
        colour: this.#isPainted(index) ? this.colour(index) : "transparent",
        data: { index, share },
      })),
    );
    const said = found.filter(({ share }) => share >= LEAST_NAMED).slice(0, SPOKEN);
    this.spoken = said.map(({ index, share }) => `${this.name(index)} ${spoken(share)}`).join(", ");
    this.#tint(painted);
  }

  /** Two images of the size of the network's input: the regions in their colours, and their edges alone. */
  #tint(painted) {
    const { classes } = this.result;
    const side = this.network.preprocessing.crop_px;
    const colours = new Map(painted.map(({ index }) => [index, this.rgb(index)]));
    const [regions, edges] = this.paintings.map(() => new ImageData(side, side));
    const longest = new Map(); // of each class the longest row of its pixels, to write its name on
    for (let y = 0, i = 0; y < side; y++) {
      for (let x = 0, run = 0; x < side; x++, i++) {
        const index = classes[i];
        const colour = colours.get(index);
        run = x && classes[i - 1] === index ? run + 1 : 1;
        if (!colour) continue;
        if (run > (longest.get(index)?.run ?? 0)) longest.set(index, { run, x: x + 0.5 - run / 2 + 0.5, y: y + 0.5 });
        regions.data.set(colour, 4 * i);
        regions.data[4 * i + 3] = 255;
        const others = [x && i - 1, x < side - 1 && i + 1, y && i - side, y < side - 1 && i + side];
        if (!others.some((j) => j && classes[j] !== index)) continue;
        edges.data.set(colour, 4 * i);
        edges.data[4 * i + 3] = 255;
      }
    }
    for (const [i, image] of [regions, edges].entries()) {
      this.paintings[i].width = this.paintings[i].height = side;
      this.paintings[i].getContext("2d").putImageData(image, 0, 0);
    }
    this.names = painted
      .filter(({ share }) => share >= LEAST_NAMED)
      .map(({ index }) => ({ index, x: longest.get(index).x / side, y: longest.get(index).y / side }));
  }

  paint(context, width, height) {
    context.imageSmoothingQuality = "high";
    for (const [i, opacity] of [this.slid, Math.min(1, 2 * this.slid)].entries()) {
      context.globalAlpha = opacity;
      context.drawImage(this.paintings[i], 0, 0, width, height);
    }
    context.globalAlpha = Math.min(1, 4 * this.slid);
    const taken = [];
    for (const { index, x, y } of this.names) {
      const places = (w, h) => [0, 1, -1, 2, -2].map((k) => [x * width - w / 2, y * height - h / 2 + k * h]);
      this.label(context, index, this.name(index), taken, places, { width, height });
    }
    context.globalAlpha = 1;
  }
}
