// The page's only script: it asks the service's own routes and fills the templates that the page carries.

const $ = (id) => document.getElementById(id);
const LANES = 3; // pictures under way at a time
const BIG = 1e6; // bytes; few pictures have as many
const MANY = 4; // pictures: from here on a screen reader hears the sum, not each answer
const TRIES = 6; // of one picture while the service is busy
const ROWS = 20; // classes in a list, at most
const percent = (share, digits = 0) => (share == null ? "–" : `${(100 * share).toFixed(digits)} %`);
const short = (id) => String(id ?? "").slice(0, 8);
const alias = (model) => (model.version.startsWith(model.alias) ? "" : model.alias); // an id is no name
const plural = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const part = (element, name) => element.querySelector(`[data-part="${name}"]`); // as the templates name them
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// ---- asking the service

class Problem extends Error {
  constructor(status, body, after = 0) {
    super(inWords(status, body));
    Object.assign(this, { status, after });
  }
}

function inWords(status, body) {
  if (!status && !body) return "The service does not answer. Is it running, and are you connected?";
  const said = body?.detail || body?.title;
  const number = body?.request_id ? ` (request ${short(body.request_id)})` : "";
  return said ? `${said}${status >= 500 ? number : ""}` : `The service answered with an error, ${status}.`;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Problem(0);
  }
  if (response.ok) return response;
  throw new Problem(response.status, await response.json().catch(() => null), Number(response.headers.get("Retry-After")));
}

const askJson = async (path, options) => (await ask(path, options)).json();

function upload(file, resize, headers, onProgress) { // fetch() tells nothing of an upload's progress
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("file", file, file.name || "pasted.png");
    request.open("POST", `predict?top_k=${Math.min(5, facts.classes.length)}&explain=true&resize=${resize}`);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => fail(new Problem(0, file.size > BIG && {
      detail: `The connection broke. The file has ${(file.size / 1e6).toFixed(0)} MB, which may be too much.`,
    }));
    request.onload = () => request.status === 200
      ? done(request.response)
      : fail(new Problem(request.status, request.response, Number(request.getResponseHeader("Retry-After"))));
    request.send(form);
  });
}

let asking = null; // the key dialog, while it is open

async function withKey(call, needed = true) { // call(headers); nothing if the person would not give a key
  for (let refused = ""; ; needed = true) {
    let key = sessionStorage.getItem("key");
    if (!key && needed) {
      asking ??= askKey(refused).finally(() => (asking = null));
      key = await asking;
      if (!key) return null;
      sessionStorage.setItem("key", key);
    }
    try {
      return await call(key ? { Authorization: `Bearer ${key}` } : {});
    } catch (problem) {
      if (problem.status !== 401) throw problem;
      if (sessionStorage.getItem("key") === key) sessionStorage.removeItem("key");
      refused = key ? "This key is not accepted." : "";
    }
  }
}

function askKey(refused) {
  const dialog = $("key-dialog");
  $("key").value = dialog.returnValue = "";
  $("key-message").textContent = refused;
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () =>
    done(dialog.returnValue === "use" ? $("key").value.trim() : ""), { once: true }));
}

// ---- what the page knows of the model that answers

let facts = { words: {}, classes: [], limits: {}, examples: [], tile_size: 64, metres: 0, scales: false, version: "" };
const classOf = (name) => facts.classes.find((one) => one.name === name) ?? { name, title: name, colour: "#8c8c8c" };

async function readFacts() {
  facts = await askJson("page/model.json");
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = facts.words[element.dataset.word];
  entitle();
  $("scale").hidden = facts.scales;
  $("mosaic").style.setProperty("--columns", Math.min(5, Math.max(2, facts.examples.length)));
  $("mosaic").replaceChildren(...facts.examples.map((example, k) => {
    const button = document.createElement("button");
    const image = Object.assign(new Image(facts.tile_size, facts.tile_size), { src: example.src, alt: "" });
    button.title = classOf(example.label).title;
    button.setAttribute("aria-label", `Example ${k + 1}: ${button.title}`);
    button.append(image);
    button.addEventListener("click", () => useExample(example));
    return button;
  }));
  $("examples").hidden = !facts.examples.length;
  $("legend").replaceChildren(...facts.classes.map((one) => swatch(document.createElement("li"), one)));
}

