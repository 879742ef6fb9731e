// The viewer: one panorama, flat or as a 360° view, with its metadata.

const viewer = (() => {
  const root = byId("viewer"), stage = byId("stage");
  let current = 0, known = null, address = "", around = false, loops = false;

  const view = () => (around && loops ? turn : flat);

  function open(position) {
    const at = grid.matches[position], sample = samples[at];
    current = position;
    known = null;
    byId("where").textContent = grouped(position + 1) + " / " + grouped(grid.matches.length);
    byId("previous").disabled = position === 0;
    byId("next").disabled = position === grid.matches.length - 1;
    if (!root.open) root.showModal();
    byId("key").textContent = sample.key;
    byId("lead").textContent = sample.prompt;
    byId("scores").replaceChildren(...scoreNames.filter(({ name }) => name in sample.scores).map(({ name }) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", sample.scores[name]));
      return pair;
    }));
    byId("command").textContent = "";
    byId("rows").replaceChildren();
    byId("inputs").replaceChildren();
    byId("side").scrollTop = 0;
    byId("note").hidden = true;
    loops = false;
    for (const each of [flat, turn]) { each.clear(); each.show(sample); }
    show();
    arriving(() => current !== position || !root.open || describe(at, sample));
    root.dataset.key = sample.key;
  }

  // Show the data of the sample's block; return false if it has not arrived.
  function describe(at, sample) {
    known = details(at);
    if (!known) return false;
    loops = known.loop;
    byId("command").textContent = known.command;
    byId("rows").replaceChildren(...known.rows.map(row));
    byId("inputs").replaceChildren(...known.inputs.map(input));
    source(known.thumbnail);
    show();
    arriving(() => known?.command !== byId("command").textContent || enlarge(at));
    note(sample);
    fromShard();
    return true;
  }

  function input({ caption, picture }) {
    const figure = element("figure"), image = element("img");
    image.src = picture;
    image.alt = caption;
    figure.append(element("figcaption", "", caption), image);
    return figure;
  }

  function enlarge(at) {
    if (known.preview === null || address.startsWith("blob:")) return true;
    const large = block("f" + at);
    if (large) source(large);
    return Boolean(large);
  }

  function note(sample) {
    const side = Math.min(sample.width, sample.height), held = known.preview;
    byId("note").hidden = held === 0;
    byId("note-text").textContent = (held && held >= side ? "This page holds a compressed copy of the image"
      : held ? `This page holds a copy with a shorter side of ${held} pixels` : "This page holds only the thumbnail") +
      `. The picture itself is ${known.member} in shards/${known.shard}, which this page can show once you open it:`;
  }

  async function fromShard() {
    const mine = known, file = shards.get(mine.shard);
    const found = file && await memberOf(file, mine).catch(() => undefined);
    if (known !== mine) { if (found) URL.revokeObjectURL(found); return; }
    if (found) { byId("note").hidden = true; source(found); }
    else if (file) byId("note-text").textContent = `${mine.shard} does not contain ${mine.member}.`;
  }

  function source(next) {
    if (address.startsWith("blob:")) URL.revokeObjectURL(address);
    address = next;
    flat.source(next);
    turn.source(next);
  }

  function show() {
    const turning = view() === turn;
    byId("around").hidden = !loops;
    byId("around").setAttribute("aria-pressed", turning);
    flat.visible(!turning);
    turn.visible(turning);
    if (!turning) flat.resized();
  }

  function row([name, text]) {
    const line = element("tr"), head = element("th");
    name.split(/(?<=[._])/).forEach((part, at) => head.append(...(at ? [element("wbr")] : []), part));
    head.scope = "row";
    line.append(head, element("td", "", text));
    return line;
  }

  const inside = (event) => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    view().zoom(Math.exp(-clamp(event.deltaY * lines, -240, 240) / 400), ...inside(event));
  }, { passive: false });
  stage.addEventListener("dblclick", (event) => view().toggle(...inside(event)));

  const fingers = new Map();
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    fingers.set(event.pointerId, inside(event));
    stage.setPointerCapture(event.pointerId);
    turn.run(false);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()];
    fingers.set(event.pointerId, inside(event));
    const after = [...fingers.values()];
    const middle = (points, axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length;
    view().move(middle(after, 0) - middle(before, 0), middle(after, 1) - middle(before, 1));
    if (after.length === 2) {
      const span = ([a, b]) => Math.max(Math.hypot(a[0] - b[0], a[1] - b[1]), 1);
      view().zoom(span(after) / span(before), middle(after, 0), middle(after, 1));
    }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    stage.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  new ResizeObserver(() => { if (root.open) view().resized(); }).observe(stage);

  async function copy(id, button) {
    const text = byId(id).textContent;
    let copied = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = element("textarea");
      field.value = text;
      root.append(field);
      field.select();
      copied = document.execCommand("copy");
      field.remove();
      button.focus();
    }
    button.dataset.label ||= button.textContent;
    button.textContent = copied ? "Copied" : "Copying is blocked";
    setTimeout(() => { button.textContent = button.dataset.label; }, 1400);
  }

  const step = (by) => { if (grid.matches[current + by] !== undefined) open(current + by); };
  const actions = {
    previous: () => step(-1), next: () => step(1),
    in: () => view().zoom(1.4), out: () => view().zoom(1 / 1.4), fit: () => view().toggle(), actual: () => view().actual(),
    around: () => { around = !around; show(); stage.focus({ preventScroll: true }); }, close: () => root.close(),
    "copy-key": () => copy("key", byId("copy-key")), "copy-command": () => copy("command", byId("copy-command")),
  };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  byId("shards").addEventListener("change", (event) => {
    for (const file of event.target.files) shards.set(file.name, file);
    if (known) fromShard();
  });

  const keys = {
    ArrowLeft: actions.previous, ArrowRight: actions.next, "+": actions.in, "=": actions.in, "-": actions.out,
    0: actions.fit, 1: actions.actual, 3: () => { if (loops) actions.around(); },
    c: actions["copy-key"], r: actions["copy-command"],
  };
  const moves = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  document.addEventListener("keydown", (event) => {  // a disabled button loses the focus to the document
    if (!root.open || byId("keys").open || event.ctrlKey || event.metaKey || event.altKey) return;
    const turning = event.key === " " && view() === turn && event.target.tagName !== "BUTTON";
    if (event.shiftKey && moves[event.key]) view().move(...moves[event.key]);
    else if (turning) turn.run();
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
  root.addEventListener("close", () => {
    fingers.clear();
    known = null;
    flat.clear();
    turn.clear();
    source("data:,");
    grid.focus(current);
  });

  return { open };
})();
