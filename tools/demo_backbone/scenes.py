"""Procedural landscapes, the training images of the demo backbone.

A `Scene` is a set of attributes; `draw` renders it with NumPy, and `caption` describes a subset of the attributes. An
incomplete caption is ambiguous (time of day, ground), so independent views of a panorama disagree.

Images are float arrays [H, W, 3] in 0..255; y is the row, counted from the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 128  # pixels, a view of the demo backbone
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Time:
    """Light at a time of day: sky colors from zenith to horizon, tint of lit objects, color of the sun."""

    sky: tuple[tuple[int, int, int], ...]
    tint: tuple[float, float, float]
    glow: tuple[int, int, int]


TIMES = {
    "dawn": Time(((112, 148, 206), (226, 190, 206), (255, 222, 190)), (0.92, 0.84, 0.86), (255, 236, 200)),
    "noon": Time(((52, 118, 220), (112, 174, 240), (196, 226, 248)), (1.0, 1.0, 1.0), (255, 250, 225)),
    "sunset": Time(((70, 46, 118), (206, 92, 104), (255, 176, 88)), (0.86, 0.62, 0.58), (255, 214, 130)),
    "night": Time(((7, 10, 32), (17, 25, 64), (44, 58, 108)), (0.26, 0.31, 0.46), (226, 230, 244)),
}
GROUNDS = {
    "meadow": ((74, 148, 52), (112, 178, 72)),
    "desert": ((214, 164, 92), (236, 196, 128)),
    "sea": ((24, 84, 150), (70, 140, 192)),
    "snow": ((226, 234, 246), (250, 252, 255)),
    "lavender": ((112, 66, 158), (158, 112, 204)),
}
FARS = {
    "mountains": (112, 108, 128),
    "hills": (92, 134, 84),
    "dunes": (222, 184, 122),
    "skyline": (78, 82, 100),
    "forest": (38, 84, 58),
}
HORIZONS = {"low": 0.72, "middle": 0.56, "high": 0.40}
TREE = (30, 82, 46)

# Synonyms in captions; the first is the attribute's name.
WORDS = {
    "dawn": ("dawn", "sunrise", "morning"),
    "noon": ("noon", "midday", "day"),
    "sunset": ("sunset", "dusk", "evening"),
    "night": ("night", "midnight"),
    "meadow": ("meadow", "grass", "field"),
    "desert": ("desert", "sand"),
    "sea": ("sea", "ocean", "water"),
    "snow": ("snow", "snowfield", "ice"),
    "lavender": ("lavender",),
    "mountains": ("mountains", "peaks"),
    "hills": ("hills",),
    "dunes": ("dunes",),
    "skyline": ("skyline", "city"),
    "forest": ("forest", "woods"),
    "low": ("low",),
    "middle": ("middle",),
    "high": ("high",),
}
OTHER_WORDS = tuple(
    "a an the of over with and at in on by horizon landscape panorama view sun moon stars clouds trees".split()
)


@dataclass(frozen=True)
class Scene:
    """Attributes of a landscape."""

    time: str
    far: str
    ground: str
    horizon: str
    sun: bool = False
    """A sun, or a moon at night."""
    clouds: bool = False
    stars: bool = False
    trees: bool = False


def vocabulary() -> list[str]:
    """Return all words of captions, sorted."""
    return sorted({word for words in WORDS.values() for word in words} | set(OTHER_WORDS))


def is_held_out(scene: Scene) -> bool:
    """Return whether the combination (time, far layer, ground) is excluded from training, as one in ten is."""
    time, far, ground = list(TIMES).index(scene.time), list(FARS).index(scene.far), list(GROUNDS).index(scene.ground)
    return (time * 5 + far * 3 + ground * 7) % 10 == 4


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw all attributes at random; clouds are rarer at night, since they hide stars."""
    time, far, ground, horizon = (str(rng.choice(list(table))) for table in (TIMES, FARS, GROUNDS, HORIZONS))
    night = time == "night"
    return Scene(
        time,
        far,
        ground,
        horizon,
        sun=bool(rng.random() < 0.5),
        clouds=bool(rng.random() < (0.2 if night else 0.5)),
        stars=night and bool(rng.random() < 0.7),
        trees=ground in ("meadow", "snow", "lavender") and bool(rng.random() < 0.4),
    )


