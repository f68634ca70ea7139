// The page: where images come from, what is asked of the worker, how the answers are shown.

import { Bars, Boxes, Mask } from "./answers.js";
import { Pad } from "./pad.js";

const $ = (id) => document.getElementById(id);
const round = (ms) => ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0);

const network = await (await fetch("network.json")).json();
const names = network.class_names;
const glyphs = Boolean(network.drawing);

// ---------------------------------------------------------------------------------------------------------------------
// What is said

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

let said = { text: "", at: 0, timer: 0 };

/** To screen readers; of a stream of answers, those that are other than the last, and no more than one in two seconds. */
function say(text, patient = false) {
  clearTimeout(said.timer);
  const wait = patient ? Math.max(0, said.at + 2000 - performance.now()) : 0;
  said.timer = setTimeout(() => {
    if (patient && text === said.text) return;
    said = { text, at: performance.now(), timer: 0 };
    $("live").textContent = text;
  }, wait);
}

// ---------------------------------------------------------------------------------------------------------------------
// The worker

let worker;
let ready;
let asked = 0;
const waiting = new Map();

/** Start anew on `provider`; resolves when the network has answered once. */
function start(provider) {
  worker?.terminate();
  for (const { reject } of waiting.values()) reject(new Error("the network was restarted"));
  waiting.clear();
  $("latency-more").textContent = "Loading the network";
  document.body.dataset.state = "loading";
  const one = (worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" }));
  ready = new Promise((resolve, reject) => {
    one.onerror = (event) => reject(new Error(event.message || "the worker could not be started"));
    one.onmessage = ({ data }) => {
      if (data.started) resolve(data.threads);
      else if (data.failed) reject(new Error(data.error));
      else if (waiting.has(data.id)) {
        const { resolve, reject } = waiting.get(data.id);
        waiting.delete(data.id);
        if (data.error) reject(new Error(data.error));
        else resolve(data.result);
      }
    };
  });
  const url = new URL(network.model, import.meta.url).href;
  one.postMessage({ start: provider, url, task: network.task, preprocessing: network.preprocessing });
  return ready;
}

/** Start on `provider`, or on the processor where that fails, and say which. */
async function startOn(provider) {
  try {
    const threads = await start(provider);
    const many = threads === 1 ? "1 thread" : `${threads} threads`;
    $("threads").textContent = provider === "webgpu" ? "WebGPU" : `WASM SIMD, ${many}`;
    $("threads").title = self.crossOriginIsolated ? "" : "More threads need the headers COOP and COEP from the server.";
  } catch (error) {
    if (provider === "wasm") {
      document.body.dataset.state = "failed";
      trouble(`The network could not be started: ${error.message}`);
      throw error;
    }
    $("runs-on").querySelector(`[value=${provider}]`).disabled = true;
    $("runs-on").value = "wasm";
    return startOn("wasm");
  }
  document.body.dataset.state = "ready";
  document.body.dataset.provider = provider;
  if (!trace.length) $("latency-more").textContent = "Ready";
  trace.length = 0;
  return undefined;
}

/** Image {data, width, height} -> the worker's answer. */
async function ask({ data, width, height }) {
  await ready;
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, image: { data, width, height } }, [data.buffer]);
  });
}

/**
 * Of the live source of a tab: one image at a time, and after it the newest; `take` makes the image when its turn
 * has come.
 */
function follower(tab, take) {
  let busy = false;
  let again = false;
  return async function follow() {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        const image = take();
        const result = image && (await ask(image));
        if (result && tab === chosenTab()) show(result, image);
      }
    } catch (error) {
      if (document.body.dataset.state === "ready") trouble(error.message);
    } finally {
      busy = false;
    }
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The answer

const view = new { classify: Bars, detect: Boxes, segment: Mask }[network.task](network, () => {
  say(view.spoken, true);
  for (const image of images) label(image);
});
const trace = []; // milliseconds of the last images

const chosenTab = () => document.querySelector("[role=tab][aria-selected=true]").id;

/** `image` is what the worker's `result` is of: its width and height, and its canvas if it passes by. */
function show(result, image) {
  document.body.classList.remove("waiting");
  view.show(result, image, document.querySelector(".panel:not([hidden]) .stage"));
  const side = network.preprocessing.crop_px;
  const canvas = $("seen");
  canvas.width = canvas.height = side;
  canvas.classList.toggle("tiny", side < 100);
  canvas.getContext("2d").putImageData(new ImageData(result.seen, side, side), 0, 0);
  measure(result);
  $("bars").dataset.answers = Number($("bars").dataset.answers ?? 0) + 1;
  say(view.spoken, true);
}

