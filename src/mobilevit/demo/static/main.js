// The page: image sources, requests to the worker, and the display of predictions.

import { ClassificationView, DetectionView, MultilabelView, SegmentationView } from "./views.js";
import { Pad } from "./pad.js";
import { Engine, findGpuProblem } from "./engine.js";
import { findDifference } from "./trial.js";

const $ = (id) => document.getElementById(id);
const round = (ms) => ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0);

const network = await (await fetch("network.json")).json();
const names = network.class_names;
const hasPad = Boolean(network.drawing);

// ---------------------------------------------------------------------------------------------------------------------
// Messages

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

let announced = { text: "", at: 0, timer: 0 };

/** Announce `text` to screen readers. If `isStream`, skip repetitions and announce at most every two seconds. */
function announce(text, isStream = false) {
  clearTimeout(announced.timer);
  const delay = isStream ? Math.max(0, announced.at + 2000 - performance.now()) : 0;
  announced.timer = setTimeout(() => {
    if (isStream && text === announced.text) return;
    announced = { text, at: performance.now(), timer: 0 };
    $("live").textContent = text;
  }, delay);
}

// ---------------------------------------------------------------------------------------------------------------------
// Engines: the CPU, which always works, and the GPU, if it is correct and faster

const LABELS = { wasm: "CPU", webgpu: "GPU" };
let engine; // runs the network
let expected; // outputs of the CPU for the test image
let testImage;
let ready; // resolves when an engine runs

async function readTestImage() {
  const response = await fetch("test.png");
  const bitmap = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
  return readPixels(bitmap, bitmap.width, bitmap.height);
}

/** Start an engine, time it, and compare its outputs with those of the CPU. */
async function startEngine(provider) {
  const { data, width, height } = testImage;
  const started = new Engine(provider, network, { data, width, height });
  try {
    await started.ready;
    expected ??= started.outputs;
    const problem = findDifference(network.task, expected, started.outputs);
    if (problem) throw new Error(problem);
  } catch (error) {
    started.close();
    throw error;
  }
  const option = $("provider").querySelector(`[value=${provider}]`);
  option.textContent = `${LABELS[provider]} \u00b7 ${round(started.milliseconds)} ms`;
  return started;
}

/** Use an engine that has been started, and show which one runs. */
function useEngine(started) {
  if (engine !== started) engine?.close();
  engine = started;
  $("provider").value = started.provider;
  $("engine").textContent = started.description;
  $("engine").title = self.crossOriginIsolated ? "" : "More threads require the COOP and COEP response headers.";
  document.body.dataset.state = "ready";
  document.body.dataset.provider = started.provider;
  if (!latencies.length) $("latency-details").textContent = "Ready";
  latencies.length = 0;
}

/** Start on the CPU; without it the page cannot work. */
async function useCpu() {
  $("latency-details").textContent = "Loading the network";
  try {
    useEngine(await startEngine("wasm"));
  } catch (error) {
    document.body.dataset.state = "failed";
    showError(`The network could not be started: ${error.message}`);
    throw error;
  }
}

/** Show why the GPU is not used. It can be selected only if its results are correct. */
function rejectGpu(reason, isCorrect = false) {
  $("gpu").textContent = `WebGPU: ${reason}`;
  $("provider").querySelector("[value=webgpu]").disabled = !isCorrect;
}

/** Start the GPU in the background while the CPU runs, and use it if it is faster. */
async function tryGpu() {
  const problem = await findGpuProblem();
  if (problem) return rejectGpu(problem);
  $("gpu").textContent = "WebGPU: starting";
  let gpu;
  try {
    gpu = await startEngine("webgpu");
  } catch (error) {
    return rejectGpu(`not used, ${error.message}`);
  }
  $("provider").querySelector("[value=webgpu]").disabled = false;
  const cpuMilliseconds = engine.milliseconds;
  if (gpu.milliseconds < cpuMilliseconds) {
    useEngine(gpu);
    $("gpu").textContent = `WASM: ${round(cpuMilliseconds)} ms`;
  } else {
    gpu.close();
    rejectGpu(`${round(gpu.milliseconds)} ms, not used because it is slower`, true);
  }
  return undefined;
}

