"use strict";
/* The conversation lives here; the server only holds images, and answers one conversation at a time. */
const find = (id) => document.getElementById(id);
const made = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
let about = null; // what the server said of its models
let exchanges = []; // [{question, images: [{key, width, height}], answers: [text or null, by side]}]
let pending = []; // images of the next question
let uploading = 0;
let running = null; // what aborts the answers under way

/* ------------------------------------------------------------------ small things on the page */

function problem(text) {
  find("problem").textContent = text || "";
  find("problem").hidden = !text;
}

function status(text) {
  find("status").textContent = text;
}

function atEnd() {
  const log = find("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toEnd() {
  find("log").scrollTop = find("log").scrollHeight;
}

function update() {
  find("send").hidden = running !== null;
  find("stop").hidden = running === null;
  find("send").disabled = about === null || uploading > 0;
  find("fresh").disabled = exchanges.length === 0 && running === null;
  const box = find("question");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + 2 + "px";
  find("meaning").textContent =
    Number(find("temperature").value) > 0
      ? "The same seed draws the same answer again."
      : "Temperature 0 always takes the most likely token: the same question gets the same answer.";
}

function picture(image) {
  const element = made("img", image.width < 160 && image.height < 160 ? "small" : "");
  element.src = "images/" + image.key;
  element.alt = image.name + ", " + image.width + " x " + image.height + " pixels";
  return element;
}

/* ------------------------------------------------------------------ images */

async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return "the server answered with status " + response.status;
  }
}

async function upload(file) {
  if (file.size > about.most_upload_bytes)
    return problem(file.name + ": has " + (file.size / 2 ** 20).toFixed(1) + " MiB, above " + about.most_upload_bytes / 2 ** 20 + " MiB");
  uploading += 1;
  update();
  try {
    const response = await fetch("images", { method: "POST", body: file });
    if (!response.ok) throw new Error(await refusal(response));
    pending.push({ ...(await response.json()), name: file.name });
    problem();
    showPending();
    status("Added " + file.name);
  } catch (error) {
    problem(file.name + ": " + (error instanceof TypeError ? "the server can't be reached; is it still running?" : error.message));
  } finally {
    uploading -= 1;
    update();
  }
}

async function add(files) {
  if (about === null) return;
  for (const file of files) await upload(file);
  find("question").focus();
}

function showPending() {
  find("pending").replaceChildren(
    ...pending.map((image, number) => {
      const item = made("li");
      const gone = made("button", "", "\u00d7");
      gone.type = "button";
      gone.setAttribute("aria-label", "Remove " + image.name);
      gone.addEventListener("click", () => {
        pending.splice(number, 1);
        showPending();
        find("question").focus();
      });
      item.append(picture(image), made("span", "", image.width + " \u00d7 " + image.height), gone);
      return item;
    }),
  );
}

/* ------------------------------------------------------------------ asking */

/* What side `number` has said so far, and the new question. A template without turns gets the question alone, with the
   images of the whole conversation. */
function turnsOf(number, asked) {
  const keys = (exchange) => exchange.images.map((image) => image.key);
  if (about.sides[number].refuses_turns)
    return [{ question: asked.question, images: [...exchanges, asked].flatMap(keys).slice(-1) }];
  const before = exchanges.filter((exchange) => exchange.answers[number]);
  const lost = exchanges.filter((exchange) => !exchange.answers[number]).flatMap(keys);
  const turns = before.map((one) => ({ question: one.question, images: keys(one), answer: one.answers[number] }));
  turns.push({ question: asked.question, images: keys(asked) });
  turns[0].images = [...lost, ...turns[0].images]; // an image stays in the conversation, even if no answer came
  return turns;
}

function settings() {
  const wrong = ["temperature", "tokens", "seed"].map(find).find((field) => !field.checkValidity());
  if (wrong) {
    find("settings").open = true;
    wrong.focus();
    throw new Error(find("settings").querySelector("label[for=" + wrong.id + "]").textContent + ": " + wrong.validationMessage);
  }
  const number = (id) => Number(find(id).value);
  return { temperature: number("temperature"), max_new_tokens: number("tokens"), seed: number("seed") };
}

function addAnswer(number) {
  const side = about.sides[number];
  const card = made("article", "card answer running " + (about.sides.length > 1 ? "side" + number : "only"));
  const said = made("p", "said");
  const foot = made("p", "soft", "waiting \u2026");
  card.setAttribute("aria-label", "Answer of " + side.name);
  card.setAttribute("aria-busy", "true");
  card.append(made("h3", "", side.name), said, foot);
  return { card, said, foot, text: "" };
}

function show(shown, text) {
  const follow = atEnd();
  shown.text = text;
  shown.said.textContent = text;
  if (follow) toEnd();
}

function fail(shown, text) {
  shown.card.classList.add("failed");
  shown.said.textContent = (shown.text ? shown.text + "\n\n" : "") + text;
  shown.foot.textContent = "";
}

