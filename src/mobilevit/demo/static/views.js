// Views of predictions: class probabilities, boxes, and masks.
//
// Every view has `show(result, image, stage)`, `clear(text)`, `summary(result)` ([short, long] text of any result) and
// `announcement` (the shown result as text for screen readers).

const TOP_K = 5;
const MAX_ANNOUNCED = 8;
const FRAME = 3; // CSS pixels, like FONT
const FONT = 13;
const MIN_LABELED = 0.005; // fraction of the pixels below which a class gets no label
const $ = (id) => document.getElementById(id);
const percent = (fraction, digits = 0) => `${(100 * fraction).toFixed(digits)} %`;
const countObjects = (count) => `${count || "no"} object${count === 1 ? "" : "s"}`;
const percentText = (fraction) => `${Math.round(100 * fraction)} percent`;

class View {
  localizes = false;

  constructor(network) {
    this.network = network;
  }

  name(index) {
    return this.network.class_names[index] ?? `class ${index}`;
  }

  headline(text, value = "") {
    $("headline").textContent = text;
    $("headline-value").textContent = value;
  }

  /** Show one row per entry {name, fraction, text, color, data}. Existing rows are updated, so that bars can animate. */
  rows(entries) {
    const list = $("results");
    while (list.children.length > entries.length) list.lastChild.remove();
    while (list.children.length < entries.length) {
      const row = document.createElement("li");
      row.className = "bar";
      row.innerHTML = "<i></i><span class=name></span><span class=value></span>";
      list.append(row);
    }
    entries.forEach(({ name, fraction, text, color, data = {} }, i) => {
      const row = list.children[i];
      row.title = name.trim();
      row.style.setProperty("--fraction", fraction);
      row.querySelector(".name").textContent = name;
      row.querySelector(".value").textContent = text;
      if (color !== undefined) row.style.setProperty("--class", color);
      for (const key of Object.keys(row.dataset)) if (!(key in data)) delete row.dataset[key];
      Object.assign(row.dataset, data);
    });
  }
}

export class ClassificationView extends View {
  constructor(network) {
    super(network);
    this.numRows = Math.min(TOP_K, network.num_classes);
    this.clear("");
  }

  #top({ probabilities }) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    return order.slice(0, this.numRows).map((index) => ({
      name: this.name(index),
      fraction: probabilities[index],
      text: percent(probabilities[index], 1),
      data: { index, probability: probabilities[index] },
    }));
  }

  /** Why a prediction is rejected, or "". */
  #rejection(fraction) {
    const { min_probability: threshold } = this.network.calibration;
    return fraction < threshold ? `rejected, below ${percent(threshold, 1)}` : "";
  }

  summary(result) {
    const [{ name, text, fraction }] = this.#top(result);
    const rejection = this.#rejection(fraction);
    return rejection ? ["rejected", `${name}, ${text}, ${rejection}`] : [name, `${name}, ${text}`];
  }

  show(result) {
    const top = this.#top(result);
    const rejection = this.#rejection(top[0].fraction);
    this.headline(top[0].name, rejection ? `${top[0].text}, ${rejection}` : top[0].text);
    this.rows(top);
    this.announcement = `${top[0].name}, ${percentText(top[0].fraction)}${rejection && `, ${rejection}`}`;
  }

  clear(text) {
    this.headline(text);
    this.rows(Array(this.numRows).fill({ name: "\u00a0", fraction: 0, text: "" }));
  }
}

/** The labels of an image: classes whose probability is at least their threshold, then the most likely other ones. */
export class MultilabelView extends View {
  constructor(network) {
    super(network);
    $("results").setAttribute("aria-label", "Labels and other likely classes, with probabilities");
    this.clear("");
  }