/** Use the engine that the user has selected. */
async function selectEngine(provider) {
  if (provider === engine.provider) return;
  document.body.dataset.state = "loading";
  try {
    useEngine(await startEngine(provider));
    $("gpu").textContent = "";
  } catch (error) {
    if (provider === "webgpu") rejectGpu(`not used, ${error.message}`);
    else showError(`The CPU could not be used: ${error.message}`);
    useEngine(engine);
  }
}

/** Image {data, width, height} -> the worker's result. If the GPU fails, the CPU takes over. */
async function predict(image) {
  await ready;
  const used = engine;
  try {
    return await used.predict(image);
  } catch (error) {
    if (used.provider === "wasm") throw error;
    if (!used.hasFailed) {
      used.hasFailed = true;
      rejectGpu(`not used, it failed (${error.message})`);
      ready = useCpu();
    }
    return predict(image);
  }
}

/** A function that predicts the newest image of a live source, one at a time. `getImage` is called when one is due. */
function liveSource(tab, getImage) {
  let isBusy = false;
  let isStale = false;
  return async () => {
    isStale = true;
    if (isBusy) return;
    isBusy = true;
    try {
      while (isStale) {
        isStale = false;
        const image = getImage();
        const result = image && (await predict(image));
        if (result && tab === selectedTab()) show(result, image);
      }
    } catch (error) {
      if (document.body.dataset.state === "ready") showError(error.message);
    } finally {
      isBusy = false;
    }
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Predictions

const Views = {
  classify: ClassificationView,
  multilabel: MultilabelView,
  detect: DetectionView,
  segment: SegmentationView,
};
const view = new Views[network.task](network, () => {
  announce(view.announcement, true);
  thumbnails.forEach(labelThumbnail);
});
const latencies = []; // of the last images, in milliseconds

const selectedTab = () => document.querySelector("[role=tab][aria-selected=true]").id;

/** Show `result` of `image`, which has a width, a height and, if from a live source, a canvas. */
function show(result, image) {
  document.body.classList.remove("empty");
  view.show(result, image, document.querySelector(".panel:not([hidden]) .stage"));
  const side = network.preprocessing.crop_px;
  const canvas = $("input");
  canvas.width = canvas.height = side;
  canvas.classList.toggle("tiny", side < 100);
  canvas.getContext("2d").putImageData(new ImageData(result.cropped, side, side), 0, 0);
  showLatency(result);
  $("results").dataset.count = Number($("results").dataset.count ?? 0) + 1;
  announce(view.announcement, true);
}

function showNothing() {
  document.body.classList.add("empty");
  const prompts = {
    "tab-draw": "Draw a character.",
    "tab-files": "Choose an image.",
    "tab-camera": "Start the camera.",
  };
  view.clear(prompts[selectedTab()]);
  $("input").width = $("input").width; // clears the canvas
}

function showLatency({ milliseconds, preprocessingMilliseconds }) {
  latencies.push(milliseconds);
  if (latencies.length > 60) latencies.shift();
  const median = [...latencies].sort((a, b) => a - b)[latencies.length >> 1];
  $("latency").textContent = round(milliseconds);
  $("latency-details").textContent =
    `median of ${latencies.length}: ${round(median)} ms; preprocessing: ${round(preprocessingMilliseconds)} ms`;
  const max = Math.max(...latencies);
  const points = latencies.map((ms, i) => `${(160 * i) / Math.max(1, latencies.length - 1)},${34 - (32 * ms) / max}`);
  if (points.length === 1) points.push(`160,${34 - 32}`);
  $("latency-chart").firstElementChild.setAttribute("points", points.join(" "));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")].filter((tab) => hasPad || tab.id !== "tab-draw");

function selectTab(tab, hasFocus = false) {
  for (const other of tabs) {
    other.hidden = false;
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  if (hasFocus) tab.focus();
  if (tab.id !== "tab-camera") stopCamera();
  if (tab.id === "tab-draw" && pad && !pad.isEmpty) predictDrawing();
  else if (tab.id === "tab-files" && selected) show(selected.result, selected);
  else showNothing();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    selectTab(tabs.at(to % tabs.length), true);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

let pad = null;
const predictDrawing = liveSource("tab-draw", () => {
  if (pad.isEmpty) {
    showNothing();
    return null;
  }
  return pad.image();
});
if (hasPad) {
  pad = new Pad($("pad"), network.drawing, predictDrawing, announce);
  $("clear").addEventListener("click", () => pad.clear());
  $("undo").addEventListener("click", () => pad.undo());
}

// ---------------------------------------------------------------------------------------------------------------------
// Image files

const thumbnails = [];
let selected = null;

/** The pixels of an image or video frame on a white background, and the canvas that they are from. */
function readPixels(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return { data: context.getImageData(0, 0, width, height).data, width, height, canvas };
}

async function predictFile(file) {
  const url = URL.createObjectURL(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    // Some formats (SVG) can be displayed, but not converted to a bitmap.
    bitmap = new Image();
    bitmap.src = url;
    try {
      await bitmap.decode();
    } catch {
      URL.revokeObjectURL(url);
      throw new Error(`${file.name}: not an image that this browser can read`);
    }
  }
  const width = bitmap.naturalWidth || bitmap.width || 512;
  const height = bitmap.naturalHeight || bitmap.height || 512;
  return { name: file.name, url, width, height, result: await predict(readPixels(bitmap, width, height)) };
}

async function addFiles(files) {
  if (!files.length) return;
  const tab = $("tab-files");
  if (tab.getAttribute("aria-selected") !== "true") selectTab(tab);
  showError("");
  const errors = [];
  for (const file of files) {
    try {
      addThumbnail(await predictFile(file));
    } catch (error) {
      errors.push(error.message);
    }
  }
  if (errors.length) showError(errors.join("; "));
}

function addThumbnail(item) {
  const image = Object.assign(new Image(), { src: item.url, alt: "" });
  image.classList.toggle("tiny", item.width < 100);
  item.button = document.createElement("button");
  item.button.append(image, document.createElement("span"));
  item.button.title = item.name;
  item.button.addEventListener("click", () => select(item));
  const entry = document.createElement("li");
  entry.append(item.button);
  $("thumbnails").append(entry);
  thumbnails.push(item);
  labelThumbnail(item);
  select(item);
}

function labelThumbnail({ name, button, result }) {
  const [short, long] = view.summary(result);
  button.lastChild.textContent = short;
  button.setAttribute("aria-label", `${name}: ${long}`);
}

function select(item) {
  selected = item;
  for (const { button } of thumbnails) button.setAttribute("aria-pressed", button === item.button);
  item.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  Object.assign($("selected"), { src: item.url, alt: item.name, hidden: false });
  $("selected").classList.toggle("tiny", item.width < 100);
  show(item.result, item);
}

$("files").addEventListener("change", async (event) => {
  const files = [...event.target.files];
  event.target.value = ""; // so that the same file can be chosen again
  await addFiles(files);
});
let dragDepth = 0;
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    dragDepth = { dragenter: dragDepth + 1, dragover: dragDepth, dragleave: dragDepth - 1, drop: 0 }[type];
    $("drop").classList.toggle("over", dragDepth > 0);
    if (type === "drop") addFiles([...event.dataTransfer.files]);
  });
}
addEventListener("paste", (event) => addFiles([...event.clipboardData.files]));

// ---------------------------------------------------------------------------------------------------------------------
// Camera

const video = $("video");
let facing = "environment";
let numStarts = 0;

const predictFrame = liveSource("tab-camera", () => {
  if (!video.srcObject || !video.videoWidth) return null;
  return readPixels(video, video.videoWidth, video.videoHeight);
});

function predictEveryFrame() {
  if (!video.srcObject) return;
  predictFrame();
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(predictEveryFrame);
  else setTimeout(predictEveryFrame, 50);
}

async function startCamera() {
  const thisStart = ++numStarts;
  showError("");
  if (!navigator.mediaDevices?.getUserMedia) {
    showError("Browsers allow the camera only on https pages and on this machine.");
    return;
  }
  $("camera-note").textContent = "Waiting for the camera";
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: facing, width: { ideal: 640 }, height: { ideal: 480 } },
    });
    if (thisStart !== numStarts) {
      for (const track of stream.getTracks()) track.stop(); // another tab was selected meanwhile
      return;
    }
    video.srcObject = stream;
    await video.play();
    $("camera-note").hidden = true;
    $("camera-switch").textContent = "Stop the camera";
    const devices = await navigator.mediaDevices.enumerateDevices();
    $("camera-flip").hidden = devices.filter(({ kind }) => kind === "videoinput").length < 2;
    predictEveryFrame();
  } catch (error) {
    if (thisStart !== numStarts) return;
    stopCamera();
    showError(error.name === "NotAllowedError" ? "Camera access was denied." : `Camera error: ${error.message}`);
  }
}

