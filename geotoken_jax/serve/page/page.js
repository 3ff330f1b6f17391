// The page: sends a photo to /v1/predict and shows the prediction on the globe and as text.

import {Globe, kilometers, middle} from "./globe.js";

const get = id => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)"), dark = matchMedia("(prefers-color-scheme: dark)");
const MOVE_MS = 750, HOLD_MS = 500, SHOWN_CANDIDATES = 10;
const COLORS = {
  sea: "sea", deep: "deep", glow: "glow", clear: "clear", land: "land", coast: "coast", border: "border", graticule: "graticule", cell: "cell",
  answer: "map-answer", candidate: "candidate", neighbor: "neighbor", truth: "truth", city: "city", halo: "halo", text: "text",
};

let colors = {}, token = "", about = null, answer = null, truth = null, stop = 0, chosen = null, playing = 0, asked = 0;

// --- Formatting ---

const number = (value, digits) => value.toLocaleString("en", {maximumFractionDigits: digits});
const distance = km => km < 0.95 ? `${number(km * 1000, 0)} m` : `${number(km, km < 10 ? 1 : 0)} km`;
const percent = p => !(p > 0) ? "0 %" : p >= 0.9995 ? "over 99.9 %" : p < 0.00005 ? `1 in ${(1 / p).toLocaleString("en", {maximumSignificantDigits: 2})}` : `${(100 * p).toLocaleString("en", p >= 0.1 ? {maximumFractionDigits: 0} : {maximumSignificantDigits: 2})} %`;
const degrees = ([latitude, longitude], digits = 4) =>
  `${Math.abs(latitude).toFixed(digits)}° ${latitude < 0 ? "S" : "N"}, ${Math.abs(longitude).toFixed(digits)}° ${longitude < 0 ? "W" : "E"}`;
const at = ({latitude, longitude}) => [latitude, longitude];
const likeliest = answer => answer.candidates.toSorted((a, b) => b.probability - a.probability).slice(0, SHOWN_CANDIDATES);
// The name of the nearest city, and the distance if it is 15 km or more. geo/places.py writes the same text.
function near(spot) {
  const city = globe.city(spot);
  if (!city) return "";
  const name = `${city.name}, ${city.country}`;
  return city.km < 15 ? name : `${distance(city.km)} from ${name}`;
}

const named = answer => answer.place || near(at(answer)) || degrees(at(answer), 2);

// --- The service ---

