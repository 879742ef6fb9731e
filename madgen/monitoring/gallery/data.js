"use strict";
// What the page holds: JSON blocks by id, of which a sample's arrive while the page is still being read.

const byId = (id) => document.getElementById(id);
const block = (id) => { const found = byId(id); return found && JSON.parse(found.textContent); };
const { samples, scores: scoreNames } = block("index");
const details = (at) => block("s" + at);
const grouped = (value) => value.toLocaleString("en");
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Calls `attempt` until it says true, for what waits for a block that has not arrived; never after the page is read.
function arriving(attempt) {
  if (attempt() || document.readyState !== "loading") return;
  setTimeout(() => arriving(attempt), 80);
}
