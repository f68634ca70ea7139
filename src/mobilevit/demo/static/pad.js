// A pad to draw one digit or letter with a finger, pen, mouse or the keyboard.

const SIDE = 320; // of the pad in its own coordinates
const STEP = SIDE / 32; // per arrow key
const LINE = SIDE / 16;

export class Pad {
  /** `style` describes the training images. `onChange` is called after every change, `announce` with text for screen readers. */
  constructor(canvas, style, onChange, announce) {
    Object.assign(this, { canvas, style, onChange, announce });
    this.strokes = [];
    this.pen = null; // of the keyboard: {x, y, down}
    canvas.width = canvas.height = 2 * SIDE;
    this.context = canvas.getContext("2d");
    this.small = new OffscreenCanvas(8 * style.side_px, 8 * style.side_px).getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.pointer = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      this.pen = null;
      this.#paint();
    });
    this.#paint();
  }

  get isEmpty() {
    return !this.strokes.length;
  }

  clear() {
    this.strokes = [];
    if (this.pen) this.pen.down = false;
    this.#paint();
    this.onChange();
  }

  undo() {
    this.strokes.pop();
    this.#paint();
    this.onChange();
  }

  /**
   * The drawing rendered like the training images: strokes are centered, scaled and thickened as in `style`, and
   * antialiased by 8x8 supersampling.
   */
  image() {
    const { side_px: side, height, width, stroke } = this.style;
    const { context, fit } = { context: this.small, fit: this.#fit(height, width, stroke) };
    const large = 8 * side;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "black";
    context.fillRect(0, 0, large, large);
    context.setTransform(large, 0, 0, large, 0, 0);
    context.lineWidth = stroke;
    lines(context, this.strokes, fit);
    const pixels = context.getImageData(0, 0, large, large).data;
    const data = new Uint8ClampedArray(4 * side * side).fill(255);
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        let sum = 0;
        for (let j = 0; j < 8; j++) for (let i = 0; i < 8; i++) sum += pixels[4 * ((8 * y + j) * large + 8 * x + i)];
        data.fill(sum / 64, 4 * (y * side + x), 4 * (y * side + x) + 3);
      }
    }
    return { data, width: side, height: side };
  }

  /** The map from pad coordinates to a unit square in which the drawing, with its stroke width, is centered. */
  #fit(height, width, stroke) {
    const points = this.strokes.flat();
    const xs = points.map((point) => point.x);
    const ys = points.map((point) => point.y);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const scale = Math.min(
      (height - stroke) / Math.max(bottom - top, 1),
      (width - stroke) / Math.max(right - left, 1),
      5 / SIDE, // a dot stays a dot
    );
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    return (point) => ({ x: 0.5 + (point.x - x) * scale, y: 0.5 + (point.y - y) * scale });
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * SIDE, y: ((event.clientY - box.top) / box.height) * SIDE };
  }

  #down(event) {
    if (event.button || this.pointer != null) return;
    event.preventDefault(); // no scrolling, no selection
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = event.pointerId;
    this.pen = null;
    this.strokes.push([this.#at(event)]);
    this.#changed();
  }

  #move(event) {
    if (event.pointerId !== this.pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.strokes.at(-1).push(...(events.length ? events : [event]).map((one) => this.#at(one)));
    this.#changed();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) {
      this.pen ??= { x: SIDE / 2, y: SIDE / 4, down: false };
      const inside = (v) => Math.min(SIDE - STEP, Math.max(STEP, v));
      this.pen.x = inside(this.pen.x + move[0] * STEP * (event.shiftKey ? 4 : 1));
      this.pen.y = inside(this.pen.y + move[1] * STEP * (event.shiftKey ? 4 : 1));
      if (this.pen.down) this.strokes.at(-1).push({ x: this.pen.x, y: this.pen.y });
      if (this.pen.down) this.#changed();
      else this.#paint();
    } else if (event.key === " " || event.key === "Enter") {
      this.pen ??= { x: SIDE / 2, y: SIDE / 4, down: false };
      this.pen.down = !this.pen.down;
      this.announce(this.pen.down ? "Pen down" : "Pen up");
      if (this.pen.down) {
        this.strokes.push([{ x: this.pen.x, y: this.pen.y }]);
        this.#changed();
      } else {
        this.#paint();
      }
    } else if (event.key === "Backspace") {
      if (this.pen) this.pen.down = false;
      this.undo();
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
  }

  #changed() {
    this.#paint();
    this.onChange();
  }

  #paint() {
    const { context } = this;
    context.setTransform(2, 0, 0, 2, 0, 0);
    context.fillStyle = "black";
    context.fillRect(0, 0, SIDE, SIDE);
    context.lineWidth = LINE;
    lines(context, this.strokes, (point) => point);
    if (this.pen) {
      context.beginPath();
      context.arc(this.pen.x, this.pen.y, LINE * 0.7, 0, 2 * Math.PI);
      context.lineWidth = 3;
      context.strokeStyle = "#f2a541";
      context.fillStyle = this.pen.down ? "#f2a541" : "transparent";
      context.fill();
      context.stroke();
    }
  }
}

function lines(context, strokes, place) {
  context.strokeStyle = "white";
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    const first = place(stroke[0]);
    context.moveTo(first.x, first.y);
    if (stroke.length === 1) context.lineTo(first.x + 1e-3, first.y); // a dot is a line too short to see
    for (const point of stroke.slice(1).map(place)) context.lineTo(point.x, point.y);
    context.stroke();
  }
}