  #split({ probabilities }) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    const isLabel = (index) => probabilities[index] >= this.network.thresholds[index];
    const labels = order.filter(isLabel);
    const others = order.filter((index) => !isLabel(index)).slice(0, Math.max(0, TOP_K - labels.length));
    return [labels, others];
  }

  summary(result) {
    const [labels] = this.#split(result);
    const texts = labels.map((index) => `${this.name(index)}, ${percent(result.probabilities[index], 1)}`);
    return [labels.map((index) => this.name(index)).join(", ") || "no label", texts.join("; ") || "no label"];
  }

  show(result) {
    const [labels, others] = this.#split(result);
    const row = (index, isLabel) => ({
      name: isLabel ? this.name(index) : `not ${this.name(index)}`,
      fraction: result.probabilities[index],
      text: `${percent(result.probabilities[index], 1)} (from ${percent(this.network.thresholds[index], 1)})`,
      color: isLabel ? "var(--bar)" : "var(--line)",
      data: { index, probability: result.probabilities[index], label: isLabel },
    });
    this.headline(labels.map((index) => this.name(index)).join(", ") || "No label");
    this.rows([...labels.map((index) => row(index, true)), ...others.map((index) => row(index, false))]);
    const texts = labels.slice(0, MAX_ANNOUNCED).map((i) => `${this.name(i)} ${percentText(result.probabilities[i])}`);
    this.announcement = texts.join(", ") || "no label";
  }

  clear(text) {
    this.headline(text);
    this.rows([]);
  }
}

/** A view with a canvas over the image and a slider. */
class OverlayView extends View {
  localizes = true;

  constructor(network, onChange, { listLabel, sliderLabel, min }) {
    super(network);
    $("results").setAttribute("aria-label", listLabel);
    const setting = document.createElement("p");
    setting.className = "setting";
    setting.innerHTML = '<label for="slider"></label><input type="range" id="slider"><output for="slider"></output>';
    const [label, input, output] = setting.children;
    label.textContent = sliderLabel;
    Object.assign(input, { min, max: 1 - min, step: 0.01, value: network.slider });
    $("results").before(setting);
    const readSlider = () => {
      this.sliderValue = input.valueAsNumber;
      output.textContent = percent(this.sliderValue);
      input.setAttribute("aria-valuetext", percentText(this.sliderValue));
    };
    input.addEventListener("input", () => {
      readSlider();
      if (!this.result) return;
      this.#update(false);
      onChange();
    });
    readSlider();
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.canvas.setAttribute("aria-hidden", true); // the list contains the same information
    this.resizeObserver = new ResizeObserver(() => this.result && this.#draw());
  }

  show(result, image, stage) {
    this.result = result;
    if (this.canvas.parentElement !== stage) {
      this.resizeObserver.disconnect();
      stage.append(this.canvas);
      this.resizeObserver.observe(stage);
    }
    stage.style.aspectRatio = `${image.width} / ${image.height}`;
    this.image = image;
    this.#update(true);
  }

  clear(text) {
    this.result = null;
    this.canvas.remove();
    this.headline(text);
    this.rows([]);
    this.#updateTabIndex();
  }

  #update(isNewResult) {
    this.update(isNewResult);
    this.#updateTabIndex();
    this.#draw();
  }