/* Reads the lines of an answer and shows them. Returns its text; null if there is none. */
async function listen(response, shown) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off; is the server still running?");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((each) => JSON.parse(each))) {
      if (line.waiting) shown.foot.textContent = "waits for the answer on another page \u2026";
      if (line.text !== undefined) show(shown, shown.text + line.text);
      if (line.whole !== undefined) show(shown, line.whole);
      if (line.text !== undefined || line.whole !== undefined) shown.foot.textContent = "writing \u2026";
      if (line.error !== undefined) throw new Error(line.error);
      if (line.done) {
        const { tokens, seconds, cut } = line.done;
        const end = cut ? " \u00b7 cut off at max tokens" : "";
        shown.foot.textContent = tokens + (tokens === 1 ? " token" : " tokens") + " \u00b7 " + seconds.toFixed(1) + " s" + end;
        if (!shown.text) shown.foot.textContent += " \u00b7 an empty answer";
        return shown.text;
      }
    }
  }
}

async function answer(number, asked, options, shown, signal) {
  const body = JSON.stringify({ side: number, turns: turnsOf(number, asked), ...options });
  try {
    signal.throwIfAborted();
    const response = await fetch("ask", { method: "POST", body, signal });
    if (!response.ok) throw new Error(await refusal(response));
    return await listen(response, shown);
  } catch (error) {
    if (signal.aborted) {
      shown.foot.textContent = "stopped";
      return shown.text || null;
    }
    fail(shown, error instanceof TypeError ? "the server can't be reached; is it still running?" : error.message);
    return null;
  } finally {
    shown.card.classList.remove("running");
    shown.card.setAttribute("aria-busy", "false");
  }
}

function addExchange(asked) {
  const section = made("section", "exchange");
  const question = made("div", "asked");
  if (asked.images.length) {
    const images = made("div");
    images.append(...asked.images.map(picture));
    images.querySelectorAll("img").forEach((image) => image.addEventListener("load", toEnd));
    question.append(images);
  }
  if (asked.question) question.append(made("p", "", asked.question));
  const answers = made("div", "answers");
  const shown = about.sides.map((side, number) => addAnswer(number));
  answers.append(...shown.map((each) => each.card));
  section.append(question, answers);
  find("empty").hidden = true;
  find("log").append(section);
  toEnd();
  return shown;
}

function compare(shown, answers) {
  if (answers.length < 2 || answers.includes(null)) return;
  for (const [number, each] of shown.entries())
    if (number) each.foot.textContent += answers[number] === answers[0] ? " \u00b7 same answer" : " \u00b7 another answer";
}

async function ask() {
  if (running !== null || about === null || uploading > 0) return;
  const asked = { question: find("question").value.trim(), images: pending };
  let options = null;
  try {
    options = settings();
    if (asked.question.length > about.most_characters)
      throw new Error("the question has " + asked.question.length + " characters, above " + about.most_characters);
    if (!asked.question && !asked.images.length) throw new Error("ask something, or add an image");
  } catch (error) {
    return problem(error.message);
  }
  problem();
  pending = [];
  showPending();
  find("question").value = "";
  find("settings").open = false;
  const shown = addExchange(asked);
  running = new AbortController();
  const own = running;
  update();
  status("Answering");
  const answers = [];
  for (const [number, each] of shown.entries()) answers.push(await answer(number, asked, options, each, own.signal));
  if (running !== own) return; // a new conversation was started
  compare(shown, answers);
  exchanges.push({ ...asked, answers });
  running = null;
  update();
  status(about.sides.map((side, number) => side.name + ": " + shown[number].said.textContent).join(". "));
}

function stop() {
  if (running !== null) running.abort();
}

function fresh() {
  stop();
  running = null;
  exchanges = [];
  find("log").querySelectorAll(".exchange").forEach((each) => each.remove());
  find("empty").hidden = false;
  problem();
  update();
  find("question").focus();
}

/* ------------------------------------------------------------------ what the user does */

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
find("question").addEventListener("input", update);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (find("settings").open) find("settings").open = false;
  else stop();
});
document.addEventListener("click", (event) => {
  if (!find("settings").contains(event.target)) find("settings").open = false;
});
find("stop").addEventListener("click", stop);
find("fresh").addEventListener("click", fresh);
["pick", "attach"].forEach((id) => find(id).addEventListener("click", () => find("file").click()));
find("file").addEventListener("change", async () => {
  await add([...find("file").files]);
  find("file").value = "";
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    add(files);
  }
});
["dragenter", "dragover"].forEach((kind) =>
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", [...event.dataTransfer.types].includes("Files"));
  }),
);
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files.length) add([...event.dataTransfer.files]);
  else problem("only files can be dropped here; save the image first, or copy and paste it");
});
find("temperature").addEventListener("input", update);

async function start() {
  try {
    const response = await fetch("about");
    if (!response.ok) throw new Error(await refusal(response));
    about = await response.json();
  } catch (error) {
    return problem("the server can't be reached: " + error.message);
  }
  find("temperature").value = about.temperature;
  find("tokens").value = about.max_new_tokens;
  find("seed").value = 0;
  find("title").textContent = about.title;
  document.title = about.title + " \u00b7 vlmtune chat";
  document.body.style.setProperty("--sides", about.sides.length);
  const notes = about.sides.flatMap((side) => [
    ...(side.refuses_turns ? [side.name + ": each question stands alone, with the newest image; " + side.refuses_turns] : []),
    ...(side.needs_image ? [side.name + ": does not answer without an image"] : []),
  ]);
  find("notes").replaceChildren(...notes.map((text) => made("li", "", text)));
  update();
  find("question").focus();
}

update();
start();
