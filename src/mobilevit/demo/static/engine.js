// A worker that runs the network, and the text about it.

const START_SECONDS = 300; // a GPU that hangs is given up; until then the CPU is used

export class Engine {
  #pending = new Map();
  #numRequests = 0;

  /** Load `network` on `provider` ("wasm" or "webgpu") and time it on `image`, {data, width, height}. */
  constructor(provider, network, image) {
    this.provider = provider;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    /** {threads, milliseconds, outputs} of the test image. */
    this.ready = new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`no result after ${START_SECONDS} s`)), 1000 * START_SECONDS);
      this.worker.onerror = (event) => {
        const error = new Error(event.message || "the worker could not be started");
        reject(error);
        for (const request of this.#pending.values()) request.reject(error);
      };
      this.worker.onmessage = ({ data }) => {
        clearTimeout(timer);
        if (data.started) resolve(Object.assign(this, data.started));
        else if (data.failed) reject(new Error(data.error));
        else {
          const request = this.#pending.get(data.id);
          this.#pending.delete(data.id);
          if (data.error) request.reject(new Error(data.error));
          else request.resolve(data.result);
        }
      };
    });
    const url = new URL(network.model, import.meta.url).href;
    const { task, preprocessing, calibration } = network;
    this.worker.postMessage({ start: provider, url, image, task, preprocessing, temperature: calibration.temperature });
  }

  /** Image {data, width, height} -> the worker's result. The image is copied, as another engine may need it. */
  predict({ data, width, height }) {
    const id = ++this.#numRequests;
    const result = new Promise((resolve, reject) => this.#pending.set(id, { resolve, reject, promise: null }));
    this.#pending.get(id).promise = result;
    this.worker.postMessage({ id, image: { data, width, height } });
    return result;
  }

  /** Stop the worker after its last request. */
  async close() {
    await Promise.allSettled(Array.from(this.#pending.values(), ({ promise }) => promise));
    this.worker.terminate();
  }

  get description() {
    if (this.provider === "webgpu") return "WebGPU";
    return `WASM SIMD, ${this.threads === 1 ? "1 thread" : `${this.threads} threads`}`;
  }
}

/** Why this browser has no GPU to compute with, or "". */
export async function findGpuProblem() {
  if (!navigator.gpu) return isSecureContext ? "not available in this browser" : "available on https pages only";
  try {
    const adapter = await navigator.gpu.requestAdapter();
    if (!adapter) return "no GPU found";
    return (adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter) ? "only emulated on the CPU" : "";
  } catch (error) {
    return `failed (${error.message})`;
  }
}
