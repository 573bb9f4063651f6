"""The report in headless Chromium: no console error, hover, sorting, sliding, both widths, both schemes, no network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molf.cli import main
from molf.tasks import get_task
from run_folders import routing_lines, write_run

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page of a run that does not route, two that do, and names that are no HTML."""
    folder = tmp_path_factory.mktemp("runs")
    modules = [f"model.layers.{layer}.{name}" for layer in range(24) for name in ("q_proj", "up_proj", "down_proj")]
    three = routing_lines(9, modules, ["dense", "lora_r2", "lora_r8"])
    runs = [
        write_run(folder / "fft <img src=x onerror=alert(1)>", "fft", ranks=()),
        write_run(folder / "molf", routing=routing_lines(300, modules), steps=2000),
        write_run(folder / ("long-" * 12), routing=three, ranks=(2, 8)),
    ]
    assert main(["report", *map(str, runs)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, Path]:
    """Pages of one run and of four, by their number, with scores of evaluations."""
    folder = tmp_path_factory.mktemp("several")
    one = write_run(folder / "molf", routing=routing_lines(300), steps=300, evaluated=True)
    others = [write_run(folder / name, name, ranks=(), steps=100, evaluated=True) for name in ("fft", "lora")]
    last = write_run(folder / "molf-again", routing=routing_lines(20))
    assert main(["report", str(one)]) == 0
    assert main(["report", str(one), *map(str, others), str(last)]) == 0
    return {1: one / "report.html", 4: folder / "report.html"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, report: Path, request) -> Iterator[Any]:
    """The page at a width and in a scheme; at the end nothing was complained of or asked of a network."""
    width, scheme = getattr(request, "param", (1280, "light"))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("dialog") or dialog.dismiss())
    page.on(
        "request",
        lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
    )
    page.goto(report.as_uri())
    page.wait_for_selector("#settled .main-svg")
    yield page
    page.close()
    assert said == []