async function useExample(example) {
  try {
    const picture = await (await ask(example.src)).blob();
    classify([new File([picture], `example, ${classOf(example.label).title}.png`, { type: "image/png" })]);
  } catch (problem) {
    say(problem.message);
  }
}

function swatch(element, one) {
  const colour = document.createElement("span");
  colour.className = "swatch";
  colour.style.setProperty("--colour", one.colour);
  element.replaceChildren(colour, one.title);
  return element;
}

function bars(list, rows) { // rows: [class, share of the track, words]
  while (list.children.length < rows.length) list.append($("bar").content.cloneNode(true));
  while (list.children.length > rows.length) list.lastElementChild.remove();
  rows.forEach(([one, share, words], k) => {
    const [name, track, value] = list.children[k].children;
    name.textContent = one.title;
    track.firstElementChild.hidden = !share;
    track.firstElementChild.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
    track.firstElementChild.style.setProperty("--colour", one.colour);
    value.textContent = words;
  });
}

const isTile = (image) => image.naturalWidth === facts.tile_size && image.naturalHeight === facts.tile_size;
const say = (words) => ($("live").textContent = words);

// ---- classify

const work = { queue: [], busy: 0 }; // a card's data-state is wait, sure, doubt or failed

function classify(files) {
  const fresh = [...files].map((file) => {
    const card = $("card").content.cloneNode(true).firstElementChild;
    part(card, "file").textContent = part(card, "file").title = file.name || "pasted picture";
    const image = part(card, "image");
    image.onload = () => {
      part(card, "ground").textContent = isTile(image) && facts.metres ? `${facts.metres} m` : "";
      image.classList.toggle("large", image.naturalWidth > image.clientWidth);
    };
    image.onerror = () => (part(card, "blank").hidden = false);
    image.src = URL.createObjectURL(file);
    part(card, "look").addEventListener("click", () => look(card));
    part(card, "wrong").addEventListener("click", () => wrong(card));
    part(card, "again").addEventListener("click", () => start([{ card, file, resize: card.resize }]));
    return { card, file, resize: $("resize").checked };
  });
  $("cards").prepend(...fresh.map(({ card }) => card));
  $("empty").hidden = true;
  $("cards").hidden = $("clear").hidden = false;
  start(fresh);
  if (fresh.length) fresh[0].card.scrollIntoView({ block: "nearest" });
}

function start(jobs) {
  for (const { card } of jobs) busy(card, "Waiting", "It is next in line.");
  work.queue.push(...jobs);
  while (work.busy < LANES && work.queue.length) lane();
}

async function lane() {
  work.busy += 1;
  for (let job; (job = work.queue.shift()); ) {
    await answer(job).catch((problem) => failed(job, problem));
    progress(job.card);
  }
  work.busy -= 1;
}

async function answer({ card, file, resize }) {
  for (let tried = 1; ; tried++) {
    try {
      const sent = (share) =>
        busy(card, "Sending", share < 1 ? `${Math.floor(100 * share)} % is there.` : "It is there and being read.", share);
      const heard = await withKey((headers) => upload(file, resize, headers, sent), false);
      if (!heard) throw new Problem(401, { detail: "This service answers only those who have a key." });
      return show(card, heard);
    } catch (problem) {
      if (![429, 503].includes(problem.status) || !problem.after || tried === TRIES) throw problem;
      busy(card, "Busy", `The service has much to do; next try in ${problem.after} s.`);
      await wait(1000 * problem.after * (1 + Math.random() / 4));
    }
  }
}

