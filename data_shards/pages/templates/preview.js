// Decisions about records: kept in the page and, where it allows that, in the browser; exported as
// one JSON object per line in the form that `emoverse build --curation` reads.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const articles = [...document.querySelectorAll("article")];
  const message = document.getElementById("message");
  const storageName = `emoverse-curation-${data.state}`;

  // Text fields are written as they are; lists of phrases have one phrase per line; the rest is JSON.
  const PLAIN = new Set(["utterance", "speaker", "emotion", "reason"]);
  const OPTIONAL = new Set(["emotion", "reason", "expressions"]);
  function toText(field, value) {
    if (value === null) return "";
    if (PLAIN.has(field)) return value;
    return field === "expressions" ? value.join("\n") : JSON.stringify(value);
  }
  function toValue(field, text) {
    if (OPTIONAL.has(field) && text.trim() === "") return null;
    if (PLAIN.has(field)) return text;
    if (field === "expressions") return text.split("\n").map((s) => s.trim()).filter(Boolean);
    return JSON.parse(text.trim() === "" ? "null" : text);
  }

  function addFix(article, field, text) {
    const values = JSON.parse(article.dataset.values);
    const row = document.createElement("div");
    row.className = "fix";
    const select = document.createElement("select");
    select.setAttribute("aria-label", "Field");
    for (const name of data.fields) select.add(new Option(name, name, false, name === field));
    const area = document.createElement("textarea");
    area.setAttribute("aria-label", "New value");
    area.value = text ?? toText(select.value, values[select.value]);
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Remove";
    remove.addEventListener("click", () => { row.remove(); changed(article); });
    select.addEventListener("change", () => {
      area.value = toText(select.value, values[select.value]);
      changed(article);
    });
    area.addEventListener("input", () => changed(article));
    row.append(select, area, remove);
    article.querySelector(".list").append(row);
  }

  function actionOf(article) {
    return article.querySelector("input[type=radio]:checked")?.value ?? "";
  }

  // The lines of one record; throws with the field's name when a value is not JSON.
  function linesOf(article) {
    const action = actionOf(article);
    const key = article.dataset.key;
    const reason = article.querySelector(".why").value.trim();
    if (!action) return [];
    if (action !== "correct") return [{ key, action, reason }];
    return [...article.querySelectorAll(".fix")].map((row) => {
      const field = row.querySelector("select").value;
      try {
        return { key, action, field, value: toValue(field, row.querySelector("textarea").value), reason };
      } catch (error) {
        throw new Error(`${field}: ${error.message}`);
      }
    });
  }

  function check(article) {
    const error = article.querySelector(".error");
    error.textContent = "";
    try {
      const lines = linesOf(article);
      const fields = lines.map((line) => line.field).filter(Boolean);
      if (new Set(fields).size < fields.length) throw new Error("a field is corrected twice");
      if (actionOf(article) === "correct" && !lines.length) throw new Error("nothing is corrected");
      return lines;
    } catch (problem) {
      error.textContent = problem.message;
      return null;
    }
  }

  function changed(article) {
    const action = actionOf(article);
    article.dataset.action = action;
    article.querySelector(".fixes").hidden = action !== "correct";
    check(article);
    summarise();
    try {
      const all = Object.fromEntries(
        articles.map((a) => [a.dataset.key, check(a)]).filter(([, lines]) => lines && lines.length));
      localStorage.setItem(storageName, JSON.stringify(all));
    } catch (problem) {
      message.textContent = `This browser keeps nothing: export before you leave (${problem.name}).`;
    }
  }

  function summarise() {
    document.getElementById("count").textContent = articles.filter(actionOf).length;
    filter();
  }

  function filter() {
    const task = document.getElementById("task").value;
    const open = document.getElementById("open").checked;
    for (const article of articles) {
      const wrongTask = task && !article.dataset.tasks.split(" ").includes(task);
      // A record that is just being decided stays until the filter is set again.
      article.hidden = wrongTask || (open && actionOf(article) && !article.contains(document.activeElement));
    }
  }

  function restore(article, lines) {
    const first = lines[0];
    const radio = article.querySelector(`input[value="${first.action}"]`);
    if (!radio) return;
    radio.checked = true;
    article.querySelector(".why").value = first.reason ?? "";
    for (const line of lines) {
      if (line.action === "correct") addFix(article, line.field, toText(line.field, line.value));
    }
    article.dataset.action = first.action;
    article.querySelector(".fixes").hidden = first.action !== "correct";
  }

  function download() {
    const checked = articles.map(check);
    if (checked.includes(null)) {
      const bad = articles[checked.indexOf(null)];
      message.textContent = `${bad.dataset.key} cannot be exported: see its message.`;
      bad.scrollIntoView({ block: "center" });
      return;
    }
    const lines = checked.flat();
    const text = lines.map((line) => `${JSON.stringify(line)}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = "curation.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
    message.textContent = `${lines.length} lines exported.`;
  }

  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(storageName) ?? "{}");
  } catch (problem) {
    message.textContent = `This browser keeps nothing: export before you leave (${problem.name}).`;
  }
  for (const article of articles) {
    const lines = stored[article.dataset.key] ?? data.before[article.dataset.key];
    if (lines && lines.length) restore(article, lines);
    article.querySelector(".decide").addEventListener("submit", (event) => event.preventDefault());
    article.querySelector(".decide").addEventListener("change", (event) => {
      const begins = event.target.type === "radio" && event.target.value === "correct";
      if (begins && !article.querySelector(".fix")) addFix(article, data.fields[0]);
      changed(article);
    });
    article.querySelector(".why").addEventListener("input", () => changed(article));
    article.querySelector(".more").addEventListener("click", () => {
      const taken = new Set([...article.querySelectorAll(".fix select")].map((s) => s.value));
      addFix(article, data.fields.find((name) => !taken.has(name)) ?? data.fields[0]);
      changed(article);
    });
    article.querySelector(".peak")?.addEventListener("click", (event) => {
      const video = article.querySelector("video");
      video.pause();
      video.currentTime = video.duration * Number(event.target.dataset.share);
    });
  }
  document.getElementById("task").addEventListener("change", filter);
  document.getElementById("open").addEventListener("change", filter);
  document.getElementById("export").addEventListener("click", download);
  summarise();
})();
