// The flat view: the picture as it is, moved and zoomed. `stage` is where, `size` the picture's in its own pixels.

const flat = (() => {
  const MOST = 16;
  const stage = byId("stage"), picture = byId("picture");
  let size = { width: 1, height: 1 }, scale = 1, x = 0, y = 0, fitted = true;

  const least = () => Math.min(stage.clientWidth / size.width, stage.clientHeight / size.height);
  const pixel = () => 1 / (devicePixelRatio || 1);
  const held = (offset, length, room) =>
    length <= room ? (room - length) / 2 : clamp(offset, room - length, 0);

  function place() {
    x = held(x, size.width * scale, stage.clientWidth);
    y = held(y, size.height * scale, stage.clientHeight);
    picture.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  }

  function zoom(factor, atX = stage.clientWidth / 2, atY = stage.clientHeight / 2) {
    const wanted = clamp(scale * factor, Math.min(least(), pixel()), Math.max(MOST, least()));
    x = atX - (atX - x) * wanted / scale;
    y = atY - (atY - y) * wanted / scale;
    scale = wanted;
    fitted = scale === least();
    place();
  }

  function fit() {
    scale = least();
    fitted = true;
    place();
  }

  // From the whole picture to one that fills the stage, from anything else to the whole.
  function toggle(atX, atY) {
    if (!fitted) fit();
    else zoom(Math.max(stage.clientWidth / size.width, stage.clientHeight / size.height) / scale, atX, atY);
  }

  return {
    toggle,
    zoom,
    actual: (atX, atY) => zoom(pixel() / scale, atX, atY),
    move(byX, byY) { x += byX; y += byY; place(); },
    resized() { if (fitted) fit(); else zoom(1); },
    show(sample) {
      size = sample;
      picture.width = sample.width;
      picture.height = sample.height;
      picture.alt = sample.prompt;
      fit();
    },
    source(address) { picture.src = address; },
    visible(yes) { picture.hidden = !yes; },
    clear() { picture.removeAttribute("src"); },
  };
})();
