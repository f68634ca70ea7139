// Runs the network beside the page, so that the page answers to fingers while it computes.

import { prepare, softmax } from "./pixels.js";

let task;
let preprocessing;
let session;
let Tensor;

/** Start on `provider`. Threads need shared memory, which a browser gives only where the server's headers allow it. */
async function start(provider, url) {
  const ort = await import(`./ort/ort.${provider}.js`);
  const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(url, { executionProviders: [provider] });
  Tensor = ort.Tensor;
  const { crop_px: side } = preprocessing;
  await run(new Float32Array(3 * side * side)); // the first run sets up what later ones reuse, and shows what fails
  return threads;
}

async function run(input) {
  const { crop_px: side } = preprocessing;
  const started = performance.now();
  const tensors = await session.run({ images: new Tensor("float32", input, [1, 3, side, side]) });
  const outputs = {};
  for (const [name, tensor] of Object.entries(tensors)) outputs[name] = await tensor.getData();
  return { outputs, milliseconds: performance.now() - started };
}

async function answer(image) {
  const started = performance.now();
  const { seen, input } = prepare(image, preprocessing);
  const prepared = performance.now() - started;
  const { outputs, milliseconds } = await run(input);
  if (!Object.values(outputs).every((numbers) => numbers.every(Number.isFinite))) {
    throw new Error("the network answered with something that is no number");
  }
  const answer = task === "classify" ? { probabilities: softmax(outputs.logits) } : outputs;
  return { ...answer, seen, prepared, milliseconds };
}

self.onmessage = async ({ data }) => {
  try {
    if (data.start) {
      ({ task, preprocessing } = data);
      self.postMessage({ started: data.start, threads: await start(data.start, data.url) });
    } else {
      const result = await answer(data.image);
      self.postMessage({ id: data.id, result }, [result.seen.buffer]);
    }
  } catch (error) {
    self.postMessage({ id: data.id, failed: data.start, error: error?.message ?? String(error) });
  }
};
