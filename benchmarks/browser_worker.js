// Runs ONNX Runtime Web for benchmarks/browser.py: loads models and times them interleaved.

const WARM_UP_CALLS = 3;
const sessions = [];
const memories = [];
let ort;
let input;
let shape;

// Every memory of WebAssembly, to read its size. It only grows, so the size is the peak.
const { Memory } = WebAssembly;
WebAssembly.Memory = class extends Memory {
  constructor(descriptor) {
    super(descriptor);
    memories.push(this);
  }
};

async function run(session) {
  const results = await session.run({ images: new ort.Tensor("float32", input, shape) });
  const outputs = [];
  for (const tensor of Object.values(results)) outputs.push(await tensor.getData());
  return outputs;
}

const operations = {
  /** Load the runtime and the input. */
  async start(options) {
    ort = await import(`./ort/ort.${options.provider}.js`);
    ort.env.wasm.numThreads = options.threads;
    ort.env.logLevel = "error";
    shape = options.shape;
    input = new Float32Array(await (await fetch("input.bin")).arrayBuffer());
    return self.crossOriginIsolated;
  },

  /** Load a model and run it: its outputs. */
  async load({ model, provider, profile }) {
    const session = await ort.InferenceSession.create(model, {
      executionProviders: [provider],
      enableProfiling: profile,
    });
    sessions.push(session);
    return (await run(session)).map((values) => Array.from(values));
  },

  /** Milliseconds [model][round]. The order rotates, and every second round is reversed; one untimed call each. */
  async time({ rounds }) {
    const times = sessions.map(() => []);
    for (const session of sessions) for (let i = 0; i < WARM_UP_CALLS; i++) await run(session);
    for (let i = 0; i < rounds; i++) {
      const order = sessions.map((_, k) => (k + (i >> 1)) % sessions.length);
      if (i % 2) order.reverse();
      for (const k of order) {
        await run(sessions[k]);
        const started = performance.now();
        await run(sessions[k]);
        times[k].push(performance.now() - started);
      }
    }
    return times;
  },

  /** Run the first model, and print its profile to the console. */
  async profile({ rounds }) {
    for (let i = 0; i < rounds; i++) await run(sessions[0]);
    sessions[0].endProfiling();
  },

  async memory() {
    return memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);
  },
};

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ value: await operations[data.operation](data) });
  } catch (error) {
    self.postMessage({ error: error?.message ?? String(error) });
  }
};
