// The flat view: pan and zoom. `stage` is the viewport, `size` the image in its own pixels.

const flat = (() => {
  const MAX_SCALE = 16;
  const stage = byId("stage"), picture = byId("picture");
  let size = { width: 1, height: 1 }, scale = 1, x = 0, y = 0, fitted = true;

  const minScale = () => Math.min(stage.clientWidth / size.width, stage.clientHeight / size.height);
  const pixel = () => 1 / (devicePixelRatio || 1);
  const held = (offset, length, space) =>
    length <= space ? (space - length) / 2 : clamp(offset, space - length, 0);

  function place() {
    x = held(x, size.width * scale, stage.clientWidth);
    y = held(y, size.height * scale, stage.clientHeight);
    picture.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  }

  function zoom(factor, atX = stage.clientWidth / 2, atY = stage.clientHeight / 2) {
    const wanted = clamp(scale * factor, Math.min(minScale(), pixel()), Math.max(MAX_SCALE, minScale()));
    x = atX - (atX - x) * wanted / scale;
    y = atY - (atY - y) * wanted / scale;
    scale = wanted;
    fitted = scale === minScale();
    place();
  }

  function fit() {
    scale = minScale();
    fitted = true;
    place();
  }

  // Switch between the whole image and one that fills the stage.
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