async function ask(path, options = {}) {
  const headers = token ? {Authorization: `Bearer ${token}`} : {};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch {
    throw new Error("The service cannot be reached: check the connection and try again.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    get("token-form").hidden = false;
    throw new Error(token ? "The service does not accept this token: enter another one." : "This service requires a token: enter it above.");
  }
  const after = response.headers.get("Retry-After"), again = after ? `try again in ${after === "1" ? "a second" : `${after} seconds`}` : "try again later";
  const own = await response.json().then(body => body.error, () => "");
  const sentence = {
    413: "This photo is too large for the service: send a smaller one.",
    429: `Too many photos came from your address: ${again}.`,
    503: `The service is busy or still starting: ${again}.`,
  }[response.status] || (response.status < 500 && own ? `${own[0].toUpperCase()}${own.slice(1)}.` : "The service failed: try again, and report it to the operator if it fails again.");
  throw new Error(sentence);
}

// Pictures are fetched because an <img> element cannot send a token.
async function picture(image, path) {
  try {
    const url = URL.createObjectURL(await (await ask(path)).blob());
    image.onload = () => URL.revokeObjectURL(url);
    image.src = url;
  } catch {
    image.remove();
  }
}

async function introduce() {
  about = await (await ask("v1/about")).json();
  get("token-form").hidden = true;
  problem("");
  get("model").textContent = about.photos ? `The model ${about.name} predicts it cell by cell and compares with ${number(about.photos, 0)} photos.` : `The model ${about.name} predicts it cell by cell.`;
  get("knows").textContent = about.knows;
  get("credit").textContent = about.credit;
  const list = get("examples").querySelector("ul");
  list.replaceChildren();
  about.examples.forEach((example, k) => {
    const button = made("button", {type: "button", ariaPressed: "false", ariaLabel: `Example ${k + 1}`}), image = made("img", {alt: ""});
    const path = `v1/examples/${k}?${about.version}`;
    button.append(image);
    button.onclick = async () => {
      for (const other of list.querySelectorAll("button")) other.ariaPressed = String(other === button);
      try { await predict(await (await ask(path)).blob(), example); } catch (error) { problem(error.message); }
    };
    list.append(made("li", {}, button));
    picture(image, path);
  });
  get("examples").hidden = !about.examples.length;
}

async function predict(file, example = null) {
  const own = ++asked, form = new FormData(), image = get("photo").querySelector("img");
  pause();
  problem("");
  form.append("photo", file, "photo");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  get("photo").hidden = false;
  get("photo").classList.add("busy");
  get("controls").hidden = get("answer").hidden = true;
  globe.mark({cells: [], circles: [], dots: [], lines: []});
  caption("Predicting …");
  if (matchMedia("(max-width: 62rem)").matches) get("stage").scrollIntoView({behavior: still.matches ? "auto" : "smooth", block: "center"});
  globe.fly({center: globe.center, radius: globe.whole}, still.matches ? 0 : 500);
  try {
    const found = await (await ask("v1/predict?format=levels", {method: "POST", body: form})).json();
    if (own !== asked) return;
    show(found, example);
  } catch (error) {
    if (own !== asked) return;
    problem(error.message);
    caption("Choose a photo to start.");
    get("photo").hidden = true;
  } finally {
    if (own === asked) get("photo").classList.remove("busy");
  }
}

// --- The answer in words ---

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
const caption = words => { get("caption").textContent = words; };
const problem = words => { get("problem").textContent = words; };

function bar(share, ...words) {
  const fill = made("i", {ariaHidden: "true"});
  fill.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return made("button", {type: "button"}, ...words, fill);
}

function show(found, example) {
  answer = found;
  truth = example && at(example);
  chosen = null;
  const spot = at(answer);
  get("where").textContent = named(answer);
  get("sure").textContent = `The photo was taken within ${distance(answer.radius_km)} of it with 50 % probability, and within ${distance(answer.radius_90_km)} with 90 %.`;
  get("off").hidden = get("truth").hidden = !truth;
  if (truth) get("off").textContent = `It was taken ${distance(kilometers(spot, truth))} from there${example.place ? `, near ${example.place}` : ""}.`;
  get("coordinates").textContent = spot.map(x => x.toFixed(6)).join(", ");
  const fine = answer.radius_km < 5 ? 12 : answer.radius_km < 100 ? 8 : 5;
  get("osm").href = `https://www.openstreetmap.org/?mlat=${spot[0]}&mlon=${spot[1]}#map=${fine}/${spot[0]}/${spot[1]}`;
  get("within").replaceChildren(...Object.entries(answer.within).map(([km, p]) =>
    made("div", {}, made("dt", {textContent: `within ${distance(+km)}`}), made("dd", {textContent: percent(p)}))));
  list("levels", answer.levels, (level, k) => {
    const button = bar(level.probability, made("span", {className: "name", textContent: k ? `Level ${k}` : "Face"}),
      made("span", {className: "whole", textContent: `${distance(level.edge_km)} wide`}), made("span", {textContent: percent(level.probability)}));
    button.onclick = () => { pause(); go(k); };
    return button;
  });
  const likely = likeliest(answer), most = likely[0]?.probability || 1;
  list("candidates", likely, (candidate, k) => {
    const button = bar(candidate.probability / most, made("span", {className: "name", textContent: `${k + 1}.`}),
      made("span", {textContent: near(at(candidate)) || degrees(at(candidate), 2)}), made("span", {textContent: percent(candidate.probability)}));
    button.onclick = () => choose(button, at(candidate), `Candidate ${k + 1}: ${degrees(at(candidate))}, ${distance(kilometers(spot, at(candidate)))} from the prediction.`);
    return button;
  });
  list("neighbors", answer.neighbors, (neighbor, k) => {
    const away = distance(kilometers(spot, at(neighbor)));
    const button = made("button", {type: "button"}, made("b", {textContent: away}), made("span", {textContent: near(at(neighbor))}), made("span", {textContent: `similarity ${neighbor.score.toFixed(2)}`}));
    if (about?.thumbnails) {
      const image = made("img", {alt: `Similar photo ${k + 1}`});
      button.prepend(image);
      picture(image, `v1/neighbors/${neighbor.row}/thumbnail?${about.version}`);
    }
    button.onclick = () => choose(button, at(neighbor), `A similar photo: ${degrees(at(neighbor))}, ${away} from the prediction.`);
    return button;
  });
  get("level").max = answer.levels.length;
  get("answer").hidden = get("controls").hidden = false;
  if (still.matches) { go(answer.levels.length); pause(); } else play(0);
}

function list(id, items, make) {
  get(id).replaceChildren(...items.map((item, k) => made("li", {}, make(item, k))));
  get(id).previousElementSibling.hidden = get(id).hidden = !items.length;
}

// --- The answer on the globe ---

// Stops are the levels, followed by the whole answer: circles, candidates and neighbors.
function view(k) {
  const level = answer.levels[k];
  if (!level) return globe.view(at(answer), Math.max(2.6 * answer.radius_90_km, 4 * answer.radius_km, 5));
  return globe.view(middle(level.cells[level.chosen].corners), level.edge_km * 2.6);
}

function said(k) {
  const level = answer.levels[k];
  if (!level) return `${named(answer)}: 50 % probability within ${distance(answer.radius_km)}.`;
  return `${k ? `Level ${k}` : "Face"}: ${distance(level.edge_km)} wide, ${percent(level.probability)}.`;
}

function mark() {
  const cells = answer.levels.slice(0, stop).map(level => ({corners: level.cells[level.chosen].corners, width: 1.2}));
  const level = answer.levels[stop], last = !level, spot = at(answer);
  if (level) {
    const shown = level.cells.map((cell, k) => ({
      corners: cell.corners, width: k === level.chosen ? 3 : 1.2, fill: 0.05 + 0.35 * cell.probability, label: cell.probability >= 0.005 ? percent(cell.probability) : "",
    }));
    cells.push(...shown.filter((_, k) => k !== level.chosen), shown[level.chosen]);
  }
  const dots = answer.neighbors.map(n => ({at: at(n), kind: "neighbor", size: 4}));
  dots.push(...likeliest(answer).map((c, k) => ({at: at(c), kind: "candidate", size: last ? 8 : 5, label: last ? String(k + 1) : ""})).reverse());
  if (truth) dots.push({at: truth, kind: "truth", size: 7});
  dots.push({at: spot, kind: "answer", size: 7, ring: true});
  if (chosen) dots.push({at: chosen, kind: "text", size: 4, ring: true});
  globe.mark({
    cells, dots,
    circles: last ? [{at: spot, km: answer.radius_90_km, dash: [7, 6], label: "90 %"}, {at: spot, km: answer.radius_km, label: "50 %"}] : [],
    lines: [...(truth ? [{from: spot, to: truth, kind: "truth"}] : []), ...(chosen ? [{from: spot, to: chosen, kind: "text"}] : [])],
  });
}

function current(element) {
  for (const other of get("answer").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
  element?.setAttribute("aria-current", "true");
}

// Moves the globe to a stop. The result is false if the user turned the globe before it arrived.
function go(k) {
  stop = Math.max(0, Math.min(answer.levels.length, k));
  chosen = null;
  mark();
  current(get("levels").children[stop]?.firstElementChild);
  caption(said(stop));
  const slider = get("level");
  slider.value = stop;
  slider.setAttribute("aria-valuetext", said(stop));
  get("back").disabled = stop === 0;
  get("on").disabled = stop === answer.levels.length;
  return globe.fly(view(stop), still.matches ? 0 : stop ? MOVE_MS : 1.4 * MOVE_MS);
}

async function play(from) {
  const own = ++playing;
  get("play").textContent = "Pause";
  for (let k = from; k <= answer.levels.length; k++) {
    const arrived = await go(k);
    if (own !== playing) return;
    if (!arrived) break;  // somebody turned the globe
    await new Promise(done => setTimeout(done, HOLD_MS));
    if (own !== playing) return;
  }
  pause();
}

function pause() {
  playing++;
  get("play").textContent = answer && stop === answer.levels.length ? "Replay" : "Play";
}

function choose(button, spot, words) {
  pause();
  chosen = spot;
  stop = answer.levels.length;
  get("level").value = stop;
  mark();
  current(button);
  caption(words);
  globe.fly(globe.view(spot, Math.max(30, Math.min(4000, 3 * kilometers(spot, at(answer))))), still.matches ? 0 : 1.6 * MOVE_MS);
}

// --- Controls ---

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  get("theme").ariaPressed = String(theme === "dark");
  const style = getComputedStyle(document.documentElement);
  colors = Object.fromEntries(Object.entries(COLORS).map(([name, variable]) => [name, style.getPropertyValue(`--${variable}`).trim()]));
  globe.redraw();
}

function covered() {
  const {left, top} = get("stage").getBoundingClientRect();
  const boxes = [...get("stage").querySelectorAll("figure, .zoom, .player")].map(element => element.getBoundingClientRect());
  return boxes.map(box => [box.left - left, box.top - top, box.right - left, box.bottom - top]);
}

const globe = new Globe(get("globe"), () => colors, covered);
paint(dark.matches ? "dark" : "light");
dark.onchange = () => paint(dark.matches ? "dark" : "light");
get("theme").onclick = () => paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

const unpressed = () => { for (const button of get("examples").querySelectorAll("button")) button.ariaPressed = "false"; };
const take = file => { if (file) { unpressed(); predict(file); } };
get("file").onchange = event => { take(event.target.files[0]); event.target.value = ""; };
document.ondragover = event => { event.preventDefault(); get("drop").classList.add("over"); };
document.ondragleave = event => { if (!event.relatedTarget) get("drop").classList.remove("over"); };
document.ondrop = event => { event.preventDefault(); get("drop").classList.remove("over"); take(event.dataTransfer.files[0]); };
document.onpaste = event => take(event.clipboardData.files[0]);

get("token-form").onsubmit = event => {
  event.preventDefault();
  token = get("token").value;
  get("token").value = "";
  introduce().catch(error => problem(error.message));
};
get("play").onclick = () => {
  if (get("play").textContent === "Pause") pause();
  else play(stop === answer.levels.length ? 0 : stop + 1);
};
get("back").onclick = () => { pause(); go(stop - 1); };
get("on").onclick = () => { pause(); go(stop + 1); };
get("level").oninput = event => { pause(); go(+event.target.value); };
get("closer").onclick = () => globe.zoom(1.6);
get("farther").onclick = () => globe.zoom(1 / 1.6);
get("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(get("coordinates").textContent);
    get("copy").textContent = "Copied";
  } catch {  // browsers offer no clipboard over plain HTTP
    getSelection().selectAllChildren(get("coordinates"));
    get("copy").textContent = "Selected";
  }
  setTimeout(() => { get("copy").textContent = "Copy"; }, 2000);
};

Promise.all(["world", "cities"].map(name => fetch(`page/${name}.json`).then(response => response.json()))).then(([world, cities]) => globe.load(world, cities));
introduce().catch(error => problem(error.message));