  /** A list with a scroll bar must be reachable by keyboard. */
  #updateTabIndex() {
    const list = $("results");
    if (list.scrollHeight > list.clientHeight) list.tabIndex = 0;
    else list.removeAttribute("tabindex");
  }

  #draw() {
    const { width, height, canvas: frame } = this.image;
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    const pixelRatio = devicePixelRatio || 1;
    const scale = Math.min(clientWidth / width, clientHeight / height) * pixelRatio;
    this.canvas.width = Math.max(1, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round(height * scale));
    const context = this.canvas.getContext("2d");
    // The camera image has moved on: show the frame that was predicted.
    if (frame) context.drawImage(frame, 0, 0, this.canvas.width, this.canvas.height);
    context.scale(pixelRatio, pixelRatio);
    this.draw(context, this.canvas.width / pixelRatio, this.canvas.height / pixelRatio);
  }

  rgb(index) {
    return this.network.palette[index % this.network.palette.length];
  }

  color(index) {
    return `rgb(${this.rgb(index)})`;
  }

  /** Black or white, whichever has the higher contrast to the color of the class (WCAG 2.2). */
  contrast(index) {
    const [r, g, b] = this.rgb(index).map((v) => (v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "black" : "white";
  }

  /** Write `text` at the first free one of `candidates` (width, height -> [[x, y], ...]), moved into the image. */
  drawLabel(context, index, text, occupied, candidates, image) {
    context.font = `600 ${FONT}px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    const width = Math.min(context.measureText(text).width + 10, image.width);
    const height = FONT + 7;
    const positions = candidates(width, height).map(([x, y]) => ({
      x: Math.max(0, Math.min(x, image.width - width)),
      y: Math.max(0, Math.min(y, image.height - height)),
      fits: y >= 0 && y + height <= image.height,
    }));
    const isFree = ({ x, y }) =>
      !occupied.some((o) => x < o.x + o.width && o.x < x + width && y < o.y + height && o.y < y + height);
    const { x, y } = positions.find((p) => p.fits && isFree(p)) ?? positions.find((p) => p.fits) ?? positions[0];
    occupied.push({ x, y, width });
    context.fillStyle = this.color(index);
    context.fillRect(x, y, width, height);
    context.fillStyle = this.contrast(index);
    context.fillText(text, x + 5, y + height / 2 + 1, width - 10);
  }
}

export class DetectionView extends OverlayView {
  constructor(network, onChange) {
    super(network, onChange, { listLabel: "Detections, highest score first", sliderLabel: "Minimum score", min: 0.01 });
  }

  /** Detections above the slider's score: {index, score, box}, with the box [x1, y1, x2, y2] relative to the image. */
  #detections({ boxes, scores, labels }) {
    const detections = [];
    for (let i = 0; i < labels.length && labels[i] >= 0 && scores[i] > this.sliderValue; i++) {
      const box = Array.from(boxes.slice(4 * i, 4 * i + 4), (v) => Math.min(1, Math.max(0, v)));
      if (box[0] < box[2] && box[1] < box[3]) detections.push({ index: labels[i], score: scores[i], box });
    }
    return detections;
  }

  summary(result) {
    const detections = this.#detections(result);
    const texts = detections.map(({ index, score }) => `${this.name(index)}, ${percent(score)}`);
    return [`${detections.length || "none"} found`, texts.join("; ") || countObjects(0)];
  }

  update() {
    const { width, height } = this.image;
    const detections = (this.detections = this.#detections(this.result));
    const count = countObjects(detections.length);
    this.headline(detections.length ? count : `Nothing above ${percent(this.sliderValue)}`);
    this.rows(
      detections.map(({ index, score, box }) => ({
        name: this.name(index),
        fraction: score,
        text: percent(score, 1),
        color: this.color(index),
        data: { index, score, box: box.map((v, i) => v * (i % 2 ? height : width)).join(" ") },
      })),
    );
    const texts = detections.slice(0, MAX_ANNOUNCED).map(({ index, score }) => `${this.name(index)} ${percentText(score)}`);
    this.announcement = [count, ...texts].join(", ");
  }

  draw(context, width, height) {
    const scaled = this.detections.map(({ index, score, box: [x1, y1, x2, y2] }) => ({
      index,
      text: `${this.name(index)} ${percent(score)}`,
      box: [x1 * width, y1 * height, x2 * width, y2 * height],
    }));
    for (const { index, box } of scaled.toReversed()) {
      // A frame between two thin lines of contrasting lightness is visible on every background.
      const [x, y] = [box[0] + FRAME / 2, box[1] + FRAME / 2];
      const size = [Math.max(0, box[2] - box[0] - FRAME), Math.max(0, box[3] - box[1] - FRAME)];
      for (const [lineWidth, strokeStyle] of [
        [FRAME + 2, this.contrast(index)],
        [FRAME, this.color(index)],
      ]) {
        Object.assign(context, { lineWidth, strokeStyle });
        context.strokeRect(x, y, ...size);
      }
    }
    const occupied = [];
    for (const { index, text, box } of scaled) {
      const [x1, y1, x2, y2] = box;
      const candidates = (w, h) => [y1 - h, y1, y2, y2 - h].flatMap((y) => [x1, x2 - w].map((x) => [x, y]));
      this.drawLabel(context, index, text, occupied, candidates, { width, height });
    }
  }
}

export class SegmentationView extends OverlayView {
  constructor(network, onChange) {
    super(network, onChange, { listLabel: "Classes by their fraction of the image", sliderLabel: "Opacity", min: 0 });
    this.regions = document.createElement("canvas");
    this.edges = document.createElement("canvas");
  }

  #isPainted(index) {
    return this.name(index).toLowerCase() !== "background";
  }

  /** The classes in the mask, {index, fraction}, largest first. */
  #fractions({ classes }) {
    const counts = new Map();
    for (const index of classes) counts.set(index, (counts.get(index) ?? 0) + 1);
    const fractions = Array.from(counts, ([index, count]) => ({ index, fraction: count / classes.length }));
    return fractions.sort((a, b) => b.fraction - a.fraction);
  }

  #main(fractions) {
    return fractions.find(({ index }) => this.#isPainted(index)) ?? fractions[0];
  }

  summary(result) {
    const fractions = this.#fractions(result);
    const texts = fractions.map(({ index, fraction }) => `${this.name(index)}, ${percent(fraction, 1)}`);
    return [this.name(this.#main(fractions).index), texts.join("; ")];
  }

  update(isNewResult) {
    if (!isNewResult) return; // the slider changes only the opacity
    const fractions = this.#fractions(this.result);
    const main = this.#main(fractions);
    this.headline(this.name(main.index), percent(main.fraction, 1));
    this.rows(
      fractions.map(({ index, fraction }) => ({
        name: this.name(index),
        fraction,
        text: fraction < 0.001 ? "< 0.1 %" : percent(fraction, 1),
        color: this.#isPainted(index) ? this.color(index) : "transparent",
        data: { index, fraction },
      })),
    );
    const announced = fractions.filter(({ fraction }) => fraction >= MIN_LABELED).slice(0, MAX_ANNOUNCED);
    this.announcement = announced.map(({ index, fraction }) => `${this.name(index)} ${percentText(fraction)}`).join(", ");
    this.#render(fractions.filter(({ index }) => this.#isPainted(index)));
  }

  /** Render the regions, their edges, and the positions of the labels at the size of the mask. */
  #render(painted) {
    const { classes } = this.result;
    const side = this.network.preprocessing.crop_px;
    const colors = new Map(painted.map(({ index }) => [index, this.rgb(index)]));
    const [regions, edges] = [new ImageData(side, side), new ImageData(side, side)];
    const longestRuns = new Map(); // class -> its longest row of pixels, the position of the label
    for (let y = 0, i = 0; y < side; y++) {
      for (let x = 0, run = 0; x < side; x++, i++) {
        const index = classes[i];
        const color = colors.get(index);
        run = x && classes[i - 1] === index ? run + 1 : 1;
        if (!color) continue;
        if (run > (longestRuns.get(index)?.run ?? 0)) longestRuns.set(index, { run, x: x + 1 - run / 2, y: y + 0.5 });
        regions.data.set([...color, 255], 4 * i);
        const neighbors = [x && i - 1, x < side - 1 && i + 1, y && i - side, y < side - 1 && i + side];
        if (neighbors.some((j) => j && classes[j] !== index)) edges.data.set([...color, 255], 4 * i);
      }
    }
    for (const [canvas, image] of [
      [this.regions, regions],
      [this.edges, edges],
    ]) {
      canvas.width = canvas.height = side;
      canvas.getContext("2d").putImageData(image, 0, 0);
    }
    this.labels = painted
      .filter(({ fraction }) => fraction >= MIN_LABELED)
      .map(({ index }) => ({ index, x: longestRuns.get(index).x / side, y: longestRuns.get(index).y / side }));
  }

  draw(context, width, height) {
    context.imageSmoothingQuality = "high";
    context.globalAlpha = this.sliderValue;
    context.drawImage(this.regions, 0, 0, width, height);
    context.globalAlpha = Math.min(1, 2 * this.sliderValue);
    context.drawImage(this.edges, 0, 0, width, height);
    context.globalAlpha = Math.min(1, 4 * this.sliderValue);
    const occupied = [];
    for (const { index, x, y } of this.labels) {
      const candidates = (w, h) => [0, 1, -1, 2, -2].map((k) => [x * width - w / 2, y * height - h / 2 + k * h]);
      this.drawLabel(context, index, this.name(index), occupied, candidates, { width, height });
    }
    context.globalAlpha = 1;
  }
}