function showNothing() {
  document.body.classList.add("waiting");
  const invitations = {
    "tab-draw": "Draw, and it reads along.",
    "tab-files": "Choose an image.",
    "tab-camera": "Start the camera.",
  };
  view.clear(invitations[chosenTab()]);
  $("seen").width = $("seen").width; // empties it
}

function measure({ milliseconds, prepared }) {
  trace.push(milliseconds);
  if (trace.length > 60) trace.shift();
  const median = [...trace].sort((a, b) => a - b)[trace.length >> 1];
  $("latency").textContent = round(milliseconds);
  $("latency-more").textContent =
    `median of ${trace.length}: ${round(median)} ms; scaling the image took ${round(prepared)} ms`;
  const most = Math.max(...trace);
  const points = trace.map((ms, i) => `${(160 * i) / Math.max(1, trace.length - 1)},${34 - (32 * ms) / most}`);
  if (points.length === 1) points.push(`160,${34 - 32}`);
  $("trace").firstElementChild.setAttribute("points", points.join(" "));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")].filter((tab) => glyphs || tab.id !== "tab-draw");

function choose(tab, focus = false) {
  for (const one of tabs) {
    one.hidden = false;
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  if (focus) tab.focus();
  if (tab.id !== "tab-camera") stopCamera();
  if (tab.id === "tab-draw" && pad && !pad.isEmpty) readPad();
  else if (tab.id === "tab-files" && chosen) show(chosen.result, chosen);
  else showNothing();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(tabs.at(to % tabs.length), true);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

let pad = null;
const readPad = follower("tab-draw", () => {
  if (pad.isEmpty) {
    showNothing();
    return null;
  }
  return pad.image();
});
if (glyphs) {
  pad = new Pad($("pad"), network.drawing, readPad, say);
  $("clear").addEventListener("click", () => pad.clear());
  $("undo").addEventListener("click", () => pad.undo());
}

// ---------------------------------------------------------------------------------------------------------------------
// Image files

const images = [];
let chosen = null;

/** The pixels of an image, of a file or a video, upright and on white, without a colour profile's changes. */
function pixelsOf(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0, width, height);
  return { data: context.getImageData(0, 0, width, height).data, width, height, canvas };
}

async function read(file) {
  const url = URL.createObjectURL(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    // Some browsers make bitmaps of fewer formats (SVG) than they show.
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      throw new Error(`${file.name}: not an image that this browser reads`);
    }
    bitmap = image;
  }
  const width = bitmap.naturalWidth || bitmap.width || 512;
  const height = bitmap.naturalHeight || bitmap.height || 512;
  return { name: file.name, url, width, height, result: await ask(pixelsOf(bitmap, width, height)) };
}

async function addFiles(files) {
  if (!files.length) return;
  const tab = $("tab-files");
  if (tab.getAttribute("aria-selected") !== "true") choose(tab);
  trouble("");
  const errors = [];
  for (const file of files) {
    try {
      addThumb(await read(file));
    } catch (error) {
      errors.push(error.message);
    }
  }
  if (errors.length) trouble(errors.join("; "));
}

function addThumb(image) {
  const button = document.createElement("button");
  const image = new Image();
  image.src = image.url;
  image.alt = "";
  image.classList.toggle("tiny", image.width < 100);
  button.append(image, document.createElement("span"));
  button.title = image.name;
  button.addEventListener("click", () => select(image));
  const item = document.createElement("li");
  item.append(button);
  $("thumbs").append(item);
  images.push(image);
  image.button = button;
  label(image);
  select(image);
}

function label({ name, button, result }) {
  const [short, long] = view.summary(result);
  button.lastChild.textContent = short;
  button.setAttribute("aria-label", `${name}: ${long}`);
}

function select(image) {
  chosen = image;
  for (const { button } of images) button.setAttribute("aria-pressed", button === image.button);
  image.button.scrollIntoView({ block: "nearest", inline: "nearest" });
  $("shown").src = image.url;
  $("shown").alt = image.name;
  $("shown").hidden = false;
  $("shown").classList.toggle("tiny", image.width < 100);
  show(image.result, image);
}

$("files").addEventListener("change", async (event) => {
  const files = [...event.target.files];
  event.target.value = ""; // the same file can be chosen again
  await addFiles(files);
});
let over = 0;
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    over = { dragenter: over + 1, dragover: over, dragleave: over - 1, drop: 0 }[type];
    $("drop").classList.toggle("over", over > 0);
    if (type === "drop") addFiles([...event.dataTransfer.files]);
  });
}
addEventListener("paste", (event) => addFiles([...event.clipboardData.files]));

