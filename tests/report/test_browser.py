"""The report page in a real browser: what a reader sees on a desktop, a tablet and a telephone.

Chromium is driven over its own pipe (the DevTools protocol, JSON between NULs on descriptors 3
and 4), so that the page is measured as it is, content security policy and all.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from distilfast.report import Chart, Guess, ModelRow, Report, Sample, Table, write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed"
    ),
]

PROBE = (ROOT / "tests" / "report" / "probe.js").read_text(encoding="utf-8")


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        # Out of the way of 3 and 4, which the wrapper makes of them.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        for fd in (theirs_in, theirs_out):
            os.close(fd)
        move = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        assert CHROMIUM is not None
        flags = (
            "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-extensions "
            "no-first-run no-default-browser-check disable-background-networking disable-sync "
            "disable-component-update hide-scrollbars remote-debugging-pipe"
        ).split()
        self.process = subprocess.Popen(
            [sys.executable, "-c", move.format(*theirs), CHROMIUM, *(f"--{flag}" for flag in flags),
             f"--user-data-dir={folder}"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in theirs:
            os.close(fd)
        self.buffer = b""
        self.numbers = itertools.count(1)
        self.session: dict[str, str] = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def next(self) -> dict[str, Any]:
        """The next message: an answer or an event."""
        until = time.monotonic() + 60
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self.into, 1 << 20)
            assert read, "the browser is gone"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def evaluate(self, script: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Show a page at a width, in CSS pixels, in a colour scheme."""
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while self.next().get("method") != "Page.loadEventFired":
            pass

    def close(self) -> None:
        os.close(self.out)  # it ends with its pipe
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def probe(browser: Browser) -> list[str]:
    found: list[str] = browser.evaluate(PROBE)["found"]
    return found


# ---- The pages --------------------------------------------------------------------------------


def lines(steps: int, final: float) -> list[dict[str, Any]]:
    return [
        {"step": s, "loss": 9 * final / s, "ce": final + 4 / s, "kd": 30 / s**2}
        | ({"eval_loss": final + 3 / s, "eval_accuracy": 0.4 - 0.3 / s} if s % 20 == 1 else {})
        for s in range(1, steps + 1)
    ]


TASKS = "CoLA MNLI MRPC QNLI QQP RTE SST-2 STS-B WNLI".split()
GLUE = Table(
    "GLUE, development sets",
    ["model", "macro of nine", *TASKS],
    [
        ["teacher, all-MiniLM-L6-v2", *(f"8{i}.4 ± 0.{i}" for i in range(10))],
        ["distilled", *(f"7{i}.3 ± 1.{i}" for i in range(9)), ""],
        *(
            [name, *figures.split()]
            for name, figures in (
                ("BERT-base", "79.5 56.3 86.7 88.6 91.8 89.6 69.3 92.7 89.0 53.5"),
                ("DistilBERT", "77.0 51.3 82.2 87.5 89.2 88.5 59.9 91.3 86.9 56.3"),
            )
        ),
    ],
    "Medians of five seeds.",
    published=[2, 3],
)
LOSSES = Chart(
    "Without one of the losses",
    "change of the macro score",
    {
        "triple loss": [0.0, 0.0, 0.0],
        "without the soft-target loss": [-2.9, -3.1, -2.2],
        "student initialised at random and not from every other layer": [-4.4, -3.9, float("nan")],
    },
    zero=True,
)


def full() -> Report:
    """Every section, as runs fill them."""
    guesses = [Guess("paris", 0.97), Guess("lille", 0.02)]
    row = ModelRow("distilled", 17_400_000, 66.4, 4.377, 0.316, 0.584, 502.0, 500)
    return Report(
        title="Six layers to three",
        lead="Held-out loss of the distilled student: 4.377.",
        models=[
            ModelRow("teacher", 22_700_000, 86.6, 4.052, 0.364, None, 774.0, 900, "six layers"),
            row,
            replace(row, name="undistilled", eval_loss=4.519),
        ],
        curves={"distilled": lines(300, 2.0), "undistilled": lines(300, 3.0)},
        samples=[
            Sample("Paris is the [MASK] of France.", dict.fromkeys(("teacher", "student"), guesses))
        ],
        facts={"device": "2 cores of an AMD EPYC", "tokens": "6,144,000"},
        config={"distilled": "steps: 500\n", "undistilled": f"source: {'x' * 200}\n"},
        tables=[GLUE, Table("What differs", ["key", "a", "b"], [["loss.kd_weight", "5.0", "0.0"]])],
        charts=[LOSSES, Chart("Held-out loss", "nats", {"one": [2.31, 2.32], "two": [2.5, 2.6]})],
        commands=["distilfast glue --model runs/a/model --data glue --seeds 5 --output runs/glue"],
    )


