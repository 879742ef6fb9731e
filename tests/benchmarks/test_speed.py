import json

import pytest
import torch
from speed import main, parse
from speed_contenders import alternate, relative_error
from speed_report import read, targets, write_report
from speed_rows import ROWS


def row(name, kind="gpu", **found):
    run = {"device": "a card", "torch": "2", "dtype": "bfloat16", "threads": 1, "size": "512x3072"}
    return {"row": name, "kind": kind, **run, **found}


def steps(**medians):
    medians = {name.replace("_", ", ", 1).replace("_", " "): value for name, value in medians.items()}
    return {"median": medians, "seconds_a_step": {name: [v] for name, v in medians.items()}, "peak_bytes": {}}


EAGER = row("eager", views=21, **steps(
    madgen_merged=0.11, madgen_not_merged=0.1, released_merged=0.3, released_not_merged=0.2,
))  # fmt: skip
EAGER["median"]["bare UNet"] = 0.1


def found(rows, figure):
    return next(value for name, _, value in targets({(one["kind"], one["row"]): one for one in rows}, "gpu")
                if figure in name)  # fmt: skip


def test_fifty_steps_are_the_sum_of_merged_and_unmerged_steps():
    ours, theirs = 15 * 0.11 + 35 * 0.1, 15 * 0.3 + 35 * 0.2
    assert found([EAGER], "against the released code, SD 2 shape, GPU")[0] == pytest.approx(theirs / ours)
    assert found([EAGER], "τ = 15 against")[:2] == (pytest.approx(ours / 5), False)
    assert found([EAGER], "τ = 50 against")[:2] == (pytest.approx(1.1), True)
    assert found([EAGER], "bare UNet on")[:2] == (pytest.approx(5 / ours), True)


def test_cpu_target_needs_a_faster_panorama_and_no_slower_step():
    def measured(kind, theirs):
        ours = {"madgen_merged": 1.0, "madgen_not_merged": 1.0}
        return row("eager", kind, views=9, **steps(**ours, **theirs))

    sd2 = measured("cpu-sd2", {"released_merged": 2.0, "released_not_merged": 1.0})
    tiny = measured("cpu-tiny", {"released_merged": 2.0, "released_not_merged": 0.9})
    value, met, told = found([sd2], "the same on CPU")
    assert (value, met) == (pytest.approx(1.3), True)
    assert "sd2 1.3 ×; steps: sd2 merged 2 ×; sd2 not merged 1 ×" in told
    assert found([sd2, tiny], "the same on CPU")[:2] == (pytest.approx(1.23), False)


def test_generate_target_falls_back_to_cpu_rows():
    ran = {"panoramas": 3, "steps": 2, "median": {"sampler": 0.99, "generate": 1.0}}
    tiny, demo = (row("generate", kind, **ran) for kind in ("cpu-tiny", "cpu-demo"))
    assert found([tiny], "`generate`") == (0.99, True, "cpu-tiny, 3 panoramas of 2 steps: 0.99")
    demo["median"] = {"sampler": 0.9, "generate": 1.0}
    assert found([tiny, demo], "`generate`")[:2] == (0.9, False)
    on_gpu = row("generate", **{**ran, "median": {"sampler": 0.9, "generate": 1.0}})
    assert found([on_gpu, row("generate", "cpu-tiny", **ran)], "`generate`")[:2] == (0.9, False)


def test_fast_preset_is_timed_as_whole_panoramas():
    preset = row("fast", preset="fast.yaml", steps=25, seconds_a_panorama={"fast": [2.0, 1.0, 3.0]})
    ours, theirs = 15 * 0.11 + 35 * 0.1, 15 * 0.3 + 35 * 0.2
    assert found([EAGER, preset], "`fast` preset against MAD")[:2] == (pytest.approx(ours / 2), False)
    assert found([EAGER, preset], "`fast` preset against the released")[:2] == (pytest.approx(theirs / 2), True)


def test_rows_that_were_not_run_stay_empty(tmp_path):
    log = tmp_path / "speed.jsonl"
    log.write_text(json.dumps(row("growth", failed="OutOfTime: stopped after 9 s")) + "\n", encoding="utf-8")
    write_report(log, tmp_path)
    assert {
        one["measured"] for one in json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["targets"]
    } == {None}
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert text.count("| – | not run |") == 12
    assert "stopped after 9 s" in text


def test_growth_is_linear_where_time_follows_the_width():
    widths = {
        str(width): {"views": width // 128, **steps(merged=width / 1e4), "median": {"merged": width / 1e4,
                     "not merged": width / 1e4}, "peak_bytes": {"merged": 2**30}} for width in (1024, 8192)
    }  # fmt: skip
    grown = row("growth", widths=widths, decode_widest={"seconds": 1.0, "peak_bytes": 25 * 2**30})
    assert found([grown], "growth")[:2] == (pytest.approx(1), True)
    assert found([grown], "memory")[:2] == (25, False)


def test_later_row_replaces_an_earlier_one_unless_it_failed(tmp_path):
    log = tmp_path / "speed.jsonl"
    lines = [row("eager", n=1), row("eager", n=2), row("eager", failed="no")]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read(log)["gpu", "eager"]["n"] == 2


def test_contenders_alternate_and_the_first_round_is_a_warm_up():
    calls = []
    contenders = {name: lambda steps, name=name: calls.append((name, steps)) for name in "ab"}
    timings = alternate(contenders, {"a": 1, "b": 2}, 2)
    assert calls == [("a", 1), ("b", 2)] * 3
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_relative_error_of_nan_is_not_small():
    assert relative_error(torch.ones(2) * 1.1, torch.ones(2)) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1e-3


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--cpu", "--rows", "eagre"])
    assert "unknown eagre; known: equal, eager" in capsys.readouterr().err
    assert parse(["--cpu", "--rows", "equal, eager"]).rows == "equal,eager"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of --cpu, --gpu, --dry or --report is required"),
        (["--cpu", "--rounds", "0"], "--rounds must be >= 1 and --threads >= 0, got 0 and 1"),
        (["--cpu", "--rows", "equal,graphs"], "--rows: graphs needs a GPU: --gpu, and not --dry"),
        (["--report", "--out", "nowhere"], "nowhere/speed.jsonl does not exist"),
    ],
)
def test_impossible_runs_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err


def test_failed_row_is_recorded_and_the_next_row_runs(tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(ROWS, "eager", (broken, 1))
    monkeypatch.setitem(ROWS, "parts", (lambda bench: {"merged": {"attention": 50.0}}, 1))
    main(["--dry", "--rows", "eager,parts", "--out", str(tmp_path)])
    rows = read(tmp_path / "speed.jsonl")
    assert rows["dry", "eager"]["failed"] == "RuntimeError: no such luck"
    assert rows["dry", "parts"]["merged"] == {"attention": 50.0}
    assert "merged: attention 50" in (tmp_path / "speed.md").read_text(encoding="utf-8")
