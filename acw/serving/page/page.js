// One image at a time: it is sent as it is, and what comes back is drawn over it. Nothing is asked of another server.
"use strict";

const RECENT = 12; // images that the browser keeps
const FINE = 480, FINE_OF_VIEWS = 240; // px along the long side at which a map is coloured
const find = id => document.getElementById(id);
const look = document.body.dataset;
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

// What is shown: the image, and by category ("" for the inferred one) what the service said of it.
let shown = null;
let asking = null;

// --- The service ---------------------------------------------------------------------------------------------------

class Refused extends Error {}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const detail = await answer.json().then(body => body.detail, () => answer.statusText);
  if (answer.status === 401) askForToken(token !== null);
  throw new Refused(detail.charAt(0).toUpperCase() + detail.slice(1));
}

const predict = (blob, category, accept, signal) =>
  ask("predict" + (category && `?category=${encodeURIComponent(category)}`), {
    method: "POST", body: blob, signal,
    headers: { Accept: accept, "Content-Type": blob.type || "application/octet-stream" },
  });

function askForToken(wrong) {
  find("access").hidden = false;
  find("access-error").textContent = wrong ? "That is not it." : "";
  find("token").focus();
}

async function describe() {
  const { models: [model], limits } = await (await ask("models")).json();
  find("access").hidden = true;
  find("model").textContent = `${limits.formats.join(", ")}, up to ${Math.floor(limits.pixels / 1e6)} million pixels.`;
}

// --- Showing -------------------------------------------------------------------------------------------------------

function say(text, kind = "") {
  find("status").textContent = text;
  find("status").className = kind;
}

function show(blob, name, id = null) {
  if (shown) URL.revokeObjectURL(shown.url);
  shown = { blob, name, id, url: URL.createObjectURL(blob), category: "", answers: {} };
  find("result").hidden = true;
  update();
}

async function update() {
  const now = shown, category = now.category;
  asking?.abort();
  asking = new AbortController();
  document.body.classList.add("stale");
  try {
    if (!now.answers[category]) {
      say("Predicting …", "busy");
      const start = performance.now();
      const answer = await (await predict(now.blob, category, "application/json", asking.signal)).json();
      now.answers[category] = answer;
      say(`${now.name}, ${answer.width} × ${answer.height} px, in ${((performance.now() - start) / 1000).toFixed(1)} s`);
    }
    if (now !== shown || category !== now.category) return;
    document.body.classList.add("shown");
    await draw(now.answers[category]);
    document.body.classList.remove("stale");
    await remember(now);
  } catch (error) {
    if (error.name === "AbortError") return;
    document.body.classList.remove("stale");
    if (!(error instanceof Refused)) throw error;
    say(error.message, "error");
  }
}

async function draw(answer) {
  find("stage").style.setProperty("--shape", answer.width / answer.height);
  await paint(find("image"), answer);
  find("image").alt = shown.name;
  heat(find("heat"), answer.density, FINE);
  lines(answer);
  marks(answer);
  places(answer);
  categories(answer);
  views(answer);
  find("result").hidden = false;
  mute();
}

// The image itself, or an empty one of its size where this browser cannot show the format, such as TIFF.
async function paint(image, { width, height }) {
  image.width = width;
  image.height = height;
  image.src = shown.url;
  try {
    await image.decode();
  } catch {
    image.src = `data:image/svg+xml,<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`;
    await image.decode();
  }
}

// A map's colours and their opacity, both by the square root of the density, as the overlay has them.
function heat(canvas, { width, height, shares }, longSide) {
  const highest = Math.max(Math.max(...shares), look.leastPeak / shares.length);
  const level = Float32Array.from(shares, share => Math.sqrt(share / highest));
  const scale = longSide / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
  const across = neighbours(canvas.width, width), down = neighbours(canvas.height, height);
  let at = 0;
  for (const [top, bottom, low] of down) {
    for (const [left, right, near] of across) {
      const above = level[top * width + left] * (1 - near) + level[top * width + right] * near;
      const below = level[bottom * width + left] * (1 - near) + level[bottom * width + right] * near;
      const value = above * (1 - low) + below * low;
      picture.data.set(PALETTE[Math.round(255 * Math.min(value, 1))], at);
      picture.data[at + 3] = 255 * value;
      at += 4;
    }
  }
  context.putImageData(picture, 0, 0);
}

// Of each of `many` pixels along a side: the two cells beside it, and how far it is from the first to the second.
function neighbours(many, cells) {
  return Array.from({ length: many }, (_, pixel) => {
    const place = Math.min(Math.max((pixel + 0.5) * cells / many - 0.5, 0), cells - 1);
    const first = Math.floor(place);
    return [first, Math.min(first + 1, cells - 1), place - first];
  });
}

const PALETTE = (() => {
  const anchors = look.colours.split(" ").map(colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16)));
  return neighbours(256, anchors.length).map(([first, second, near]) =>
    anchors[first].map((value, channel) => value * (1 - near) + anchors[second][channel] * near));
})();

function lines({ width, height, contours }) {
  const svg = find("lines");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const paths = Object.values(contours).map(of => of.map(line => `M${line.map(point => point.join(" ")).join("L")}Z`).join(""));
  svg.replaceChildren(...["rim", ""].flatMap(kind => paths.map(d => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    path.setAttribute("class", kind);
    return path;
  })));
}

