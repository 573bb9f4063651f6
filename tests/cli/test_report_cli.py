"""molf report in process: what it writes, what it says of unfinished runs and what it refuses."""

import errno
import json
import os
import re
from pathlib import Path

import matplotlib
import pytest

from molf.cli import main
from run_folders import routing_lines, write_run


def data_of(page: Path) -> dict:
    text = page.read_text()
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def fails(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("molf: error:")
    return lines[0]


def test_one_page_of_several_runs(tmp_path, capsys) -> None:
    runs = [
        write_run(tmp_path / "all" / "fft", "fft", ranks=()),
        write_run(tmp_path / "all" / "molf", routing=routing_lines(20)),
    ]
    assert main(["report", *map(str, runs), "--png", str(tmp_path / "png")]) == 0
    page = tmp_path / "all" / "report.html"
    assert f"written to {page}" in capsys.readouterr().out
    data = data_of(page)
    assert [row["run"] for row in data["rows"]] == ["fft", "molf"]
    assert data["rows"][1] | {"lr": 0.001, "lora_lr": 0.002, "score": 81.25, "speed": 200.0} == data["rows"][1]
    assert data["runs"][0]["routing"] is None
    assert data["runs"][1]["routing"]["experts"] == ["dense", "lora_r4"]
    assert data["runs"][1]["curve"]["seconds"] == [0.5 * step for step in range(1, 21)]
    differing = {row["key"] for section in data["configuration"] for row in section["rows"] if row["differs"]}
    assert {"method", "expert_ranks"} <= differing
    assert "use_rslora" not in differing
    text = page.read_text()
    assert text.count("plotly.js v") == 1
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text.split('<script id="data"')[0])
    assert {path.name for path in (tmp_path / "png").iterdir()} == {
        "loss.png", "loss-time.png", "molf-won.png", "molf-share.png", "molf-specialised.png",
    }  # fmt: skip