@pytest.mark.parametrize("opened", [(w, s) for w in (1280, 400) for s in ("light", "dark")], indirect=True)
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_page(opened) -> None:
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("loss", "score", "won", "share", "margin", "special", "settled", "memory", "time"):
        box = opened.locator(f"#{name} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 0.6 * min(width, 590), name
        assert box["x"] + box["width"] <= width + 1, name
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    back, ink, chart = opened.evaluate(
        """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            document.querySelector('#loss').layout.font.color]"""
    )
    assert (brightness(back) < 80 < 170 < brightness(ink)) == dark
    assert (chart == "#9aa0a8") == dark
    assert opened.locator("#title").inner_text() == "3 runs"


FIGURES = {
    "loss": "loss", "score": "score", "won": "dense won", "share": "dense won", "margin": "step",
    "special": "one winner from step", "settled": "from step", "memory": ": 80", "time": ": ",
}  # fmt: skip
POINT = """(id) => {  // where on the screen something is drawn: a point, or the middle of a bar or of a cell
    const plot = document.getElementById(id), trace = plot.data[0], {xaxis, yaxis} = plot._fullLayout;
    const middle = (values) => values ? values[Math.floor(values.length / 2)] : Math.floor(trace.z.length / 2);
    const [x, y] = trace.type === "bar" ? [trace.x[0] / 2, trace.y[0]] : [middle(trace.x), middle(trace.y)];
    plot.scrollIntoView({block: "center"});
    const box = plot.getBoundingClientRect();
    return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}"""


@pytest.mark.parametrize("count", [1, 4])
def test_every_figure_says_what_the_mouse_is_over(browser, reports, count: int) -> None:
    """At both widths and in both schemes, which the page follows without being loaded again."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(reports[count].as_uri())
    for width, scheme in ((1280, "light"), (1280, "dark"), (400, "dark"), (400, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        ink = {"light": "#676d76", "dark": "#9aa0a8"}[scheme]
        page.wait_for_function(f"document.querySelector('#time').layout?.font.color === '{ink}'")
        page.wait_for_timeout(300)  # until Plotly, which follows the window by itself as well, has drawn again
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name, words in FIGURES.items():
            x, y = page.evaluate(POINT, name)
            page.mouse.move(x - 4, y)
            page.mouse.move(x, y)
            page.wait_for_selector(f"#{name} .hovertext")
            assert words in page.locator(f"#{name} .hovertext").first.text_content(), name
        page.mouse.move(0, 0)
    page.close()
    assert said == []


SORTED = """() => {  // of every table and column: the cells in the two orders that clicks on the head give
    document.querySelectorAll("details").forEach((each) => { each.open = true; });
    const table = (at) => document.querySelectorAll("table")[at];
    const heads = (at) => [...table(at).querySelectorAll("th")];
    return [...document.querySelectorAll("table")].map((_, at) => heads(at).map((_, column) => {
        const seen = {};
        for (let click = 0; click < 2; click++) {
            table(at).querySelectorAll("th button")[column].click();
            seen[heads(at)[column].getAttribute("aria-sort")] =
                [...table(at).querySelectorAll(`td:nth-child(${column + 1})`)].map((cell) => cell.textContent);
        }
        return seen;
    }));
}"""


@pytest.mark.parametrize("count", [1, 4])
def test_every_table_sorts_by_every_column(browser, reports, count: int) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(reports[count].as_uri())
    page.wait_for_selector("#time .main-svg")
    tables = page.evaluate(SORTED)
    assert len(tables) == (6 if count == 1 else 7)  # the headline, five sections, and what differs
    for columns in tables:
        assert len(columns) >= 2
        for seen in columns:
            up, down = ([text for text in seen[way] if text not in ("", "–")] for way in ("ascending", "descending"))
            assert up == down[::-1]
            assert len(set(up)) < 2 or up != down
    assert tables[1][0]["ascending"] == sorted(tables[1][0]["ascending"])
    page.close()


def brightness(rgb: str) -> float:
    return sum(float(part) for part in rgb[rgb.index("(") + 1 : -1].split(",")[:3]) / 3


def test_the_headline_sorts(opened) -> None:
    def column(number: int) -> list[str]:
        return opened.locator(f"#headline tr td:nth-child({number})").all_inner_texts()

    names = opened.locator("#headline th button").all_inner_texts()
    steps = names.index("Steps") + 1
    assert column(steps) == ["20", "2,000", "20"]
    for expected in (["2,000", "20", "20"], ["20", "20", "2,000"]):
        opened.locator("#headline th button", has_text="Steps").click()
        assert column(steps) == expected
    assert opened.locator("#headline th[aria-sort=ascending]").count() == 1
    opened.locator("#headline th button", has_text="Method").click()
    assert column(names.index("Method") + 1) == ["fft", "molf", "molf"]
    assert column(1)[0] == "fft <img src=x onerror=alert(1)>"


def test_hover_slider_and_choices(opened) -> None:
    heat = opened.locator("#won .nsewdrag").first
    heat.scroll_into_view_if_needed()
    box = heat.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 6)
    opened.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + 7)
    opened.wait_for_selector("#won .hovertext")
    assert "model.layers.0.up_proj" in opened.locator("#won .hovertext").first.text_content()
    assert "all steps 1 to 300" in opened.locator("#shown").inner_text()
    before = opened.evaluate("document.querySelector('#won').data[0].z[0][0]")
    opened.locator("#window").focus()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("#shown").inner_text() == "steps 1 to 3"
    after = opened.evaluate("document.querySelector('#won').data[0].z[0][0]")
    assert (before, after) == (pytest.approx(1 / 300, abs=1e-4), 0.333)
    opened.locator("#axis button", has_text="Seconds").click()
    assert opened.evaluate("document.querySelector('#loss').layout.xaxis.title.text") == "Seconds"
    assert opened.evaluate("document.querySelector('#loss').data[0].x[1]") == 1.0
    opened.locator("#routed button", has_text="long-").click()
    opened.locator("#expert button", has_text="lora_r8").click()
    assert "that lora_r8 won" in opened.locator("#share-note").inner_text()
    opened.locator("#find").fill("lora_lr")
    assert opened.locator("#configuration details[open] td:first-child").all_inner_texts() == ["lora_lr"]


def test_the_headline_of_common_runs_fits_a_laptop_and_late_losses_can_be_told_apart(browser, tmp_path) -> None:
    """All twelve columns; the last of them was cut off. A loss that falls from 4 to 0.2 has a logarithmic axis."""
    runs = [write_run(tmp_path / method, method, routing=routing_lines(20)) for method in ("molf", "molf-e")]
    metrics = json.loads((runs[0] / "metrics.json").read_text()) | {"expert_share": {"dense": 0.889, "lora_r4": 0.111}}
    (runs[0] / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", *map(str, runs)]) == 0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#settled .main-svg")
    assert page.locator("#headline th").count() == 12
    table, frame = page.evaluate(
        "[document.querySelector('#headline').scrollWidth, document.querySelector('#headline').parentNode.clientWidth]"
    )
    assert table <= frame
    assert page.locator("#score-note").inner_text() == "Score is the task's primary metric, in percent."
    assert page.evaluate("document.querySelector('#loss').layout.yaxis.type") == "log"
    shares = page.evaluate("document.querySelector('#share').data[0].z.map((row) => row[0])")
    assert shares == [1.0, 1.0], "a strip per projection: of lines that lie on one another only the last is seen"
    page.close()


def test_the_legend_of_many_runs_leaves_room_for_the_chart(browser, tmp_path) -> None:
    runs = [write_run(tmp_path / f"molf-lr0.001-seed{seed}") for seed in range(24)]
    assert main(["report", *map(str, runs)]) == 0
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#time .main-svg")
    for name in ("loss", "score"):
        assert page.locator(f"#{name} .nsewdrag").first.bounding_box()["height"] > 120, name
    page.close()


def test_scores_of_different_tasks_are_not_compared(browser, tmp_path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for task, best, said in (("world-fact", 2, "higher is better"), ("world-mcq", 0, "cannot be compared")):
        config = json.loads((runs[0] / "run.json").read_text())
        config["method"]["task"] = task
        (runs[0] / "run.json").write_text(json.dumps(config))
        metrics = json.loads((runs[0] / "metrics.json").read_text())
        (runs[0] / "metrics.json").write_text(json.dumps(metrics | {get_task(task).primary: 81.25}))
        assert main(["report", *map(str, runs)]) == 0
        page = browser.new_page()
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_selector("#time .main-svg")
        assert page.locator("#headline td.best").count() == best
        assert said in page.locator("#score-caption").inner_text()
        page.close()


def test_a_report_without_routing_says_so(browser, tmp_path) -> None:
    run = write_run(tmp_path / "fft", "fft", ranks=())
    assert main(["report", str(run)]) == 0
    page = browser.new_page()
    page.goto((run / "report.html").as_uri())
    assert "None of these runs routes" in page.locator("#routing").inner_text()
    page.wait_for_selector("#memory .main-svg")
    page.close()
