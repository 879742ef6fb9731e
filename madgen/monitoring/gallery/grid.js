// The list. Only cards near the viewport exist, at fixed positions, and the active one, to keep the focus.

const grid = (() => {
  const GAP = 20, LINE = 22, AHEAD = 700;
  const root = byId("grid");
  const cards = new Map();  // position in `matches` -> cell
  const ratios = samples.map((sample) => sample.width / sample.height).sort((a, b) => a - b);
  const ratio = ratios[ratios.length >> 1];
  const longest = Math.max(...samples.map((sample) => sample.prompt.length));
  let matches = [], active = 0, columns = 1, width = 0, frameHeight = 0, step = 0, shownScore = "";

  function measure() {
    const whole = root.clientWidth;
    columns = Math.max(1, Math.floor((whole + GAP) / (clamp(ratio * 96, 150, 480) + GAP)));
    width = (whole - GAP * (columns - 1)) / columns;
    frameHeight = Math.round(Math.min(width / ratio, ratio < 1 ? 340 : 200));
    step = frameHeight + 38 + LINE * (longest * 8 > width ? 2 : 1) + GAP;  // pixels; at most 8 per letter
    root.style.height = Math.max(Math.ceil(matches.length / columns) * step - GAP, 0) + "px";
  }

  function fill(frame, at) {
    const found = details(at);
    if (!found) return false;
    const image = element("img");
    image.alt = "";
    image.decoding = "async";
    image.draggable = false;
    image.src = found.thumbnail;
    frame.append(image, ...(found.loop ? [element("span", "badge", "360°")] : []));
    return true;
  }

  function put(position) {
    if (cards.has(position)) return;
    const at = matches[position], sample = samples[at], scale = Math.min(width / sample.width, frameHeight / sample.height);
    const cell = element("div", "cell"), button = element("button", "card"), frame = element("span", "frame");
    const foot = element("span", "foot");
    cell.role = "listitem";
    cell.ariaSetSize = matches.length;
    cell.ariaPosInSet = position + 1;
    Object.assign(cell.style, { width: width + "px", height: step - GAP + "px" });
    cell.style.transform =
      `translate(${(position % columns) * (width + GAP)}px, ${Math.floor(position / columns) * step}px)`;
    button.type = "button";
    button.tabIndex = position === active ? 0 : -1;
    const height = sample.height * scale;
    Object.assign(frame.style,
      { width: sample.width * scale + "px", height: height + "px", marginTop: frameHeight - height + "px" });
    foot.append(element("span", "name", sample.key));
    const score = sample.scores[shownScore];
    if (score !== undefined) foot.append(element("span", "", `${shownScore} ${score}`));
    button.append(frame, element("span", "prompt", sample.prompt), foot);
    button.addEventListener("click", () => viewer.open(position));
    button.addEventListener("focus", () => activate(position));
    cell.append(button);
    const after = [...cards.keys()].filter((other) => other > position);
    root.insertBefore(cell, after.length ? cards.get(Math.min(...after)) : null);
    cards.set(position, cell);
    arriving(() => cards.get(position) !== cell || fill(frame, at));
  }

  function draw() {
    if (!matches.length) return;
    const top = root.getBoundingClientRect().top, rows = (pixels) => Math.floor(pixels / step) * columns;
    const first = clamp(rows(-top - AHEAD), 0, matches.length - 1);
    const last = clamp(rows(innerHeight - top + AHEAD) + columns, first, matches.length);
    for (const [position, cell] of cards) {
      if ((position < first || position >= last) && position !== active) { cell.remove(); cards.delete(position); }
    }
    for (let position = first; position < last; position++) put(position);
    put(active);
  }

  function redraw() {
    const focused = root.contains(document.activeElement);
    measure();
    cards.clear();
    root.replaceChildren();
    draw();
    if (focused && cards.size) cards.get(active).firstChild.focus({ preventScroll: true });
  }

  // Keep the first visible panorama in view when the width changes.
  function resized() {
    const top = root.getBoundingClientRect().top, above = Math.max(-top, 0);
    const first = Math.floor(above / step) * columns, within = (above % step) / step;
    redraw();
    if (top < 0) scrollBy(0, root.getBoundingClientRect().top + (Math.floor(first / columns) + within) * step);
    draw();
  }

  function activate(position) {
    if (position === active) return;
    const before = cards.get(active);
    if (before) before.firstChild.tabIndex = -1;
    active = position;
    put(position);
    cards.get(position).firstChild.tabIndex = 0;
  }

  function focus(position) {
    activate(clamp(position, 0, matches.length - 1));
    const top = root.getBoundingClientRect().top + Math.floor(active / columns) * step;
    const low = document.querySelector(".tools").offsetHeight + 12, high = innerHeight - step;
    if (top < low || top > high) scrollBy(0, top < low ? top - low : top - Math.max(high, low));
    draw();
    cards.get(active).firstChild.focus({ preventScroll: true });
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const page = Math.max(1, Math.floor((innerHeight - 120) / step)) * columns;
    const to = { ArrowLeft: active - 1, ArrowRight: active + 1, ArrowUp: active - columns, ArrowDown: active + columns,
      PageUp: active - page, PageDown: active + page, Home: 0, End: matches.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to < 0 && event.key === "ArrowUp") return;
    focus(to);
  });

  let drawing = false;
  addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  }, { passive: true });
  const fits = () => root.clientWidth === Math.round(width * columns + GAP * (columns - 1));
  new ResizeObserver(() => requestAnimationFrame(() => { if (!fits()) resized(); })).observe(root);
  addEventListener("resize", draw);

  return {
    focus,
    get matches() { return matches; },
    show(found, score) {
      matches = found;
      shownScore = score;
      active = 0;
      redraw();
    },
  };
})();
