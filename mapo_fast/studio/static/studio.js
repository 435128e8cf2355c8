"use strict";

const id = (name) => document.getElementById(name);
const steps = ["pictures", "vote", "train"];
const tab = crypto.randomUUID();
let token = "", pair = null, voting = false, line = Promise.resolve(), since = 0, waiting = 0;

function say(text) { id("said").textContent = text; }

function make(tag, text, parent) {
  const node = document.createElement(tag);
  node.textContent = text;
  parent.append(node);
  return node;
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", body: JSON.stringify(body),
    headers: { "content-type": "application/json", "x-studio-token": token },
  };
  let answer;
  try { answer = await fetch(path, options); } catch {
    throw new Error("the studio has ended: start mapo-fast studio again; your votes are kept");
  }
  const text = await answer.text();
  let value;
  try { value = JSON.parse(text); } catch { throw new Error(text.slice(0, 200)); }
  if (!answer.ok) throw new Error(value.error);
  return value;
}

const source = (picture, width) => `/picture/${encodeURIComponent(picture)}?width=${width}`;

// --- Pictures ---

function summary(state) {
  id("name").textContent = state.name;
  document.title = `${state.name} – Studio`;
  const reading = state.seen === null ? "" : `Reading: ${state.seen} files so far. `;
  const alone = state.single ? ` ${state.single} have one picture only: a vote needs two of one prompt.` : "";
  const kept = state.kept ? ` ${state.kept} prompts are kept from votes for the comparison after training.` : "";
  if (state.trouble) say(state.trouble);
  id("scan").disabled = state.seen !== null;
  id("summary").textContent = `${reading}${state.pictures} pictures of ${state.prompts} prompts.`
    + alone + kept + (state.network && ` ${state.network}`);
}

function thumbnails(ids, parent) {
  const row = make("div", "", parent);
  row.className = "row";
  for (const one of ids) {
    const image = make("img", "", row);
    image.loading = "lazy";
    image.alt = "";
    image.src = source(one, 256);
  }
}

function askedForm(one, parent) {
  const form = make("form", "", parent);
  form.dataset.id = one.id;
  thumbnails([one.id], form);
  make("span", `${one.file}: ${one.why}`, form);
  const input = make("input", "", form);
  input.setAttribute("aria-label", `Prompt of ${one.file}`);
  input.maxLength = 10000;
  make("button", "Keep", form).type = "submit";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(async () => showPictures(await ask("/api/prompt", { ids: [one.id], prompt: input.value })));
  });
}

// Forms that are still asked stay as they are: somebody may be typing in one.
function showAsked(asked) {
  const forms = id("asked");
  id("asked-title").hidden = !asked.length;
  const wanted = new Set(asked.map((one) => String(one.id)));
  for (const form of [...forms.children]) if (!wanted.has(form.dataset.id)) form.remove();
  const there = new Set([...forms.children].map((form) => form.dataset.id));
  for (const one of asked) if (!there.has(String(one.id))) askedForm(one, forms);
}

function showPictures(state) {
  summary(state);
  const groups = id("groups"), problems = id("problems");
  groups.replaceChildren(); problems.replaceChildren();
  showAsked(state.asked);
  for (const group of state.groups) {
    make("h3", `${group.prompt} (${group.size})`, groups);
    thumbnails(group.ids, groups);
  }
  if (state.missing && state.seen === null) {
    make("p", `Before you can vote: ${state.missing}. Files of A1111 and ComfyUI hold their prompt; others take it `
      + "from a .txt file beside them.", groups);
  }
  if (state.unusable.length) make("h3", "Files that cannot be shown", problems);
  for (const one of state.unusable) make("p", `${one.file}: ${one.why}`, problems);
}

id("scan").addEventListener("click", () => run(async () => {
  showPictures(await ask("/api/scan", {}));
  lookAgain();
}));

// --- Vote ---

const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", ArrowUp: "both_bad" };

