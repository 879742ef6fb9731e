// The page around the list: filter, order, theme, keyboard shortcuts.

(() => {
  const input = byId("filter"), order = byId("order"), theme = byId("theme"), keys = byId("keys");
  const haystack = samples.map((sample) => (sample.prompt + "\n" + sample.key).toLowerCase());

  // Orders by name: the comparison of two samples, and the score to show on cards.
  const orders = { "": { label: "dataset order" }, key: { label: "key", compare: (a, b) => (a.key < b.key ? -1 : 1) },
    prompt: { label: "prompt", compare: (a, b) => a.prompt.localeCompare(b.prompt) } };
  for (const { name, lower } of scoreNames) {
    for (const best of [true, false]) {
      const sign = lower === best ? 1 : -1;
      orders[`${name} ${best ? "best" : "worst"}`] = { label: `${name}, ${best ? "best" : "worst"} first`, score: name,
        compare: ({ scores: a }, { scores: b }) =>  // samples without the score come last
          (name in a) - (name in b) ? (name in b) - (name in a) : sign * (a[name] - b[name]) || 0 };
    }
  }
  order.append(...Object.entries(orders).map(([name, { label }]) => new Option(label, name)));

  function list() {
    const words = input.value.trim().toLowerCase().split(/\s+/), { compare, score } = orders[order.value];
    const found = [];
    haystack.forEach((text, at) => { if (words.every((word) => text.includes(word))) found.push(at); });
    if (compare) found.sort((a, b) => compare(samples[a], samples[b]) || a - b);
    byId("count").textContent =
      found.length < samples.length ? `${grouped(found.length)} of ${grouped(samples.length)}` : grouped(samples.length);
    byId("none").hidden = found.length > 0;
    grid.show(found, score ?? "");
  }

  function top() {
    const end = byId("grid").getBoundingClientRect().top + scrollY - document.querySelector(".tools").offsetHeight - 20;
    if (scrollY > end) scrollTo(0, Math.max(end, 0));
  }

  let pending = 0;
  input.addEventListener("input", () => { clearTimeout(pending); pending = setTimeout(() => { top(); list(); }, 80); });
  order.addEventListener("change", () => { top(); list(); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && grid.matches.length) { event.preventDefault(); grid.focus(0); }
    if (event.key === "Escape" && input.value) { event.preventDefault(); input.value = ""; list(); }
  });

  const actions = {
    "/": () => { input.focus(); input.select(); },
    "?": () => keys.showModal(),
    t: () => {
      const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
        (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
      document.documentElement.dataset.theme = dark ? "light" : "dark";
    },
  };
  theme.addEventListener("click", actions.t);
  byId("help").addEventListener("click", actions["?"]);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open || event.defaultPrevented) return;
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || !actions[event.key]) return;
    if (event.key === "/" && byId("viewer").open) return;
    event.preventDefault();
    actions[event.key]();
  });

  list();
})();
