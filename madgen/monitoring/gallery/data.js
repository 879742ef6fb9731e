"use strict";
// JSON blocks by id; those of samples arrive while the page is still loading.

const byId = (id) => document.getElementById(id);
const block = (id) => { const found = byId(id); return found && JSON.parse(found.textContent); };
const { samples, scores: scoreNames } = block("index");
const details = (at) => block("s" + at);
const grouped = (value) => value.toLocaleString("en");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Call `attempt` until it returns true or the page has loaded, to wait for a block.
function arriving(attempt) {
  if (attempt() || document.readyState !== "loading") return;
  setTimeout(() => arriving(attempt), 80);
}