function showPair(state) {
  pair = state.pair;
  summary(state);
  const box = id("pair");
  box.className = "";
  box.hidden = !pair;
  id("empty").hidden = Boolean(pair);
  id("empty").textContent = state.votes ? "Every pair is voted on." : "There is no pair to vote on yet: see Pictures.";
  for (const button of id("answers").children) button.disabled = !pair && button.dataset.key !== "Backspace";
  const agreed = state.repeated ? ` You agreed with yourself in ${state.same} of ${state.repeated} repeated votes.` : "";
  id("count").textContent = `${state.votes} votes, ${state.decided} for one of the two.` + agreed;
  id("prompt").textContent = pair ? pair.prompt : "";
  if (pair) for (const side of ["left", "right"]) id(side).firstElementChild.src = source(pair[side], 1024);
  since = performance.now();
  for (const one of state.ahead) new Image().src = source(one, 1024);
}

function press(key) {
  if (voting) return;  // the next pair is not there yet, so the key is not meant for it
  const box = id("pair");
  if (key === "Backspace") tell("/api/undo", { tab });
  else if (key === "+") box.classList.toggle("zoomed");
  else if (key === " ") {
    const first = !box.classList.contains("flipped");
    box.classList.add("flipped");
    id("left").classList.toggle("behind", first ? false : !id("left").classList.contains("behind"));
    id("right").classList.toggle("behind", !id("left").classList.contains("behind"));
  } else if (pair && keys[key]) {
    const vote = { tab, pair: pair.id, answer: keys[key], seconds: (performance.now() - since) / 1000 };
    for (const side of ["left", "right"]) id(side).classList.remove("behind");
    tell("/api/vote", vote);
  }
}

function tell(path, body) {
  voting = true;
  run(async () => {
    try { showPair(await ask(path, body)); } catch (error) {
      showPair(await ask(`/api/pair?tab=${tab}`));
      throw error;
    } finally { voting = false; }
  });
}

document.addEventListener("keydown", (event) => {
  if (id("vote").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  if (!(event.key in keys) && !["Backspace", " ", "+"].includes(event.key)) return;
  if (event.key === " " && event.target.closest?.("a, button:not(.picture)")) return;
  event.preventDefault();
  press(event.key);
});
for (const button of id("answers").children) button.addEventListener("click", () => press(button.dataset.key));
id("left").addEventListener("click", () => press("ArrowLeft"));
id("right").addEventListener("click", () => press("ArrowRight"));

// --- Train ---

function showTrain(state) {
  summary(state);
  id("enough").textContent = `${state.decided} votes are for one of the two pictures. `
    + "The majority decides a pair; ties and «both bad» are left out.";
  id("write").disabled = !state.decided;
}

id("write").addEventListener("click", () => run(async () => {
  const made = await ask("/api/pairs", {});
  id("written").textContent = `${made.pairs} pairs are written. Train on them with your model:`;
  const warnings = id("warnings");
  warnings.replaceChildren();
  for (const one of made.warnings) make("p", `Note: ${one}`, warnings);
  id("command").textContent = made.command;
  id("command").hidden = false;
}));

// --- Steps ---

// One after the other, and nothing is left out.
function after(work) { line = line.then(work).catch((error) => say(error.message)); }
function run(work) { after(() => { say(""); return work(); }); }

async function show() {
  const step = steps.includes(location.hash.slice(1)) ? location.hash.slice(1) : steps[0];
  for (const name of steps) {
    id(name).hidden = name !== step;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === step) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  const state = await ask("/api/state");
  token = state.token;
  if (step === "pictures") showPictures(await ask("/api/pictures"));
  if (step === "vote") showPair(await ask(`/api/pair?tab=${tab}`));
  if (step === "train") showTrain(state);
  if (state.seen !== null) lookAgain();
}

// While the folder is read. Not in a vote, which would lose its zoom and its clock.
function lookAgain() {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (id("vote").hidden) after(show); }, 700);
}

addEventListener("hashchange", () => run(show));
run(show);