def hard() -> Report:
    """Long words wherever there is text, many runs, numbers of every size."""
    word, report = "w" * 70, full()
    many = {f"run {i} {word}": lines(40, 10.0**i) for i in range(-6, 7, 2)}
    values = {f"{word} {i}": [1e-6 * i, 1e6, -1e6] for i in range(3)}
    return replace(
        report,
        title=word,
        lead=word,
        models=[*report.models, replace(report.models[1], name=word, note=word, size_mib=123456.7)],
        curves=many,
        samples=[Sample(f"{word} [MASK]", {word: [Guess(word, 0.5)]}, word)],
        facts={word: word},
        tables=[
            replace(GLUE, title=word, caption=word, rows=[[word, *r[1:]] for r in GLUE.rows]),
            Table(word, ["key", *many], [["key", *([word] * len(many))]]),
        ],
        charts=[
            Chart(word, word, values, True, word),
            Chart("tiny", "", {"a": [1e-6, 1.0001e-6]}),
            Chart("large offset", "", {"a": [123456.1, 123456.2]}),
            Chart("one value", "", {"a": [0.25]}),
            Chart("nothing finite", "", {"a": [float("nan")], "b": []}),
        ],
        commands=[f"distilfast {word}"],
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {"full": full(), "hard": hard()}
    return {name: write_report(r, folder / f"{name}.html") for name, r in reports.items()}


# ---- What a reader sees -----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390, 360])
@pytest.mark.parametrize("name", ["full", "hard"])
def test_nothing_is_cut_off_overlaps_or_fades(
    name: str, width: int, scheme: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width, scheme)
    assert probe(browser) == []


def test_eleven_columns_need_no_scrolling_on_a_desktop(
    browser: Browser, pages: dict[str, Path]
) -> None:
    overflow = (
        "[...document.querySelectorAll('[role=region]')].map(e => e.scrollWidth - e.clientWidth)"
    )
    browser.open(pages["full"], 1280)
    assert browser.evaluate(overflow) == [0, 0]
    browser.open(pages["full"], 390)
    assert [pixels > 0 for pixels in browser.evaluate(overflow)] == [True, False]


def test_dark_mode_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(pages["full"], 390, "dark")
    dark = browser.evaluate(ground)
    browser.open(pages["full"], 390, "light")
    assert (dark, browser.evaluate(ground)) == ("rgb(20, 23, 26)", "rgb(255, 255, 255)")


@pytest.mark.parametrize(
    ("fault", "width", "found"),
    [
        (".scroll { overflow-x: visible }", 390, "the page scrolls sideways"),
        (".scroll { overflow-x: visible }", 390, "beyond the column: TABLE.data"),
        (".scroll { overflow-x: hidden }", 390, "cut off: DIV.scroll"),
        (".data th:first-child { position: static }", 390, "a row's name scrolls away"),
        (".data th:first-child { min-width: 15rem }", 390, "a row's name leaves no room"),
        (".data th:first-child { z-index: -1 }", 390, "a row's name is covered"),
        (".caption { min-width: 120vw }", 1280, "beyond the column: P.caption"),
        (".word { width: 2rem; overflow-wrap: normal }", 390, "text wider than"),
        (
            ".panels { grid-template-columns: repeat(2, 30rem) }",
            1280,
            "beyond the column: DIV.panel",
        ),
        (".plot text { font-size: 40px !important }", 1280, "overlap: text"),
        (".plot text { font-size: 8px !important }", 390, "too small to read"),
        (".axis text { font-size: 90px }", 390, "overlap: text"),
        (".plot svg { height: 0 }", 1280, "size of a plot"),
        (".strip svg { position: static; height: auto; aspect-ratio: 1 }", 1280, "size of a plot"),
        (".strip circle { r: 0 }", 1280, "nothing drawn"),
        (":root { --muted: #808890 }", 1280, "contrast 3"),
        (".published > * { opacity: 1; color: #999 }", 1280, "contrast 2.8"),
    ],
)
def test_the_probe_finds_what_is_wrong(
    fault: str, width: int, found: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["full"], width)
    add = "document.head.appendChild(document.createElement('style')).textContent = "
    browser.evaluate(add + json.dumps(fault))
    assert [line for line in probe(browser) if line.startswith(found)], probe(browser)