function busy(card, tag, words, share = null) {
  card.dataset.state = "wait";
  card.setAttribute("aria-busy", "true");
  verdict(card, [["busy", tag]], words);
  part(card, "progress").hidden = false;
  if (share === null) part(card, "progress").removeAttribute("value");
  else part(card, "progress").value = share;
  for (const name of ["look", "wrong", "again"]) part(card, name).hidden = true;
}

function settle(card, state) {
  card.dataset.state = state;
  card.removeAttribute("aria-busy");
  part(card, "progress").hidden = true;
}

function verdict(card, tags, words) {
  part(card, "tags").replaceChildren(...tags.map(([kind, text]) =>
    Object.assign(document.createElement("span"), { className: `tag ${kind}`, textContent: text })));
  part(card, "verdict").textContent = words;
}

function show(card, heard) {
  const [one, sure] = [classOf(heard.label), !heard.uncertain && !heard.unfamiliar];
  card.heard = heard;
  settle(card, sure ? "sure" : "doubt");
  swatch(part(card, "name"), one);
  part(card, "confidence").textContent = certainty(heard.confidence);
  part(card, "image").alt = `The picture, ${one.title}`;
  const limit = `the ${percent(facts.limits.confidence)} that it asks of itself`;
  const words = heard.unfamiliar && heard.uncertain ? `Unlike the ${facts.words.one}s it learned from, and below ${limit}: do not rely on it.`
    : heard.unfamiliar ? `Unlike the ${facts.words.one}s this model learned from: its answer may mean nothing.`
    : heard.uncertain ? `Its best guess is below ${limit}. Look for yourself.`
    : one.about && `${one.about}.`;
  const tags = [heard.unfamiliar && ["strange", "Unfamiliar"], heard.uncertain && ["unsure", "Not sure"], sure && ["sure", "Sure"]];
  verdict(card, tags.filter(Boolean), words);
  bars(part(card, "bars"), heard.top.map(({ label, probability }) => [classOf(label), probability, certainty(probability)]));
  part(card, "look").hidden = !heard.explanation;
  part(card, "wrong").hidden = heard.journal_id == null;
  part(card, "done").textContent = "";
  card.said = `${one.title}, ${certainty(heard.confidence)}. ${tags.filter(Boolean).map(([, text]) => text).join(", ")}. ${words}`;
}

const certainty = (p) => (p >= 0.9995 ? "> 99.9 %" : p < 0.0005 ? "< 0.1 %" : percent(p, p > 0.99 || p < 0.01 ? 1 : 0));

function failed({ card }, problem) {
  const image = part(card, "image");
  const other = image.naturalWidth > 0 && !isTile(image);
  settle(card, "failed");
  card.resize = other;
  part(card, "name").textContent = "No answer";
  const file = part(card, "file").textContent;
  verdict(card, [["failed", "Not answered"]], problem.message.replace(`${file}: `, ""));
  bars(part(card, "bars"), []);
  part(card, "again").textContent = other ? `Scale it to ${facts.tile_size} px and try again` : "Try again";
  part(card, "again").hidden = false;
  card.said = `${file}: no answer. ${part(card, "verdict").textContent}`;
}

function progress(card) {
  if (!card.isConnected) return; // cleared meanwhile
  const all = $("cards").children.length;
  const [sure, doubt, failed] = ["sure", "doubt", "failed"].map((state) =>
    $("cards").querySelectorAll(`[data-state="${state}"]`).length);
  const done = sure + doubt + failed;
  const parts = [sure && `${sure} sure`, doubt && `${doubt} to look at`, failed && `${failed} without an answer`].filter(Boolean);
  $("summary").textContent = done < all ? `${done} of ${plural(all, "picture")}` : `${plural(all, "picture")}: ${parts.join(", ")}`;
  $("overall").hidden = done === all || all < MANY;
  $("overall").max = all;
  $("overall").value = done;
  if (all < MANY) say(card.said);
  else if (done === all) say($("summary").textContent);
}