function stopCamera() {
  numStarts++;
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
  $("camera-note").hidden = false;
  $("camera-note").textContent = "The camera is off.";
  $("camera-switch").textContent = "Start the camera";
  $("camera-flip").hidden = true;
}

$("camera-switch").addEventListener("click", () => (video.srcObject ? stopCamera() : startCamera()));
$("camera-flip").addEventListener("click", () => {
  facing = facing === "environment" ? "user" : "environment";
  stopCamera();
  startCamera();
});
addEventListener("pagehide", stopCamera);

// ---------------------------------------------------------------------------------------------------------------------
// Title and facts

function describe() {
  const isDigits = names.length > 0 && names.every((name) => /^\d$/.test(name));
  if (hasPad) $("title").textContent = isDigits ? "Which digit is it?" : "Which letter is it?";
  else if (view.localizes) $("title").textContent = "What is in the image, and where?";
  document.body.classList.toggle("characters", hasPad);
  document.body.classList.toggle("localizes", view.localizes);
  if (view.localizes) $("camera-hint").textContent = "The network receives the whole image.";
  document.title = `${$("title").textContent.replace("?", "")} \u00b7 ${network.name}`;
  $("summary").textContent = `${network.name} runs in this browser. Your images stay on this device.`;
  const side = network.preprocessing.crop_px;
  const numListed = isDigits ? 10 : 4;
  const listed = names.slice(0, numListed).join(", ") + (names.length > numListed ? ", \u2026" : "");
  const { validation } = network;
  const facts = {
    Network: [network.name, `${(network.num_parameters / 1e6).toFixed(2)} M parameters`],
    Classes: [String(network.num_classes), names.length ? listed : "unnamed"],
    Input: [`${side} \u00d7 ${side} px`, `${(network.num_bytes / 1e6).toFixed(1)} MB of weights`],
    ...(validation && { Validation: [`${validation.percent.toFixed(1)} %`, validation.metric] }),
  };
  for (const [term, [text, detail]] of Object.entries(facts)) {
    const item = document.createElement("div");
    item.append(document.createElement("dt"), document.createElement("dd"));
    item.firstChild.textContent = term;
    item.lastChild.textContent = text;
    item.lastChild.append(Object.assign(document.createElement("small"), { textContent: detail }));
    $("facts").append(item);
  }
  const item = document.createElement("div");
  item.innerHTML =
    '<dt><label for="provider">Runs on</label></dt><dd><select id="provider">' +
    '<option value="wasm">CPU</option><option value="webgpu" disabled>GPU</option></select>' +
    '<small id="engine">loading</small><small id="gpu"></small></dd>';
  $("facts").append(item);
  $("made-by").textContent = `mobilevit ${network.mobilevit}`;
}

describe();
selectTab(tabs[0]);
testImage = await readTestImage();
$("provider").addEventListener("change", async () => {
  await selectEngine($("provider").value);
  if (!pad?.isEmpty && selectedTab() === "tab-draw") predictDrawing();
});
ready = useCpu();
await ready;
await tryGpu();
document.body.dataset.trial = "done";
