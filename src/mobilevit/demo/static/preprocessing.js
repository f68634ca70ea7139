// Preprocessing as in mobilevit.images: resize, crop and normalize.
//
// The filter that a canvas resizes with depends on the browser and changes the predictions. This is Pillow's resampling:
// two passes, weights in 22-bit fixed point, 8 bits in between. The result is identical to Pillow's in every byte.

const BITS = 22;

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Name -> [support, kernel], as in Pillow's Resample.c.
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(Math.PI * x)))],
  bicubic: [
    2,
    (x) => {
      const d = Math.abs(x);
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * -0.5 : 0;
    },
  ],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Inputs and weights of the outputs [first, first + count), out of `length` outputs that cover [from, to) of `size` inputs. */
function computeWeights(size, from, to, length, first, count, filter) {
  const [support, kernel] = FILTERS[filter];
  const scale = Math.fround(to - from) / length;
  const stretch = Math.max(scale, 1); // downsampling widens the kernel (antialiasing)
  const taps = Math.ceil(support * stretch) * 2 + 1;
  const starts = new Int32Array(count);
  const ends = new Int32Array(count);
  const weights = new Int32Array(count * taps);
  const row = new Float64Array(taps);
  for (let i = 0; i < count; i++) {
    const center = from + (first + i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const end = Math.min(size, Math.trunc(center + support * stretch + 0.5));
    let sum = 0;
    for (let j = start; j < end; j++) sum += row[j - start] = kernel((j - center + 0.5) / stretch);
    for (let j = 0; j < end - start; j++) {
      const value = (sum === 0 ? row[j] : row[j] / sum) * (1 << BITS);
      weights[i * taps + j] = Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    }
    starts[i] = start;
    ends[i] = end;
  }
  return { starts, ends, weights, taps, count };
}

/** One resampling pass over `lines` lines of RGBA pixels. Outputs are weighted sums of inputs that are `step` bytes apart. */
function pass(source, target, plan, lines, lineStep, step, targetLineStep, targetStep, offset) {
  const { starts, ends, weights, taps, count } = plan;
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < count; i++) {
      let r = 1 << (BITS - 1);
      let g = r;
      let b = r;
      let at = line * lineStep + (starts[i] - offset) * step;
      for (let j = starts[i], k = i * taps; j < ends[i]; j++, k++, at += step) {
        const w = weights[k];
        r += source[at] * w;
        g += source[at + 1] * w;
        b += source[at + 2] * w;
      }
      const to = line * targetLineStep + i * targetStep;
      target[to] = r >> BITS; // clamped to 0..255 by the array
      target[to + 1] = g >> BITS;
      target[to + 2] = b >> BITS;
      target[to + 3] = 255;
    }
  }
}

/**
 * Resize the region `box` of an opaque RGBA image to width x height, and crop the result.
 * `crop` is [left, top, width, height] in resized pixels, `box` [left, top, right, bottom] in the original pixels.
 */
export function resize(image, width, height, filter, crop, box = [0, 0, image.width, image.height]) {
  const { data } = image;
  const [left, top, cropWidth, cropHeight] = crop;
  const [x0, y0, x1, y1] = box.map(Math.fround);
  const out = new Uint8ClampedArray(4 * cropWidth * cropHeight);
  if (filter === "nearest") {
    const columns = nearestIndices(x0, x1, width, image.width);
    const rows = nearestIndices(y0, y1, height, image.height);
    for (let y = 0; y < cropHeight; y++) {
      for (let x = 0; x < cropWidth; x++) {
        const at = 4 * (rows[top + y] * image.width + columns[left + x]);
        out.set(data.subarray(at, at + 4), 4 * (y * cropWidth + x));
      }
    }
    return out;
  }
  const across = computeWeights(image.width, x0, x1, width, left, cropWidth, filter);
  const down = computeWeights(image.height, y0, y1, height, top, cropHeight, filter);
  // The order of the passes affects the last bits. This is Pillow's order since version 13.
  if (image.height - height > 2 * Math.max(0, image.width - width)) {
    const from = across.starts[0];
    const columns = Math.max(...across.ends) - from;
    const between = new Uint8ClampedArray(4 * columns * cropHeight);
    pass(data.subarray(4 * from), between, down, columns, 4, 4 * image.width, 4, 4 * columns, 0);
    pass(between, out, across, cropHeight, 4 * columns, 4, 4 * cropWidth, 4, from);
  } else {
    const from = down.starts[0];
    const rows = Math.max(...down.ends) - from;
    const between = new Uint8ClampedArray(4 * cropWidth * rows);
    pass(data.subarray(4 * from * image.width), between, across, rows, 4 * image.width, 4, 4 * cropWidth, 4, 0);
    pass(between, out, down, cropWidth, 4, 4 * cropWidth, 4, 4 * cropWidth, from);
  }
  return out;
}

function nearestIndices(from, to, length, size) {
  const scale = Math.fround(to - from) / length;
  const indices = new Int32Array(length);
  for (let i = 0, at = from + 0.5 * scale; i < length; i++, at += scale) indices[i] = Math.min(size - 1, Math.trunc(at));
  return indices;
}

/**
 * An image {data, width, height} -> {cropped, input}: the cropped square in RGBA, and the normalized input of the
 * network, (3, crop_px, crop_px) floats. `preprocessing` is as in mobilevit.images.Preprocessing.
 */
export function preprocess(image, preprocessing) {
  const { resize_px: side, crop_px: crop, interpolation, mean, std } = preprocessing;
  const { width, height } = image;
  const short = Math.min(width, height);
  const [newHeight, newWidth] = Array.isArray(side)
    ? side
    : [Math.trunc((side * height) / short), Math.trunc((side * width) / short)];
  const left = Math.floor((newWidth - crop) / 2);
  const top = Math.floor((newHeight - crop) / 2);
  let cropped;
  if (Math.max(width, height) <= 10 * short) {
    cropped = resize(image, newWidth, newHeight, interpolation, [left, top, crop, crop]);
  } else {
    const x = width / newWidth;
    const y = height / newHeight;
    const box = [left * x, top * y, Math.min((left + crop) * x, width), Math.min((top + crop) * y, height)];
    cropped = resize(image, crop, crop, interpolation, [0, 0, crop, crop], box);
  }
  const plane = crop * crop;
  const input = new Float32Array(3 * plane);
  for (let channel = 0; channel < 3; channel++) {
    // A table of 256 values, with the same rounding steps as in torch.
    const values = new Float32Array(256);
    for (let v = 0; v < 256; v++) {
      const shifted = Math.fround(Math.fround(v / 255) - Math.fround(mean[channel]));
      values[v] = shifted / Math.fround(std[channel]);
    }
    for (let i = 0; i < plane; i++) input[channel * plane + i] = values[cropped[4 * i + channel]];
  }
  return { cropped, input };
}

/** Probabilities of independent classes. */
export function sigmoid(logits) {
  return Float32Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit)));
}

/** Logits -> probabilities, calibrated by the temperature. */
export function softmax(logits, temperature) {
  const max = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Float64Array.from(logits, (x) => Math.exp((x - max) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}
