"""Write the table and figure of the speed benchmark from its log; a later row replaces an earlier one of its kind."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str], dict[str, Any]]
"""By kind of run (gpu, cpu-tiny, cpu-sd2, …) and name of the row."""
STEPS, TAU = 50, 15
GIB = 2**30


def read(log: Path) -> Rows:
    """Return the newest successful row of each name, or the failed one."""
    rows: Rows = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        row = json.loads(line)
        key = row["kind"], row["row"]
        if key not in rows or "failed" not in row or "failed" in rows[key]:
            rows[key] = row
    return rows


def mixed(medians: dict[str, float], name: str, tau: int) -> float:
    """Return the seconds of 50 steps, `tau` of them merged, from those of single steps."""
    return tau * medians[f"{name}, merged"] + (STEPS - tau) * medians[f"{name}, not merged"]


Value = tuple[float, bool, str]
"""The measured value, whether it meets the target, and details."""


class Targets:
    """The performance targets; each method returns None if its rows were not run."""

    def __init__(self, rows: Rows, kind: str = "gpu"):
        self.rows, self.kind = rows, kind

    def row(self, name: str, kind: str | None = None) -> dict[str, Any] | None:
        found = self.rows.get((kind or self.kind, name))
        return None if found is None or "failed" in found else found

    def released(self) -> Value | None:
        compiled, eager = self.row("compiled"), self.row("eager")
        row = compiled or eager
        if row is None or "released, merged" not in row["median"]:
            return None
        medians = row["median"]
        theirs, plain = mixed(medians, "released", TAU), mixed(medians, "madgen", TAU)
        eager_text = f"without compile {theirs / plain:.2f} ×"
        if compiled is None:
            return theirs / plain, theirs / plain >= 1.5, "compile not measured"
        ours = mixed(medians, "madgen compiled", TAU)
        return theirs / ours, theirs / ours >= 1.5, f"with compile; {eager_text}"

    def on_cpu(self) -> Value | None:
        """Return the worst speedup of a panorama over shapes; no single step may be slower."""
        whole, steps = {}, {}
        for kind in ("cpu-sd2", "cpu-tiny"):
            row = self.row("eager", kind)
            if row is None or "released, merged" not in row["median"]:
                continue
            medians, shape = row["median"], kind.removeprefix("cpu-")
            whole[shape] = mixed(medians, "released", TAU) / mixed(medians, "madgen", TAU)
            for step in ("merged", "not merged"):
                steps[f"{shape} {step}"] = medians[f"released, {step}"] / medians[f"madgen, {step}"]
        if not whole:
            return None
        least = min(whole.values())
        return least, least >= 1.15 and min(steps.values()) >= 1, f"{listed(whole, '×')}; steps: {listed(steps, '×')}"

    def without_merging(self, tau: int, most: float) -> Value | None:
        found = {}
        for row, name in (("eager", "madgen"), ("compiled", "madgen compiled")):
            if (measured := self.row(row)) is not None:
                found[name] = mixed(measured["median"], name, tau) / mixed(measured["median"], name, 0)
        if not found:
            return None
        shown = found.get("madgen compiled", found.get("madgen", 0.0))
        return shown, shown <= most, listed(found, "×")

    def multidiffusion(self) -> Value | None:
        """Return the best speedup on a GPU; CPUs are only listed."""
        found, on_cpu = self._multidiffusion(self.kind), {}
        for kind in ("cpu-sd2", "cpu-tiny"):
            on_cpu |= {f"{kind}, {ours}": ratio for ours, ratio in self._multidiffusion(kind).items()}
        if not found:
            return None
        return max(found.values()), max(found.values()) >= 1.5, listed({**found, **on_cpu}, "×")

    def _multidiffusion(self, kind: str) -> dict[str, float]:
        found = {}
        for name in ("multidiffusion", "multidiffusion_compiled"):
            if (row := self.row(name, kind)) is not None:
                theirs = row["median"]["diffusers"]
                found |= {ours: theirs / value for ours, value in row["median"].items() if ours != "diffusers"}
        return found

    def bare(self) -> Value | None:
        found = {}
        for row, limit, name in (
            ("eager", "bare UNet", "madgen"),
            ("compiled_bare", "bare UNet compiled", "madgen compiled"),
        ):
            if (measured := self.row(row)) is not None:
                medians = measured["median"]
                for tau in (0, TAU):
                    found[f"{name} τ={tau}"] = STEPS * medians[limit] / mixed(medians, name, tau)
        if not found:
            return None
        worst = min(value for key, value in found.items() if key.endswith(f"τ={TAU}"))
        return worst, worst >= 0.95, listed(found)

    def fast(self, against: str, least: float) -> Value | None:
        """Compare whole panoramas of the preset with 50 steps of `against`, compiled or the released code."""
        steady, steady_compiled = self.row("eager"), self.row("compiled")
        row, compiled = self.row("fast"), self.row("fast_compiled")
        if row is None or steady is None or f"{against}, merged" not in steady["median"]:
            return None
        fast = statistics.median(row["seconds_a_panorama"]["fast"]) / row.get("share", 1.0)
        theirs = mixed(steady["median"], against, TAU)
        found = {"without compile": theirs / fast}
        if compiled is not None and (against == "released" or steady_compiled is not None):
            if against != "released" and steady_compiled is not None:
                theirs = mixed(steady_compiled["median"], "madgen compiled", TAU)
            found["with compile"] = theirs / (
                statistics.median(compiled["seconds_a_panorama"]["fast compiled"]) / compiled.get("share", 1.0)
            )
        best = max(found.values())
        return best, best >= least, f"{row['preset']}, {row['steps']} steps: {listed(found, '×')}"

    def generate(self) -> Value | None:
        """Return the ratio on a GPU or, if not measured, the worst on CPUs."""
        found = {}
        for kind in (self.kind,) if self.row("generate") else ("cpu-demo", "cpu-tiny"):
            if (row := self.row("generate", kind)) is not None:
                name = f"{kind}, {row['panoramas']} panoramas of {row['steps']} steps:"
                found[name] = row["median"]["sampler"] / row["median"]["generate"]
        return (min(found.values()), min(found.values()) >= 0.97, listed(found)) if found else None

    def growth(self) -> Value | None:
        row = self.row("growth")
        if row is None:
            return None
        times = {int(width): (mixed_row(one), one["views"]) for width, one in row["widths"].items()}
        first, last = min(times), max(times)
        plain = times[last][0] / times[first][0] / (last / first)
        views = times[last][0] / times[first][0] / (times[last][1] / times[first][1])
        note = f"{first} → {last} px; by views ({times[first][1]} → {times[last][1]}) {views:.2f} × linear"
        return plain, plain <= 1.15, note

    def memory(self) -> Value | None:
        row = self.row("growth")
        if row is None:
            return None
        widest = row["widths"][max(row["widths"], key=int)]
        peaks = {
            "sampling": max(widest["peak_bytes"].values(), default=0),
            "decode": row["decode_widest"]["peak_bytes"],
        }
        if not (most := max(peaks.values()) / GIB):  # a CPU's is not measured
            return None
        return most, most < 24, listed({name: value / GIB for name, value in peaks.items()}, "GiB")

    def xl(self) -> Value | None:
        row = self.row("xl")
        if row is None:
            return None
        ratio = STEPS * row["median"]["bare UNet"] / mixed(row["median"], "madgen", TAU)
        return ratio, ratio >= 0.95, f"{row['views']} views, without compile"


def mixed_row(one: dict[str, Any]) -> float:
    return TAU * one["median"]["merged"] + (STEPS - TAU) * one["median"]["not merged"]


def listed(values: dict[str, float], unit: str = "") -> str:
    return "; ".join(f"{name} {value:.3g}{' ' * bool(unit)}{unit}" for name, value in values.items())


def targets(rows: Rows, kind: str) -> list[tuple[str, str, Value | None]]:
    """Return (name, target, value) of every target."""
    measured = Targets(rows, kind)
    return [
        ("MAD (τ = 15 of 50) against the released code, SD 2 shape, GPU", "≥ 1.5 ×", measured.released()),
        (
            "the same on CPU, float32, no compile: SD 2 shape at 512×1536, tiny shapes",
            "≥ 1.15 ×, no step slower",
            measured.on_cpu(),
        ),
        ("τ = 15 against τ = 0, 512×3072", "≤ 1.02", measured.without_merging(15, 1.02)),
        ("τ = 50 against τ = 0, 512×3072", "≤ 1.10", measured.without_merging(50, 1.10)),
        ("MultiDiffusion against diffusers' pipeline, stride 8", "≥ 1.5 ×", measured.multidiffusion()),
        ("sampler against the bare UNet on the same views", "≥ 0.95", measured.bare()),
        ("`fast` preset against MAD at stride view/4", "≥ 2.8 ×", measured.fast("madgen", 2.8)),
        ("`fast` preset against the released code, SD 2 shape, GPU", "≥ 4 ×", measured.fast("released", 4.0)),
        ("`generate` against the bare sampler", "≥ 0.97", measured.generate()),
        ("growth of time with width, τ = 15", "≤ 1.15 × linear", measured.growth()),
        ("peak memory at the largest width, SD 2 shape, bf16 (GiB)", "< 24", measured.memory()),
        ("SDXL shape, 1024×4096, τ = 15, against its bare UNet", "≥ 0.95", measured.xl()),
    ]


def write_report(log: Path, out: Path) -> None:
    """Write speed.md, speed.json and speed.png to `out`."""
    rows = read(log)
    kinds = {kind for kind, _ in rows}
    main = "gpu" if "gpu" in kinds else "dry" if kinds == {"dry"} else "gpu"
    table = targets(rows, main)
    lines = ["# Speed", "", f"`python benchmarks/speed.py`. {_devices(rows)}", "", NOTES, ""]
    if main == "dry":
        lines += ["**Dry run with tiny shapes: a smoke test, not a measurement.**", ""]
    lines += [f"**{note}**\n" for note in dict.fromkeys(row["note"] for row in rows.values() if "note" in row)]
    lines += ["| comparison, same run and weights | target | measured | |", "|---|---|---|---|"]
    for figure, target, value in table:
        lines.append(f"| {figure} | {target} | {_measured(value)} |")
    if reasons := [f"- {row['why']}" for row in rows.values() if "why" in row]:
        lines += ["", "Reasons for missed targets:", "", *reasons]
    for kind in sorted(kinds, key=_gpu_first):
        lines += ["", f"## {kind}", *_section({name: row for (of, name), row in rows.items() if of == kind})]
    (out / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "targets": [
            {"figure": f, "target": t, "measured": v and v[0], "met": v and v[1], "how": v and v[2]}
            for f, t, v in table
        ],
        "rows": list(rows.values()),
    }
    (out / "speed.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(rows, out / "speed.png")


def _gpu_first(kind: str) -> tuple[bool, str]:
    return kind != "gpu", kind


NOTES = """\
Seconds are medians over alternating rounds after a warm-up round (minimum and maximum in parentheses), CPU seconds on
one CPU thread. The time of 50 steps with τ merged steps is computed from the times of merged and unmerged steps,
measured separately in short runs that include prompt encoding but not decoding. On a GPU the released code runs in
float16 under autocast, as released, with merged cross-attention in every step; madgen follows the paper. The weights
are random."""


def _devices(rows: Rows) -> str:
    named = {(kind, row["device"], row["torch"], row["dtype"], row["threads"]) for (kind, _), row in rows.items()}
    return "; ".join(
        f"{kind}: {device}, torch {version}, {dtype}" + (f", {threads} thread(s)" if kind != "gpu" else "")
        for kind, device, version, dtype, threads in sorted(named)
    )


def _measured(value: Value | None) -> str:
    if value is None:
        return "– | not run"
    number, met, how = value
    return f"{number:.3g} ({how}) | {'met' if met else 'missed'}"


def _section(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for name, row in rows.items():
        lines += ["", f"**{name}**, {row['size']}" + (f", {row['views']} views" if "views" in row else ""), ""]
        if "failed" in row:
            lines.append(f"- {row['failed']}")
            continue
        if "seconds_a_step" in row:
            lines += _times(row)
        for width, one in row.get("widths", {}).items():
            lines += [f"{width} px, {one['views']} views", "", *_times(one)]
        for key, value in row.items():
            if key in EXTRA:
                lines.append(f"- {key.replace('_', ' ')}: {_plain(value)}")
    return lines


EXTRA = (
    "relative_error", "equal", "seconds_of_first_step", "seconds_of_first_run", "relative_error_to_eager",
    "view_batch_size", "preset", "merged", "not merged", "after_sampling_seconds", "seconds_a_panorama",
    "decode_widest", "decode_seconds", "same_bytes", "auto",
)  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _times(row: dict[str, Any]) -> list[str]:
    lines = ["| contender | seconds per step | peak memory, GiB |", "|---|---|---|"]
    for name, values in row["seconds_a_step"].items():
        spread = f"{statistics.median(values):.4g} ({min(values):.4g} – {max(values):.4g})"
        peak = row["peak_bytes"].get(name)
        lines.append(f"| {name} | {spread} | {'–' if peak is None else f'{peak / GIB:.1f}'} |")
    return [*lines, ""]


def draw(rows: Rows, path: Path) -> None:
    """Plot the seconds per step of every contender, one panel per row."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path} needs matplotlib: pip install 'madgen[eval]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = sorted(rows, key=lambda key: _gpu_first(key[0]))
    shown = {key: rows[key] for key in keys if rows[key].get("seconds_a_step")}
    if not shown:
        return
    sizes = [len(row["seconds_a_step"]) + 1.5 for row in shown.values()]
    fig, axes = plt.subplots(
        len(shown), 1, figsize=(8, 0.32 * sum(sizes) + 0.4), height_ratios=sizes, squeeze=False, layout="constrained"
    )
    for axis, ((kind, name), row) in zip(axes[:, 0], shown.items(), strict=True):
        names = list(row["seconds_a_step"])[::-1]
        values = [row["seconds_a_step"][one] for one in names]
        medians = [statistics.median(one) for one in values]
        spread = [[m - min(v) for m, v in zip(medians, values, strict=True)],
                  [max(v) - m for m, v in zip(medians, values, strict=True)]]  # fmt: skip
        colours = ["#4477aa" if one.startswith(("madgen", "fast")) else "#bbbbbb" for one in names]
        axis.barh(names, medians, xerr=spread, color=colours, height=0.7)
        axis.set_title(f"{kind}: {name}, {row['size']}, seconds per step", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