// ---------------------------------------------------------------------------------------------------------------------
// Camera

const video = $("video");
let facing = "environment";
let starting = 0;

const readCamera = follower("tab-camera", () => {
  if (!video.srcObject || !video.videoWidth) return null;
  return pixelsOf(video, video.videoWidth, video.videoHeight);
});

function eachFrame() {
  if (!video.srcObject) return;
  readCamera();
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(eachFrame);
  else setTimeout(eachFrame, 50);
}

async function startCamera() {
  const turn = ++starting;
  trouble("");
  if (!navigator.mediaDevices?.getUserMedia) {
    trouble("Browsers give the camera to pages from https and from this machine only.");
    return;
  }
  $("camera-note").textContent = "Waiting for the camera";
  try {
    const stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: facing, width: { ideal: 640 }, height: { ideal: 480 } },
    });
    if (turn !== starting) {
      for (const track of stream.getTracks()) track.stop(); // the visitor has gone elsewhere meanwhile
      return;
    }
    video.srcObject = stream;
    await video.play();
    $("camera-note").hidden = true;
    $("camera-switch").textContent = "Stop the camera";
    const cameras = (await navigator.mediaDevices.enumerateDevices()).filter((one) => one.kind === "videoinput");
    $("camera-flip").hidden = cameras.length < 2;
    eachFrame();
  } catch (error) {
    if (turn !== starting) return;
    stopCamera();
    trouble(error.name === "NotAllowedError" ? "The camera was not allowed." : `No camera: ${error.message}`);
  }
}

function stopCamera() {
  starting++;
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
// What the page is about

const validation = ({ per_cent: value, meaning }) => `${value.toFixed(1)} % ${meaning}`;

function describe() {
  const digits = names.length > 0 && names.every((name) => /^\d$/.test(name));
  if (glyphs) $("title").textContent = digits ? "Which digit is it?" : "Which letter is it?";
  else if (view.places) $("title").textContent = "What is in the image, and where?";
  document.body.classList.toggle("glyphs", glyphs);
  document.body.classList.toggle("places", view.places);
  if (view.places) $("camera-hint").textContent = "The network sees the whole image.";
  document.title = `${$("title").textContent.replace("?", "")} \u00b7 ${network.name}`;
  const side = network.preprocessing.crop_px;
  $("lead").textContent =
    `${network.name} answers in this browser. What you show it stays on this device.`;
  const some = names.slice(0, digits ? 10 : 4).join(", ") + (names.length > (digits ? 10 : 4) ? ", \u2026" : "");
  const facts = {
    Network: [network.name, `${(network.num_parameters / 1e6).toFixed(2)} M parameters`],
    Classes: [String(network.num_classes), names.length ? some : "not named"],
    Input: [`${side} \u00d7 ${side} px`, `${(network.num_bytes / 1e6).toFixed(1)} MB of weights`],
    ...(network.validation && { Validation: [validation(network.validation), "when it was trained"] }),
  };
  for (const [term, [text, more]] of Object.entries(facts)) {
    const item = document.createElement("div");
    item.append(document.createElement("dt"), document.createElement("dd"));
    item.firstChild.textContent = term;
    item.lastChild.textContent = text;
    const detail = document.createElement("small");
    detail.textContent = more;
    item.lastChild.append(detail);
    $("facts").append(item);
  }
  const item = document.createElement("div");
  item.innerHTML =
    '<dt><label for="runs-on">Runs on</label></dt><dd><select id="runs-on">' +
    '<option value="wasm">processor</option></select> <small id="threads"></small></dd>';
  $("facts").append(item);
  $("made-by").textContent = `mobilevit ${network.mobilevit}`;
}

async function hasGraphicsCard() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  } catch {
    return false;
  }
}

describe();
choose(tabs[0]);
showNothing();
const runsOn = $("runs-on");
let provider = "wasm";
if (await hasGraphicsCard()) {
  runsOn.add(new Option("graphics card", "webgpu"));
  // Below this the card waits for its orders longer than the processor computes.
  if (network.preprocessing.crop_px >= 128) provider = "webgpu";
}
runsOn.value = provider;
runsOn.addEventListener("change", async () => {
  await startOn(runsOn.value);
  if (!pad?.isEmpty && chosenTab() === "tab-draw") readPad();
});
await startOn(provider);