function clear() {
  for (const image of $("cards").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  work.queue = [];
  $("cards").replaceChildren();
  $("cards").hidden = $("clear").hidden = $("overall").hidden = true;
  $("empty").hidden = false;
  $("summary").textContent = "";
  $("files").focus();
}

// ---- what part decided: orange spoke for the answer, blue against it; the scale is the same for every picture

function look(card) {
  const [canvas, button] = [part(card, "heat"), part(card, "look")];
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  canvas.hidden = !on;
  if (on) paint(canvas, card.heard.explanation, part(card, "image"));
  part(card, "done").textContent = on ? partInWords(card.heard) : "";
}

function paint(canvas, rows, { naturalWidth, naturalHeight }) {
  const [pen, size] = [canvas.getContext("2d"), rows.length];
  const picture = pen.createImageData(size, size);
  rows.flat().forEach((value, k) => {
    const colour = value > 0 ? [240, 84, 30] : [47, 107, 216];
    picture.data.set([...colour, 170 * Math.min(1, Math.sqrt(Math.abs(value) / 0.5))], 4 * k);
  });
  const [square, ratio] = [new OffscreenCanvas(size, size), naturalWidth / naturalHeight || 1]; // the model saw a square
  square.getContext("2d").putImageData(picture, 0, 0);
  canvas.width = Math.round(size * Math.max(1, ratio));
  canvas.height = Math.round(size * Math.max(1, 1 / ratio));
  pen.drawImage(square, 0, 0, canvas.width, canvas.height);
}

function partInWords({ explanation, label }) {
  const most = explanation.flat().reduce((a, b) => Math.max(a, b), 0);
  if (most < 0.02) return "No single part decided: cover any of them and the answer stays.";
  return `Cover the orange part, and ${classOf(label).title} loses about ${Math.round(100 * most)} points.`;
}

// ---- wrong? tell us

let judged = null;

function wrong(card) {
  judged = card;
  $("wrong-said").textContent = classOf(card.heard.label).title;
  $("wrong-message").textContent = "";
  $("choices").replaceChildren(...facts.classes.filter(({ name }) => name !== card.heard.label).map((one) => {
    const button = swatch(document.createElement("button"), one);
    button.type = "button";
    button.addEventListener("click", () => tell(one));
    return button;
  }));
  $("wrong-dialog").showModal();
}

async function tell(one) {
  try {
    const body = JSON.stringify({ request_id: judged.heard.request_id, journal_id: judged.heard.journal_id, label: one.name });
    const type = { "Content-Type": "application/json" };
    await withKey((headers) => ask("feedback", { method: "POST", headers: { ...type, ...headers }, body }), false);
  } catch (problem) {
    $("wrong-message").textContent = problem.message;
    return;
  }
  $("wrong-dialog").close();
  part(judged, "done").textContent = `Thank you: noted as ${one.title}.`;
  part(judged, "wrong").hidden = true;
  part(judged, "done").focus();
}

// ---- models

async function showModels() {
  const { active, models } = await askJson("models");
  const all = models.some(({ version }) => version === active.version) ? models : [active, ...models];
  const parts = all.flatMap(({ metrics }) => Object.values(metrics ?? {}));
  const low = Math.max(0, Math.floor(10 * Math.min(0.9, ...parts.map(({ accuracy }) => accuracy.low))) / 10);
  $("models").replaceChildren(...all.map((model) => modelCard(model, model.version === active.version, low)));
  $("models-note").textContent = "";
}

function modelCard(model, active, low) {
  const card = $("model").content.cloneNode(true).firstElementChild;
  const at = (name) => part(card, name);
  card.toggleAttribute("data-active", active);
  at("name").textContent = model.arch ?? `Model ${short(model.version)}`;
  const names = [alias(model), model.role === "primary" ? "" : model.role].filter(Boolean);
  at("alias").textContent = names.join(", ");
  at("alias").hidden = !names.length;
  at("active").hidden = !active;
  at("version").textContent = short(model.version);
  at("version").title = model.version;
  at("data").textContent = model.data ?? "not said";
  at("created").textContent = model.created ? model.created.slice(0, 10) : "not said";
  at("precision").textContent = model.precision ?? "not said";
  at("scores").replaceChildren(...Object.entries(model.metrics ?? {}).map(([name, found]) => score(name, found, low)));
  const known = model.classes ?? [];
  at("chips").replaceChildren(...known.slice(0, ROWS).map((name) => swatch(document.createElement("li"), classOf(name))));
  if (known.length > ROWS) at("chips").append(Object.assign(document.createElement("li"), { textContent: `and ${known.length - ROWS} more` }));
  at("use").hidden = active;
  at("use").setAttribute("aria-label", `Use model ${at("name").textContent} ${short(model.version)}`);
  at("use").addEventListener("click", () => activate(model.version, at("use"), at("status")));
  return card;
}

function score(name, { n, accuracy, macro_f1, ece }, low) {
  const row = $("score").content.cloneNode(true).firstElementChild;
  const at = (key) => part(row, key);
  const place = (value) => `${(100 * (value - low)) / (1 - low)}%`;
  const f1 = macro_f1?.value ?? macro_f1;
  at("name").textContent = `${name[0].toUpperCase()}${name.slice(1)}, ${plural(n, facts.words.one ?? "tile")}`;
  at("value").textContent = `${percent(accuracy.value, 2)} right`;
  at("from").textContent = percent(low);
  at("interval").textContent = `95 % interval ${percent(accuracy.low, 2)} to ${percent(accuracy.high, 2)}`;
  at("rest").textContent = [f1 != null && `macro F1 ${percent(f1, 2)}`, ece != null && `calibration error ${ece.toFixed(4)}`]
    .filter(Boolean).join(" · ");
  for (const key of ["value", "low", "high"]) at("line").style.setProperty(`--${key}`, place(accuracy[key]));
  return row;
}

async function activate(version, button, status) {
  button.disabled = true;
  status.textContent = "It is loaded, verified and warmed up; the old one answers meanwhile.";
  try {
    const done = await withKey((headers) => askJson(`models/${version}/activate`, { method: "POST", headers }));
    status.textContent = "";
    if (done) {
      await Promise.all([readFacts(), showModels(), showServing()]);
      say(`Model ${short(version)} answers now.`);
      document.querySelector("[data-active] h2").focus();
    }
  } catch (problem) {
    status.textContent = `Not switched: ${problem.message}`;
  }
  button.disabled = false;
}

// ---- status

const DRIFT = { labels: "Classes", confidence: "How sure it is", brightness: "How bright" };
const history = []; // of the last two minutes: [time, requests]

async function showStatus() {
  let stats;
  try {
    stats = await askJson("stats");
  } catch (problem) {
    $("status-note").textContent = problem.message;
    return;
  }
  const figures = {
    requests: stats.requests.toLocaleString("en"),
    p50: milliseconds(stats.p50_ms),
    p99: milliseconds(stats.p99_ms),
    uncertain: percent(stats.uncertain_share, 1),
    unfamiliar: percent(stats.unfamiliar_share, 1),
    lag: plural(stats.journal_lag ?? 0, "entry", "entries"),
  };
  for (const [name, words] of Object.entries(figures)) $(`stat-${name}`).textContent = words;
  const counts = Object.entries(stats.class_counts).sort((a, b) => b[1] - a[1]);
  const most = Math.max(1, ...counts.map(([, n]) => n));
  const rows = counts.slice(0, ROWS).map(([name, n]) => [classOf(name), n / most, n.toLocaleString("en")]);
  const rest = counts.slice(ROWS).reduce((sum, [, n]) => sum + n, 0);
  if (counts.length > ROWS) rows.push([{ title: `${counts.length - ROWS} more classes`, colour: "" }, rest / most, rest.toLocaleString("en")]);
  bars($("counts"), rows);
  $("counts-none").hidden = counts.some(([, n]) => n > 0);
  bars($("drift"), Object.entries(stats.drift).map(([test, far]) => {
    const [words, colour] = far == null ? ["too few yet", ""] : far < 0.1 ? [`${far.toFixed(2)} steady`, "var(--sure)"]
      : far < 0.25 ? [`${far.toFixed(2)} look`, "var(--unsure)"] : [`${far.toFixed(2)} changed`, "var(--strange)"];
    return [{ title: DRIFT[test] ?? test, colour }, far == null ? 0 : Math.min(1, far / 0.5), words];
  }));
  history.push([performance.now() / 1000, stats.requests]);
  while (history.length > 61) history.shift();
  spark();
  $("status-note").textContent = `Updated ${new Date().toLocaleTimeString("en-GB")}`;
}

const milliseconds = (ms) => (ms == null ? "–" : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);

function spark() {
  const rates = history.slice(1).map(([time, n], k) => Math.max(0, n - history[k][1]) / (time - history[k][0]));
  const top = Math.max(1, ...rates);
  const points = rates.map((rate, k) => `${300 - 5 * (rates.length - 1 - k)},${(58 - 54 * (rate / top)).toFixed(1)}`);
  const [area, line] = $("spark").querySelectorAll("path");
  if (points.length > 1) {
    line.setAttribute("d", `M${points.join("L")}`);
    area.setAttribute("d", `M${points[0].split(",")[0]},58L${points.join("L")}L300,58Z`);
  }
  const now = rates.at(-1);
  $("rate").textContent = now === undefined ? "measuring" : `${now.toFixed(now < 10 ? 1 : 0)} requests/s, at most ${top.toFixed(0)} in two minutes`;
}

async function showServing() {
  try {
    const { model } = await askJson("stats");
    $("serving").textContent = `${alias(model) || "model"} ${short(model.version)}`;
    $("dot").className = "dot up";
    if (facts.version && model.version !== facts.version) await readFacts(); // switched by somebody else
  } catch {
    $("serving").textContent = "no answer";
    $("dot").className = "dot down";
  }
}

async function saveJournal(event) {
  event.preventDefault();
  const chosen = new URLSearchParams([...new FormData($("journal-form"))].filter(([, value]) => value));
  $("journal-note").textContent = "";
  try {
    const response = await withKey((headers) => ask(`journal?${chosen}`, { headers }));
    if (!response) return;
    const link = Object.assign(document.createElement("a"), { download: `journal.${chosen.get("format")}` });
    link.href = URL.createObjectURL(await response.blob());
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (problem) {
    $("journal-note").textContent = problem.message;
  }
}

// ---- views, and how pictures come in

const VIEWS = { classify: null, models: showModels, status: showStatus };
const current = () => document.querySelector(".view:not([hidden])").dataset.view;

function entitle() {
  const [view, { brand, kind }] = [document.querySelector(".view:not([hidden]) h1").textContent, facts.words];
  document.title = brand ? `${view} · ${brand} ${kind}` : view;
}

function turnTo(name) {
  if (!(name in VIEWS)) return;
  for (const view of document.querySelectorAll(".view")) view.hidden = view.dataset.view !== name;
  for (const link of document.querySelectorAll("nav a"))
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  entitle();
  VIEWS[name]?.().catch((problem) => ($(`${name}-note`).textContent = problem.message));
}

addEventListener("hashchange", () => {
  turnTo(location.hash.slice(1));
  scrollTo(0, 0);
});
addEventListener("paste", (event) => event.clipboardData.files.length && classify(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
for (const name of ["dragleave", "drop"]) addEventListener(name, () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) {
    location.hash = "classify";
    classify(event.dataTransfer.files);
  }
});
$("files").addEventListener("change", () => {
  classify($("files").files);
  $("files").value = "";
});
$("clear").addEventListener("click", clear);
$("journal-form").addEventListener("submit", saveJournal);
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("wrong-cancel").addEventListener("click", () => $("wrong-dialog").close());
setInterval(() => document.visibilityState === "visible" && (current() === "status" ? showStatus() : null), 2000);
setInterval(() => document.visibilityState === "visible" && showServing(), 10_000);

await readFacts().catch((problem) => say(problem.message));
turnTo(location.hash.slice(1) || "classify");
showServing();
