// Comparison of two engines on the same image: decides whether the results of the GPU are correct.

const DETECTED = 0.05; // lower scores do not matter, and NMS may order them differently
const SCORE = 0.02; // absolute
const CORNER = 0.01; // fraction of the image

// Largest accepted difference from the CPU, and its meaning, by task.
const LIMITS = {
  classify: [0.02, "standard deviations of the outputs"],
  multilabel: [0.02, "standard deviations of the outputs"],
  detect: [0.1, "of the boxes"],
  segment: [0.01, "of the pixels"],
};

/** Largest difference of the logits, in standard deviations. */
function logitDifference({ logits: expected }, { logits }) {
  const mean = expected.reduce((a, b) => a + b, 0) / expected.length;
  const std = Math.sqrt(expected.reduce((a, x) => a + (x - mean) ** 2, 0) / expected.length);
  const largest = expected.reduce((a, x, i) => Math.max(a, Math.abs(x - logits[i])), 0);
  return largest / (std || Math.abs(mean) || 1); // a single output has no standard deviation
}

/** Fraction of pixels with another class. */
function maskDifference({ classes: expected }, { classes }) {
  return expected.reduce((count, index, i) => count + (index !== classes[i]), 0) / expected.length;
}

function detections({ boxes, scores, labels }) {
  const all = Array.from(scores, (score, i) => ({ score, label: labels[i], box: boxes.slice(4 * i, 4 * i + 4) }));
  return all.filter(({ score }) => score > DETECTED);
}

const matches = (a, b) =>
  a.label === b.label && Math.abs(a.score - b.score) <= SCORE && a.box.every((x, i) => Math.abs(x - b.box[i]) <= CORNER);

/** Fraction of boxes that the other engine does not have; NaN without boxes. */
function boxDifference(expected, outputs) {
  const [a, b] = [detections(expected), detections(outputs)];
  const missing = (from, to) => from.filter((x) => !to.some((y) => matches(x, y))).length;
  return (missing(a, b) + missing(b, a)) / (a.length + b.length);
}

/** Why `outputs` are not those that the CPU computes, `expected`; "" if they are. */
export function findDifference(task, expected, outputs) {
  const compare = { detect: boxDifference, segment: maskDifference }[task] ?? logitDifference;
  const difference = compare(expected, outputs);
  const [limit, unit] = LIMITS[task];
  if (difference <= limit) return "";
  if (task === "detect" && !detections(expected).length && !detections(outputs).length) {
    return "its results could not be checked, the test image has no objects";
  }
  const value = unit.startsWith("of") ? `${(100 * difference).toFixed(0)} % ${unit}` : `${difference.toFixed(2)} ${unit}`;
  return `its results are wrong, they differ from those of the CPU by ${value}`;
}
