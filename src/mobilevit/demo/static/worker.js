// Runs the network in a worker thread, so that the page stays responsive.

import { preprocess, sigmoid, softmax } from "./preprocessing.js";

const MAX_TIMED_RUNS = 9;
const MAX_TIMED_MS = 400;

let task;
let preprocessing;
let temperature;
let session;
let Tensor;

/**
 * Load the network on `provider`, and run it on the test image: {threads, milliseconds (median), outputs}.
 *
 * Threads require shared memory, which depends on the server's response headers.
 */
async function start(provider, url, image) {
  const ort = await import(`./ort/ort.${provider}.js`);
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  // 3: errors only. WebGPU warns about the operators that it leaves to the CPU.
  session = await ort.InferenceSession.create(url, { executionProviders: [provider], logSeverityLevel: 3 });
  Tensor = ort.Tensor;
  const { input } = preprocess(image, preprocessing);
  const { outputs } = await run(input); // warm-up; it also reveals unsupported operators
  requireFinite(outputs);
  const times = [];
  const end = performance.now() + MAX_TIMED_MS;
  while (times.length < MAX_TIMED_RUNS && (!times.length || performance.now() < end)) {
    times.push((await run(input)).milliseconds);
  }
  times.sort((a, b) => a - b);
  return { threads, milliseconds: times[times.length >> 1], outputs };
}

async function run(input) {
  const { crop_px: side } = preprocessing;
  const started = performance.now();
  const tensors = await session.run({ images: new Tensor("float32", input, [1, 3, side, side]) });
  const outputs = {};
  for (const [name, tensor] of Object.entries(tensors)) outputs[name] = await tensor.getData();
  return { outputs, milliseconds: performance.now() - started };
}

function requireFinite(outputs) {
  if (!Object.values(outputs).every((numbers) => numbers.every(Number.isFinite))) {
    throw new Error("the network returned NaN or infinity");
  }
}

async function predict(image) {
  const started = performance.now();
  const { cropped, input } = preprocess(image, preprocessing);
  const preprocessingMilliseconds = performance.now() - started;
  const { outputs, milliseconds } = await run(input);
  requireFinite(outputs);
  let prediction = outputs;
  if (task === "classify") prediction = { probabilities: softmax(outputs.logits, temperature) };
  if (task === "multilabel") prediction = { probabilities: sigmoid(outputs.logits) };
  return { ...prediction, cropped, preprocessingMilliseconds, milliseconds };
}

self.onmessage = async ({ data }) => {
  try {
    if (data.start) {
      ({ task, preprocessing, temperature } = data);
      self.postMessage({ started: await start(data.start, data.url, data.image) });
    } else {
      const result = await predict(data.image);
      self.postMessage({ id: data.id, result }, [result.cropped.buffer]);
    }
  } catch (error) {
    self.postMessage({ id: data.id, failed: data.start, error: error?.message ?? String(error) });
  }
};
