"use strict";
// Sorting, filtering, hovering, and the rows of two chosen runs. All text goes through textContent.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// ---- sorting: a click on a heading, a second one turns the order round
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
const compare = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b) : difference;
};
for (const heading of all(".ranked th[aria-sort]")) {
  heading.firstElementChild.addEventListener("click", () => {
    const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
    const down = heading.ariaSort !== "ascending";
    for (const other of all("th[aria-sort]", table)) other.ariaSort = "none";
    heading.ariaSort = down ? "ascending" : "descending";
    const rows = [...body.rows].sort((a, b) => compare(value(a, column), value(b, column)) * (down ? 1 : -1));
    body.append(...rows);
  });
}

// ---- the filter: each word must be in a run's keys, values or verdict
const filter = byId("filter");
const rowsOfRuns = all(".ranked")[0]?.tBodies[0].rows ?? [];
const show = () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const gone = new Set();
  for (const row of rowsOfRuns) {
    const text = row.dataset.filter.toLowerCase();
    if (!words.every((word) => text.includes(word))) gone.add(row.dataset.of);
  }
  for (const element of all("[data-of]")) element.classList.toggle("gone", gone.has(element.dataset.of));
  byId("shown").textContent = gone.size ? `${rowsOfRuns.length - gone.size} of ${rowsOfRuns.length} runs` : "";
};
filter?.addEventListener("input", show);

// ---- hovering or touching a run shows it everywhere
const tip = byId("tip");
for (const title of all("svg title")) { // the browser's own tooltip would come late, and never on a phone
  title.parentElement.dataset.tip = title.textContent;
  title.parentElement.setAttribute("aria-label", title.textContent);
  title.remove();
}
const light = (event) => {
  const of = event.target.closest?.("[data-of]")?.dataset.of;
  document.body.classList.toggle("lit", of !== undefined);
  for (const element of all("[data-of]")) element.classList.toggle("on", element.dataset.of === of);
  const text = event.target.closest?.("[data-tip]")?.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(4, Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 4));
  const top = event.clientY + height + 20 > innerHeight ? event.clientY - height - 12 : event.clientY + 14;
  tip.style.transform = `translate(${left}px, ${top}px)`;
};
document.addEventListener("pointerover", light);
document.addEventListener("pointerdown", light);

// ---- the rows on which two runs differ
const element = (name, text = "", kind = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
};
const data = byId("data") && JSON.parse(byId("data").textContent);
const sample = (row, pair) => {
  const card = element("article", "", "card sample"), text = element("div", "", "text"), list = element("dl");
  if (row.image !== null) {
    const frame = element("div", "", "picture"), image = element("img");
    image.src = data.images[row.image];
    image.alt = "the row's image";
    frame.append(image);
    card.append(frame);
  }
  const question = element("p");
  question.append(element("b", row.question || "(caption)"));
  for (const run of pair) {
    const score = row.scores[run], kind = score >= 1 ? "right" : score <= 0 ? "wrong" : "partly";
    const answer = row.answers[row.given[run]] || "(empty)";
    list.append(element("dt", data.runs[run].name), element("dd", kind === "partly" ? `${answer} (${score})` : answer, kind));
  }
  list.append(element("dt", "reference"), element("dd", row.reference));
  text.append(question, list);
  card.append(text);
  return card;
};
const showRows = () => {
  const pair = [byId("left").value, byId("right").value];
  const differs = ({ scores: { [pair[0]]: a, [pair[1]]: b } }) => a !== null && b !== null && a !== b;
  const rows = data.rows.filter(differs), count = data.counts[pair[0]][pair[1]];
  byId("rows").replaceChildren(...rows.map((row) => sample(row, pair)));
  byId("count").textContent = `Their scores differ on ${count} of ${data.all} rows` + (rows.length < count ? `; ${rows.length} are shown.` : ".");
};
if (data) {
  const other = data.runs.findIndex((run) => run.of !== data.runs[0].of);
  for (const [id, chosen] of [["left", 0], ["right", Math.max(other, 0)]]) {
    const select = byId(id);
    data.runs.forEach((run, number) => select.append(new Option(run.label, number)));
    select.value = chosen;
    select.addEventListener("change", showRows);
  }
  showRows();
}