def test_scores_of_evaluations_are_a_curve(tmp_path, capsys) -> None:
    """Over steps, seconds and tokens, in the page and as figures; a tick of a logarithmic axis is no formula."""
    from matplotlib.figure import Figure

    from molf.report.figures import _STYLE, _loss
    from molf.report.runs import read_runs

    run, other = write_run(tmp_path / "run", steps=40, evaluated=True), write_run(tmp_path / "other")
    assert main(["report", str(run), str(other), "--png", str(tmp_path / "png")]) == 0
    found, none = (each["evaluations"] for each in data_of(tmp_path / "report.html")["runs"])
    assert found == {
        "records": 64,
        "steps": list(range(5, 41, 5)),
        "seconds": [0.5 * step for step in range(5, 41, 5)],
        "tokens": [100 * step for step in range(5, 41, 5)],
        "loss": [pytest.approx(5 / step, rel=1e-5) for step in range(5, 41, 5)],
        "score": [80 - 100 / step for step in range(5, 41, 5)],
    }
    assert none == {"records": 64, "steps": [], "seconds": [], "tokens": [], "loss": [], "score": []}
    figures = {path.name for path in (tmp_path / "png").iterdir()}
    assert figures == {f"{name}{suffix}.png" for name in ("loss", "score") for suffix in ("", "-time")}
    with matplotlib.rc_context(_STYLE):
        axes = Figure().subplots()
        _loss(axes, read_runs([run, other]), "seconds")
    assert axes.get_yscale() == "log"
    assert {"0.1", "1"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run", "other", "evaluation"]


def test_tiles_say_who_is_best(tmp_path) -> None:
    slow, fast = write_run(tmp_path / "slow", steps=400), write_run(tmp_path / "fast")
    metrics = json.loads((slow / "metrics.json").read_text()) | {"score": 90.0, "peak_memory_mib": 4096.0}
    (slow / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", str(slow), str(fast)]) == 0
    assert data_of(tmp_path / "report.html")["tiles"] == [
        {"label": "Best score", "value": "90.0", "run": 0},
        {"label": "Shortest training", "value": "10.0 s", "run": 1},
        {"label": "Least memory", "value": "80 MiB", "run": 1},
    ]
    assert main(["report", str(slow)]) == 0
    assert data_of(slow / "report.html")["tiles"] == [
        {"label": "Score", "value": "90.0", "run": None},
        {"label": "Training time", "value": "3.3 min", "run": None},
        {"label": "Peak memory", "value": "4.0 GiB", "run": None},
    ]


@pytest.mark.parametrize(
    ("own", "best"),
    [
        ({"test_size": 0.5}, False),
        ({"max_examples": 10}, False),
        ({"dataset_path": "b.json"}, False),
        ({"learning_rate": 1.0}, True),
    ],
)
def test_scores_of_other_records_have_no_best(tmp_path, own: dict, best: bool) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    config = json.loads((runs[1] / "run.json").read_text())
    config["method"] |= own
    (runs[1] / "run.json").write_text(json.dumps(config))
    assert main(["report", *map(str, runs)]) == 0
    data = data_of(tmp_path / "report.html")
    assert ("Best score" in [tile["label"] for tile in data["tiles"]]) is best
    assert (len({run["scored_on"] for run in data["runs"]}) == 1) is best


def test_figures_of_runs_whose_names_are_alike_are_all_there(tmp_path, capsys) -> None:
    runs = [str(write_run(tmp_path / name, routing=routing_lines(20))) for name in ("lr/1", "lr-1", "lr 1", "other")]
    assert main(["report", *runs, "--png", str(tmp_path / "png")]) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert len(set(written)) == len(written) == len(list((tmp_path / "png").iterdir()))
    assert (tmp_path / "png" / "other-won.png").is_file()


def test_a_number_at_a_name_s_end_may_be_another_run_s(tmp_path, capsys) -> None:
    """a-b-1 was overwritten by the figures of a/b, which is the first of two that are alike."""
    runs = [str(write_run(tmp_path / name, routing=routing_lines(20))) for name in ("a/b", "a-b", "a-b-1")]
    assert main(["report", *runs, "--png", str(tmp_path / "png")]) == 0
    assert len(list((tmp_path / "png").glob("*-won.png"))) == 3


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path) -> None:
    from matplotlib.figure import Figure

    from molf.report.figures import _loss, _score
    from molf.report.runs import read_runs

    runs = read_runs([write_run(tmp_path / name, steps=40, evaluated=True) for name in ("_first", "second")])
    for draw, more in ((_loss, ["evaluation"]), (_score, [])):
        axes = Figure().subplots()
        draw(axes, runs, "steps")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_first", "second", *more]


def test_a_page_is_whole_or_not_written(tmp_path, capsys, monkeypatch) -> None:
    """A name that is no UTF-8 left an empty file in place of the last page, and so did a full disk."""
    run = write_run(tmp_path / os.fsdecode(b"r\xffn"))
    assert main(["report", str(run)]) == 0
    assert "<title>r?n" in (run / "report.html").read_text()
    run = write_run(tmp_path / "run")
    page = run / "report.html"
    assert main(["report", str(run)]) == 0
    before = page.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in fails(capsys, "report", run)
    assert page.read_bytes() == before


def test_logs_of_others_are_read_as_far_as_they_go(tmp_path, capsys) -> None:
    """Entries without seconds, and spans of none, ended in tracebacks."""
    run = write_run(tmp_path / "run", steps=4)
    entries = [{"step": 1, "tokens_per_second": 5.0}, {"step": 2, "tokens_per_second": 7.0, "seconds": 0.0},
               {"step": "3", "loss": 1.0}, {"step": 4, "loss": 2.0, "eval_loss": 2.0, "seconds": "x"}]  # fmt: skip
    (run / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert main(["report", str(run), "--png", str(tmp_path / "png")]) == 0
    found = data_of(run / "report.html")
    assert found["rows"][0]["speed"] is None
    assert found["runs"][0]["curve"]["loss"] == [2.0]
    entries[1]["seconds"] = 2.0
    (run / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert main(["report", str(run)]) == 0
    assert data_of(run / "report.html")["rows"][0]["speed"] == 7.0


@pytest.mark.parametrize(
    ("file", "part", "change", "message"),
    [
        ("metrics.json", None, {"expert_share": [1]}, "metrics.json is damaged: expert_share is [1] and no mapping"),
        ("metrics.json", None, {"test": 3}, "metrics.json is damaged: test is 3 and no mapping"),
        ("trainer_state.json", None, {"log_history": 3}, "trainer_state.json is damaged: log_history is 3 and no list"),
        ("run.json", "molf", {"expert_ranks": 4}, "run.json is damaged: expert_ranks is 4 and no list"),
        ("run.json", "method", {"task": ["sql"]}, "run.json is damaged: task is ['sql'] and no name"),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path, capsys, file: str, part: str, change: dict, message: str) -> None:
    run = write_run(tmp_path / "run")
    record = json.loads((run / file).read_text())
    (record[part] if part else record).update(change)
    (run / file).write_text(json.dumps(record))
    assert message in fails(capsys, "report", run)


def test_dense_wins_are_of_the_steps_that_compared_anything(tmp_path) -> None:
    """The metrics count the step at a learning rate of 0 that the schedule began with."""
    lines = routing_lines(4, ["m"])
    lines[1]["scores"] = [[0.0, 0.0]]  # dense won this tie alone
    run = write_run(tmp_path / "run", routing=lines)
    metrics = json.loads((run / "metrics.json").read_text()) | {"expert_share": {"dense": 0.25, "lora_r4": 0.75}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", str(run)]) == 0
    data = data_of(run / "report.html")
    assert data["rows"][0]["dense"] == 0
    assert data["runs"][0]["sentences"][0].startswith("3 decisions: 1 modules at 3 steps. dense won 0.0")


def test_the_folder_of_another_trainer_is_read(tmp_path, capsys) -> None:
    """What ``RoutingCallback`` and transformers write there: no configuration, no metrics."""
    run = write_run(tmp_path / "mine", routing=routing_lines(20), finished=False)
    (run / "run.json").unlink()
    assert main(["report", str(run), "--png", str(tmp_path / "png")]) == 0
    printed = capsys.readouterr()
    assert (printed.err, "mine-won.png" in printed.out) == ("", True)
    data = data_of(run / "report.html")
    assert data["rows"][0] | {"run": "mine", "method": "-", "dense": 100 * 36 / 120} == data["rows"][0]
    assert (data["notes"], data["subtitle"]) == ([], "")
    assert len(data["runs"][0]["curve"]["loss"]) == 20
    assert "has no run.json with ranks and scales" in fails(capsys, "report", run, "--advise")


def test_text_of_runs_is_escaped(tmp_path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", name="</script><b>{{plotly}}")
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "<img src=x" not in text
    assert "</script><b>" not in text
    assert text.count("plotly.js v") == 1
    assert data_of(run / "report.html")["title"] == "<img src=x onerror=alert(1)>"


def test_an_unfinished_run_is_shown_as_far_as_it_went(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", routing=routing_lines(15), finished=False, steps=10)
    with (run / "routing.jsonl").open("a") as log:
        log.write('{"step": 16, "sco')
    assert main(["report", str(run), "--output", str(tmp_path / "new" / "page.html")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "molf: run is not finished (it has no metrics.json); it is shown up to step 15.\n"
    assert len(data_of(tmp_path / "new" / "page.html")["runs"][0]["curve"]["loss"]) == 10


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_processes(tmp_path) -> None:
    """Those of the last process alone put its score before the end of its own curve."""
    run = write_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text()) | {"seconds": 2.0, "resumed_from": "checkpoint-16"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", str(run)]) == 0
    data = data_of(run / "report.html")
    assert data["rows"][0]["seconds"] == data["runs"][0]["seconds"] == data["runs"][0]["curve"]["seconds"][-1] == 10.0


def test_a_run_that_was_killed_before_its_first_step_has_no_routing(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", routing=routing_lines(0), finished=False, steps=1)
    assert main(["report", str(run), "--png", str(tmp_path / "png")]) == 0
    assert data_of(run / "report.html")["runs"][0]["routing"] is None
    assert main(["report", str(run), "--advise"]) == 2
    assert "has no routing" in capsys.readouterr().err


def test_what_is_refused(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "all" / "run", routing=routing_lines(3))
    assert "expected" in fails(capsys, "report") or "required" in fails(capsys, "report")
    assert "missing is no folder" in fails(capsys, "report", tmp_path / "missing")
    assert f"has no run.json and no routing.jsonl; the runs in it are {run}" in fails(
        capsys, "report", tmp_path / "all"
    )
    assert "is given twice" in fails(capsys, "report", run, run)
    assert "is a folder: name a file" in fails(capsys, "report", run, "--output", tmp_path)
    assert "run.json is a file: name a folder" in fails(capsys, "report", run, "--png", run / "run.json")
    assert not (run / "report.html").exists()
    (run / "metrics.json").write_text('{"steps": ')
    assert "metrics.json is damaged" in fails(capsys, "report", run)
    (run / "metrics.json").write_text("{}")
    lines = (run / "routing.jsonl").read_text().splitlines()
    (run / "routing.jsonl").write_text("\n".join([*lines[:2], '{"step": 2}', lines[3]]) + "\n")
    assert "routing.jsonl, line 3, is damaged" in fails(capsys, "report", run)
    (run / "routing.jsonl").write_text("\n".join([*lines[:2], lines[2][:40], lines[3]]) + "\n")
    assert "routing.jsonl, line 3, is damaged" in fails(capsys, "report", run)
    for header, problem in (
        ({}, "modules is None"),
        ({"modules": ["a"], "experts": None}, "experts is None"),
        ({"modules": "a", "experts": ["b"]}, "modules is 'a'"),
        ({"modules": ["a"], "experts": [["b"]]}, "experts is [['b']]"),
        ({"modules": ["a"], "experts": []}, "experts is []"),
    ):
        (run / "routing.jsonl").write_text("\n".join([json.dumps({"schema": 1, **header}), *lines[1:]]) + "\n")
        assert f"routing.jsonl, line 1, is damaged: {problem} and no list" in fails(capsys, "report", run)
    (run / "routing.jsonl").write_text("")
    assert "is no routing log" in fails(capsys, "report", run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "versions": None}))
    assert "run.json has no 'versions'" in fails(capsys, "report", run)
    (run / "run.json").write_text("[]")
    assert "holds no mapping" in fails(capsys, "report", run)


@pytest.mark.parametrize("entries", [0, 2500])
def test_no_log_and_a_long_log(tmp_path, entries: int) -> None:
    run = write_run(tmp_path / "run", steps=max(entries, 1))
    if not entries:
        (run / "trainer_state.json").unlink()
    assert main(["report", str(run)]) == 0
    curve = data_of(run / "report.html")["runs"][0]["curve"]
    assert (curve["logged"], len(curve["loss"])) == (entries, min(entries, 1000))