def caption(scene: Scene, rng: np.random.Generator, keep: float = 0.7) -> str:
    """Describe a random subset of the attributes, each with probability `keep`; never an empty string."""

    def word(name: str) -> str:
        return str(rng.choice(WORDS[name])) if rng.random() < 0.35 else name

    def kept() -> bool:
        return bool(rng.random() < keep)

    parts = []
    if kept():
        parts.append(word(scene.far))
    if kept():
        parts.append(f"over {rng.choice(['a', 'the'])} {word(scene.ground)}" if parts else f"a {word(scene.ground)}")
    if not parts:
        parts.append(str(rng.choice(["a landscape", "a panorama", "a landscape panorama", "a view"])))
    if kept():
        parts.append(f"at {word(scene.time)}")
    body = "a moon" if scene.time == "night" else "a sun"
    things = [("clouds", scene.clouds), ("stars", scene.stars), ("trees", scene.trees), (body, scene.sun)]
    named = [name for name, present in things if present and kept()]
    if named:
        parts.append("with " + " and ".join(named))
    text = " ".join(parts)
    return f"{text}, {scene.horizon} horizon" if kept() else text


def draw(scene: Scene, rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Render `scene`, with other details drawn from `rng`. Returns uint8 [height, width, 3]."""
    scale = SUPERSAMPLING
    painter = _Painter(scene, rng, height * scale, width * scale)
    image = painter.paint().reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


class _Painter:
    """Paints a scene at the supersampled size; lengths are in units of a hundredth of the height."""

    def __init__(self, scene: Scene, rng: np.random.Generator, height: int, width: int):
        self.scene, self.rng, self.height, self.width = scene, rng, height, width
        self.unit = height / 100
        self.light = TIMES[scene.time]
        self.tint = np.array(self.light.tint)
        self.horizon = (HORIZONS[scene.horizon] + rng.uniform(-0.025, 0.025)) * height
        self.y, self.x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
        self.haze = np.array(self.light.sky[2], np.float32)
        self.sun_x: float | None = None

    def paint(self) -> np.ndarray:
        self._sky()
        if self.scene.stars:
            self._stars()
        if self.scene.sun:
            self._sun()
        if self.scene.clouds:
            self._clouds()
        {"skyline": self._skyline}.get(self.scene.far, self._ridges)()
        self._ground()
        if self.scene.trees:
            self._trees()
        return self.image

    def _blend(self, color, alpha: np.ndarray) -> None:
        self.image += (np.asarray(color, np.float32) - self.image) * alpha[..., None]

    def _lit(self, color) -> np.ndarray:
        return np.asarray(color, np.float32) * self.tint

    def _waves(self, periods, roughness: float = 0.5) -> np.ndarray:
        """Return a sum of sines over the columns, in -1..1; periods in units."""
        total = np.zeros(self.width, np.float32)
        weight = 0.0
        for octave, period in enumerate(periods):
            stretched = period * self.rng.uniform(0.8, 1.25) * self.unit
            total += roughness**octave * np.sin(2 * np.pi * (self.x[0] / stretched + self.rng.random()))
            weight += roughness**octave
        return total / weight

    def _sky(self) -> None:
        depth = np.clip(self.y[:, 0] / self.horizon, 0, 1)
        stops = np.array(self.light.sky, np.float32)
        rows = np.stack([np.interp(depth, [0, 0.6, 1], stops[:, c]) for c in range(3)], axis=-1)
        self.image = np.repeat(rows[:, None].astype(np.float32), self.width, axis=1)

    def _stars(self) -> None:
        for _ in range(max(1, int(self.rng.integers(10, 18) * self.width / self.height))):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0.02, 0.75) * self.horizon
            self._dot(x, y, self.rng.uniform(0.9, 1.2) * self.unit, (245, 245, 255))

    def _dot(self, x: float, y: float, radius: float, color) -> None:
        reach = int(radius + 2)
        rows = slice(max(0, int(y) - reach), min(self.height, int(y) + reach + 1))
        columns = slice(max(0, int(x) - reach), min(self.width, int(x) + reach + 1))
        distance = np.hypot(self.x[:, columns] - x, self.y[rows] - y)
        alpha = np.clip(radius - distance + 0.5, 0, 1)[..., None]
        self.image[rows, columns] += (np.asarray(color, np.float32) - self.image[rows, columns]) * alpha

    def _sun(self) -> None:
        radius = self.rng.uniform(6.0, 8.0) * self.unit
        self.sun_x = float(self.rng.uniform(radius, self.width - radius))
        y = float(self.rng.uniform(max(radius * 1.3, 0.15 * self.horizon), 0.55 * self.horizon))
        distance = np.hypot(self.x - self.sun_x, self.y - y)
        night = self.scene.time == "night"
        self._blend(self.light.glow, (0.25 if night else 0.5) * np.exp(-((distance / (radius * 2.6)) ** 2)))
        self._dot(self.sun_x, y, radius, self.light.glow)
        if night:  # the dark side of a waxing moon
            self._dot(self.sun_x - 0.55 * radius, y - 0.2 * radius, 0.8 * radius, (34, 44, 84))

    def _clouds(self) -> None:
        color = 0.25 * self.haze + 0.75 * np.array((255, 252, 250)) * (0.35 if self.scene.time == "night" else 1.0)
        for _ in range(max(1, round(int(self.rng.integers(1, 4)) * self.width / self.height))):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0.12, 0.55) * self.horizon
            clear = np.ones_like(self.image[..., 0])
            for _ in range(6):
                dx, dy = self.rng.normal(0, 8) * self.unit, -abs(self.rng.normal(0, 2)) * self.unit
                rx, ry = self.rng.uniform(5, 10) * self.unit, self.rng.uniform(2.5, 4.5) * self.unit
                clear *= 1 - 0.6 * np.exp(-(((self.x - x - dx) / rx) ** 2 + ((self.y - y - dy) / ry) ** 2))
            self._blend(color, (1 - clear) * 0.95)

    def _ridges(self) -> None:
        far = self.scene.far
        for layer in range(2):
            top = self.horizon - self._ridge(far, layer) * self.unit
            mask = (self.y >= top[None]).astype(np.float32) * (self.y < self.horizon + 1)
            color = self._lit(FARS[far]) + (self.haze - self._lit(FARS[far])) * (0.5, 0.12)[layer]
            slope = np.gradient(top)
            width = max(1, int(2 * self.unit))
            slope = np.convolve(np.pad(slope, width, mode="edge"), np.ones(2 * width + 1) / (2 * width + 1), "valid")
            strength = {"mountains": 0.22, "dunes": 0.16}.get(far, 0.06)
            shade = 1 + strength * np.clip(slope * 2, -1, 1)
            self.image += (color * shade[None, :, None] - self.image) * mask[..., None]
            if far == "mountains":
                cap = np.clip((top + (5 + 2 * self._waves((9, 5))) * self.unit)[None] - self.y, 0, 1)
                cap = cap * mask * np.clip((self.horizon - top - 12 * self.unit) / (3 * self.unit), 0, 1)[None]
                self._blend(self._lit((250, 250, 255)), cap * (0.75, 1.0)[layer])

    def _ridge(self, far: str, layer: int) -> np.ndarray:
        """Return the height of a far layer above the horizon, in units [W]; the nearer layer is lower."""
        if far == "mountains":
            peaks = 1 - np.abs(self._waves((78, 33, 15), 0.42))
            return (34, 24)[layer] * peaks**1.3 * (0.8 + 0.2 * self._waves((90,)))
        if far == "hills":
            return (14, 9)[layer] + (8, 6)[layer] * self._waves((70, 33), 0.4)
        if far == "dunes":
            phase = self.x[0] / (self.rng.uniform(45, 65) * self.unit) + self.rng.random() + 0.08 * self._waves((80,))
            saw = phase % 1.0
            return (5, 3)[layer] + (11, 8)[layer] * np.minimum(saw / 0.68, (1 - saw) / 0.32)
        heights = np.zeros(self.width)
        x = -self.rng.uniform(0, 6) * self.unit
        while x < self.width:  # overlapping conifers of a forest
            half, tall = self.rng.uniform(4.0, 6.0) * self.unit, self.rng.uniform((15, 9)[layer], (22, 15)[layer])
            heights = np.maximum(heights, tall * (1 - np.abs(self.x[0] - x) / (1.7 * half)))
            x += half * self.rng.uniform(1.0, 1.6)
        return np.maximum(heights, (6, 4)[layer])

    def _skyline(self) -> None:
        for layer in range(2):
            body = self._lit(FARS["skyline"]) + (self.haze - self._lit(FARS["skyline"])) * (0.45, 0.08)[layer]
            x = int(-self.rng.uniform(0, 8) * self.unit)
            while x < self.width:
                wide = int(self.rng.uniform(10, 16) * self.unit)
                tall = int(self.rng.uniform((18, 10)[layer], (38, 26)[layer]) * self.unit)
                self._tower(x, wide, tall, body * self.rng.uniform(0.9, 1.1), windows=layer == 1)
                x += wide + (0 if self.rng.random() < 0.6 else int(3 * self.unit))

    def _tower(self, x: int, wide: int, tall: int, color: np.ndarray, windows: bool) -> None:
        bottom, left, right = int(self.horizon) + 1, max(0, x), min(self.width, x + wide)
        if right <= left:
            return
        self.image[bottom - tall : bottom, left:right] = color
        if not windows:
            return
        step, size = max(3, int(5.5 * self.unit)), max(1, int(2.8 * self.unit))
        lit = (255, 214, 120) if self.scene.time in ("night", "sunset") else self.haze * 0.95
        for y in range(bottom - tall + step // 2, bottom - size, step):
            for column in range(x + step // 2, x + wide - size, step):
                if column >= 0 and self.rng.random() < 0.7:
                    self.image[y : y + size, column : column + size] = lit

    def _ground(self) -> None:
        dark, bright = (self._lit(color) for color in GROUNDS[self.scene.ground])
        first = int(np.ceil(self.horizon))
        depth = (self.y[first:] - self.horizon) / (self.height - self.horizon)  # 0 at the horizon, 1 at the bottom
        sea = self.scene.ground == "sea"
        bend = self._waves((60, 27), 0.5)[None] * (0.1 if sea else 0.16)
        bands = {"sea": 5.0, "lavender": 4.0, "desert": 2.5}.get(self.scene.ground, 1.5)
        texture = 0.5 + 0.5 * np.sin(2 * np.pi * (bands * np.sqrt(depth + 0.02) + bend * (0.3 + depth)))
        mix = 0.15 + 0.7 * texture * (0.45 + 0.55 * depth)
        ground = dark + (bright - dark) * mix[..., None]
        if sea:
            ground = ground + (self.haze - ground) * (0.45 * (1 - depth) ** 2)[..., None]
            if self.sun_x is not None:
                path = np.exp(-(((self.x - self.sun_x) / ((3 + 7 * depth) * self.unit)) ** 2)) * (0.35 + 0.65 * texture)
                ground = ground + (np.array(self.light.glow) - ground) * (0.65 * path)[..., None]
        self.image[first:] = ground

    def _trees(self) -> None:
        count = max(2, int(self.rng.integers(2, 5) * self.width / self.height))
        depths = np.sort(self.rng.uniform(0.04, 0.6, count))
        for depth in depths:
            x, y = self.rng.uniform(0, self.width), self.horizon + depth * (self.height - self.horizon)
            tall = (16 + 24 * depth) * self.unit * self.rng.uniform(0.85, 1.15)
            from_tip = (self.y - (y - tall)) / tall  # 0 at the tip, 1 at the foot
            tier = np.where(from_tip < 0.45, from_tip / 0.45, 0.45 + 0.55 * (from_tip - 0.45) / 0.45)
            half = 0.3 * tall * np.maximum(tier * np.where(from_tip < 0.45, 0.7, 1.0), 0)
            crown = (np.abs(self.x - x) < half) & (from_tip > 0) & (from_tip < 0.9)
            trunk = (np.abs(self.x - x) < 0.05 * tall) & (from_tip >= 0.9) & (from_tip < 1)
            self._blend(self._lit((84, 58, 40)), trunk.astype(np.float32))
            self._blend(self._lit(TREE) * (1.15 - 0.3 * (self.x > x)[..., None]), crown.astype(np.float32))