function marks({ width, height, places }) {
  find("marks").replaceChildren(...places.map(({ x, y }, number) => {
    const mark = element("b", {}, number + 1);
    mark.style.left = `clamp(12px, ${100 * (x + 0.5) / width}%, 100% - 12px)`;
    mark.style.top = `clamp(12px, ${100 * (y + 0.5) / height}%, 100% - 12px)`;
    return mark;
  }));
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function row(head, share, most, digits) {
  const bar = element("i");
  bar.style.width = `${100 * share / most}%`;
  return element("tr", {}, element("th", { scope: "row", title: head.textContent ?? head }, head),
    element("td", { class: "bar-cell" }, bar), element("td", { class: "number" }, percent(share, digits)));
}

function places({ places }) {
  const most = Math.max(...places.map(place => place.share));
  find("places").tBodies[0].replaceChildren(...places.map((place, index) => {
    const made = row(element("b", {}, index + 1), place.share, most, 1);
    const mark = find("marks").children[index];
    made.onmouseenter = () => mark.classList.add("named");
    made.onmouseleave = () => mark.classList.remove("named");
    return made;
  }));
}

function categories(answer) {
  const ranked = Object.entries(answer.categories).sort((a, b) => b[1] - a[1]);
  const [likeliest, probability] = ranked[0];
  find("categories").tBodies[0].replaceChildren(...ranked.slice(0, 8).map(([name, share]) => row(name, share, 1, 0)));
  const choice = find("category");
  choice.replaceChildren(
    element("option", { value: "" }, `inferred: ${likeliest} (${percent(probability)})`),
    ...Object.keys(answer.categories).sort().map(name => element("option", { value: name }, name)));
  choice.value = shown.category;
}

function views(answer) {
  find("views").replaceChildren(...answer.views.map(view => {
    const image = element("img", { src: find("image").src, alt: "", width: answer.width, height: answer.height });
    image.style.filter = MUTED;
    const canvas = element("canvas");
    heat(canvas, view.density, FINE_OF_VIEWS);
    canvas.style.opacity = 0.85;
    const box = element("div", { role: "img", "aria-label": `Map of ${view.name}` }, image, canvas);
    return element("figure", {}, box, element("figcaption", {},
      element("b", {}, view.name), element("span", {}, percent(view.weight, 1))));
  }));
}

// Below a map the image is muted, as in the overlay.
const MUTED = `saturate(${look.saturation}) brightness(${look.brightness})`;

function mute() {
  const opacity = find("opacity").value;
  find("opacity-value").textContent = `${opacity} %`;
  find("heat").style.opacity = opacity / 100;
  find("image").style.filter = opacity > 0 ? MUTED : "none";
  find("lines").style.display = find("show-lines").checked ? "" : "none";
  find("marks").style.display = find("show-marks").checked ? "" : "none";
}

// --- Recent images, in the browser's own database ------------------------------------------------------------------

const opened = new Promise(resolve => {
  const request = indexedDB.open("acw", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => { find("kept").textContent = "This browser keeps none."; resolve(null); };
});

// What a function of the store gives, once that is certain.
async function stored(work) {
  const database = await opened;
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("images", "readwrite");
    const request = work(transaction.objectStore("images"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

async function remember(image) {
  try {
    if (image.id === null) {
      image.id = await stored(store => store.add({ name: image.name, blob: image.blob }));
      const ids = await stored(store => store.getAllKeys()) ?? [];
      for (const id of ids.slice(0, -RECENT)) await stored(store => store.delete(id));
    }
  } catch {
    find("kept").textContent = "This browser has no room for more of them.";
  }
  await list();
}

async function list() {
  const images = await stored(store => store.getAll()) ?? [];
  for (const old of find("thumbs").querySelectorAll("img")) URL.revokeObjectURL(old.src);
  find("thumbs").replaceChildren(...images.reverse().map(({ id, name, blob }) => {
    const image = element("img", { src: URL.createObjectURL(blob), alt: name });
    const button = element("button", { type: "button", title: name, ...(id === shown?.id && { "aria-current": "true" }) }, image);
    button.onclick = () => show(blob, name, id);
    return element("li", {}, button);
  }));
  find("recent").hidden = images.length === 0;
}

// --- What a person does --------------------------------------------------------------------------------------------

function take(files) {
  const file = [...files].find(one => one.type.startsWith("image/") || !one.type);
  if (file) show(file, file.name || "pasted image");
  else say("That is no image. Choose one of the formats above.", "error");
}

find("choose").onclick = () => find("file").click();
find("file").onchange = event => {
  take(event.target.files);
  event.target.value = "";
};
addEventListener("paste", event => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
addEventListener("dragover", event => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", event => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
for (const id of ["opacity", "show-lines", "show-marks"]) find(id).oninput = mute;
find("category").onchange = event => {
  shown.category = event.target.value;
  update();
};
for (const button of document.querySelectorAll("[data-accept]")) {
  button.onclick = async () => {
    const { blob, name, category } = shown, file = name.replace(/\.\w+$/, "") + button.dataset.ending;
    button.disabled = true;
    try {
      say(`Making ${file} …`, "busy");
      const made = await (await predict(blob, category, button.dataset.accept)).blob();
      const link = element("a", { href: URL.createObjectURL(made), download: file });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      say(`${file} was made.`);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(error.message, "error");
    } finally {
      button.disabled = false;
    }
  };
}
find("forget").onclick = async () => {
  await stored(store => store.clear());
  if (shown) shown.id = null;
  await list();
};
find("access").onsubmit = async event => {
  event.preventDefault();
  sessionStorage.setItem("token", find("token").value.trim());
  await describe().catch(() => {});
};

describe().catch(error => {
  if (find("access").hidden) say(error.message, "error");
});
list();
