"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = (id) => JSON.parse($(id).textContent);
  const study = data("study");
  const invited = new URLSearchParams(location.search).get("participant") || "";  // an invitation link sets the ID
  const STORE = "madgen-study/" + study.study + "/" + invited;
  const CHOICES = study.ties ? ["first", "second", "same"] : ["first", "second"];

  // Seeded random numbers (mulberry32): a participant keeps the same order and sides after a reload.
  function random(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  function shuffled(seed) {
    const next = random(seed), order = [...study.items];
    for (let at = order.length - 1; at > 0; at--) {
      const other = Math.floor(next() * (at + 1));
      [order[at], order[other]] = [order[other], order[at]];
    }
    return order.map((item) => {
      const [one, two] = item.pictures;
      return { ...item, ...(next() < 0.5 ? { first: one, second: two } : { first: two, second: one }) };
    });
  }

  const entropy = () => crypto.getRandomValues(new Uint32Array(1))[0];
  const newState = () => ({
    participant: invited.slice(0, 64) || "p" + entropy().toString(16).padStart(8, "0"),
    seed: entropy(), started: "", answers: {}, at: 0,
  });

  // State survives a reload; without storage, a note tells participants to answer in one session.
  function loadState() {
    try {
      const saved = JSON.parse(localStorage.getItem(STORE));
      return saved && Number.isInteger(saved.seed) && typeof saved.answers === "object" ? saved : newState();
    } catch {
      return newState();
    }
  }

  function saveState() {
    try {
      localStorage.setItem(STORE, JSON.stringify(state));
    } catch {
      $("unsaved").hidden = false;
    }
  }

  let state = loadState(), items = shuffled(state.seed), shownAt = 0;
  const answered = () => items.filter((item) => state.answers[item.id]).length;

  function show(view) {
    for (const id of ["intro", "comparison", "done"]) $(id).hidden = id !== view;
    window.scrollTo(0, 0);
    $(view).querySelector("h1").focus({ preventScroll: true });
  }

  function showIntro() {
    const several = Object.keys(study.questions).length > 1;
    $("overview").textContent = "You will see " + items.length + " pairs of panoramas, each with a description and " +
      (several ? "one of these questions." : "this question.") + " Look at both images, then choose one.";
    $("hints").replaceChildren(...Object.values(study.questions).flatMap((question) => {
      const term = document.createElement("dt"), hint = document.createElement("dd");
      term.textContent = question.text;
      hint.textContent = question.hint;
      return [term, hint];
    }));
    $("tie-key").hidden = !study.ties;
    $("participant").value = state.participant;
    $("participant").readOnly = invited !== "";
    show("intro");
  }

  function showItem(at) {
    state.at = at;
    saveState();
    const item = items[at], given = state.answers[item.id];
    for (const side of ["first", "second"]) {
      const image = $(side);
      image.onload = () => {
        const ratio = image.naturalWidth / image.naturalHeight;
        image.style.setProperty("--ratio", ratio);
        if (side === "first") $("pair").classList.toggle("tall", ratio < 1);
      };
      image.src = data(item[side]);
    }
    $("question").textContent = study.questions[item.question].text;
    $("prompt").textContent = item.prompt;
    $("position").textContent = at + 1 + " of " + items.length;
    $("progress").max = items.length;
    $("progress").value = answered();
    $("back").disabled = at === 0;
    document.querySelector(".tie").hidden = !study.ties;
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.setAttribute("aria-pressed", String(Boolean(given) && given.choice === button.dataset.choice));
    }
    show("comparison");
    $("announcement").textContent = "Question " + (at + 1) + " of " + items.length;
    shownAt = performance.now();
  }

  function choose(choice) {
    if (!CHOICES.includes(choice)) return;
    const item = items[state.at], seconds = Math.round(performance.now() - shownAt) / 1000;
    state.answers[item.id] = { choice, seconds };
    if (state.at + 1 < items.length) showItem(state.at + 1);
    else showDone();
  }

  function missing() {
    return items.findIndex((item) => !state.answers[item.id]);
  }

  function showDone() {
    state.at = items.length;
    saveState();
    const left = items.length - answered();
    $("thanks").textContent = left ? "Finish early?" : "Thank you!";
    $("status").textContent = left
      ? "You have answered " + answered() + " of " + items.length + " questions."
      : "You have answered all " + items.length + " questions.";
    $("resume").classList.toggle("plain", left === 0);
    $("resume").textContent = left ? "Continue answering" : "Review my answers";
    $("participant-id").textContent = state.participant;
    $("answers").value = exported();
    show("done");
  }

  function exported() {
    const answers = items.flatMap((item, position) => {
      const given = state.answers[item.id];
      return given ? [{ item: item.id, position, first: item.first, second: item.second, ...given }] : [];
    });
    const { participant, seed, started } = state;
    const about = { madgen_study: study.version, study: study.study, participant, seed, started };
    return JSON.stringify({ ...about, finished: answers.length === items.length, answers }, null, 1) + "\n";
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
    link.download = "answers-" + state.participant.replace(/[^A-Za-z0-9_-]/g, "_") + ".json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  async function copy(button) {
    let copied = true;
    try {
      await navigator.clipboard.writeText(exported());
    } catch {
      document.querySelector("details").open = true;
      $("answers").select();
      copied = document.execCommand("copy");
      button.focus();
    }
    button.textContent = copied ? "Copied" : "Please copy the text below";
    $("announcement").textContent = button.textContent;
    setTimeout(() => { button.textContent = "Copy answers"; }, 2500);
  }

  $("start").addEventListener("submit", (event) => {
    event.preventDefault();
    state.participant = $("participant").value.trim() || state.participant;
    state.started = state.started || new Date().toISOString();
    showItem(0);
  });
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  $("back").addEventListener("click", () => showItem(state.at - 1));
  $("stop").addEventListener("click", showDone);
  $("resume").addEventListener("click", () => showItem(Math.max(missing(), 0)));
  $("download").addEventListener("click", download);
  $("copy").addEventListener("click", (event) => copy(event.currentTarget));
  $("next").addEventListener("click", () => {
    if (!confirm("This removes the answers of " + state.participant + " from this browser. Have they been handed over?")) return;
    state = newState();
    items = shuffled(state.seed);
    saveState();
    showIntro();
  });

  const KEYS = {
    1: "first", ArrowUp: "first", ArrowLeft: "first", 2: "second", ArrowDown: "second", ArrowRight: "second", 0: "same",
  };
  document.addEventListener("keydown", (event) => {
    if ($("comparison").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const scrolls = event.key.startsWith("Arrow") && event.target.closest && event.target.closest(".strip");
    if (scrolls || !(event.key in KEYS || event.key === "Backspace")) return;  // arrows scroll a focused image
    event.preventDefault();
    if (event.key !== "Backspace") choose(KEYS[event.key]);
    else if (state.at > 0) showItem(state.at - 1);
  });

  function enlarge() {
    const large = $("pair").classList.toggle("large");
    $("size").setAttribute("aria-pressed", String(large));
    $("size").textContent = large ? "Show whole images" : "Enlarge both";
  }
  for (const id of ["size", "first", "second"]) $(id).addEventListener("click", enlarge);

  // Enlarged images scroll together.
  const strips = [...document.querySelectorAll(".strip")];
  for (const strip of strips) {
    strip.addEventListener("scroll", () => {
      for (const other of strips) if (Math.abs(other.scrollLeft - strip.scrollLeft) > 1) other.scrollLeft = strip.scrollLeft;
    }, { passive: true });
  }

  if (!state.started) showIntro();
  else if (state.at >= items.length) showDone();
  else showItem(state.at);
})();
