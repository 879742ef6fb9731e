// The 360° view: a camera at the axis of a cylinder that the image is wrapped around.
// With radius R = width / 2π and focal length F, column x of the screen sees the angle atan(x / F), and there a pixel of
// the picture is F / (R cos(angle)) high: so each column of the screen is one strip of the picture, scaled.

const turn = (() => {
  const WIDEST = 2 * Math.PI / 3, MAX_SCALE = 16, SPEED = 0.15;
  const stage = byId("stage"), canvas = byId("canvas"), heading = byId("heading"), image = new Image();
  const pen = canvas.getContext("2d", { alpha: false });
  let size = { width: 1, height: 1 }, angle = 0, shift = 0, zoomed = 1, seen = false, asked = false, running = 0;

  const radius = () => size.width / (2 * Math.PI);
  const wide = () => canvas.width / 2 / Math.tan(WIDEST / 2);  // the focal length of the widest view
  const filling = () => Math.max(canvas.height * radius() / size.height, wide());
  const focal = () => Math.max(filling() * zoomed, wide());
  const sharp = () => Math.min(devicePixelRatio || 1, 2);

  function draw() {
    asked = false;
    if (!seen) return;
    const { width, height } = canvas, F = focal(), R = radius(), strip = sharp() > 1 ? 2 : 1;
    const free = Math.max(0, size.height * F / R - height) / 2, turnWidth = image.naturalWidth;
    shift = clamp(shift, -free, free);
    heading.textContent = Math.round(((angle * 180 / Math.PI) % 360 + 360) % 360) % 360 + "°";
    pen.fillStyle = getComputedStyle(stage).backgroundColor;
    pen.fillRect(0, 0, width, height);
    if (!turnWidth) return;
    pen.imageSmoothingQuality = "high";
    const around = (a) => ((a / (2 * Math.PI)) % 1 + 1) % 1 * turnWidth;
    for (let x = 0; x < width; x += strip) {
      const left = Math.atan((x - width / 2) / F), right = Math.atan((x + strip - width / 2) / F);
      const high = size.height * F / (R * Math.cos((left + right) / 2));
      const taken = Math.max((right - left) / (2 * Math.PI) * turnWidth, 0.01);
      const from = Math.min(around(angle + left), turnWidth - taken);
      pen.drawImage(image, from, 0, taken, image.naturalHeight, x, (height - high) / 2 + shift, strip, high);
    }
  }

  function ask() {
    if (!asked) requestAnimationFrame(draw);
    asked = true;
  }

  function resized() {
    canvas.width = Math.max(1, Math.round(stage.clientWidth * sharp()));
    canvas.height = Math.max(1, Math.round(stage.clientHeight * sharp()));
    ask();
  }

  function run(before) {
    running = requestAnimationFrame((now) => {
      angle += SPEED * Math.min(now - before, 100) / 1000;
      ask();
      run(now);
    });
  }

  image.addEventListener("load", ask);
  return {
    resized,
    actual() { zoomed = radius() / filling(); ask(); },
    zoom(factor) {
      zoomed = clamp(zoomed * factor, wide() / filling(), Math.max(1, MAX_SCALE * radius() / filling()));
      ask();
    },
    toggle() { zoomed = zoomed === 1 ? Math.max(wide() / filling(), 0.5) : 1; shift = 0; ask(); },
    move(byX, byY) { angle -= byX * sharp() / focal(); shift += byY * sharp(); ask(); },
    run(yes = !running) {
      cancelAnimationFrame(running);
      running = 0;
      if (yes) run(performance.now());
    },
    show(sample) {
      size = sample;
      angle = Math.PI;
      zoomed = 1;
      shift = 0;
      canvas.setAttribute("aria-label", sample.prompt);
    },
    source(address) { image.src = address; },
    visible(yes) {
      seen = yes;
      canvas.hidden = heading.hidden = !yes;
      if (yes) resized(); else this.run(false);
    },
    clear() { this.run(false); image.removeAttribute("src"); },
  };
})();
