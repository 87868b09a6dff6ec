"""The page of a run says what its metrics say, needs nothing beside it, and compares runs."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reference_trainer.logging.metrics import _line, read
from reference_trainer.main import main
from reference_trainer.report.recorded import open_run
from tests.trainer.runs import TINY, records

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Collects the cells of every table, the text of pictures and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.drawn, self.fetched, self.tags = {}, [], [], set()
        self._path, self._row = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        known = dict(attributes)
        self.fetched += [
            v for k, v in known.items() if k in ("src", "href", "xlink:href") and v[:1] != "#"
        ]
        self._path.append(tag)
        if tag == "tr":
            self._row = []

    def handle_endtag(self, tag):
        while self._path and self._path.pop() != tag:
            pass
        if tag == "tr" and self._row:
            self.cells.setdefault(self._row[0], self._row[1:])

    def handle_data(self, data):
        if self._path and self._path[-1] in ("td", "th"):
            self._row.append(data)
        if "svg" in self._path and data.strip():
            self.drawn.append(data.strip())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs in a directory: of rank 4, and of rank 2 with another rate."""
    directory = tmp_path_factory.mktemp("report")
    before = Path.cwd()
    os.chdir(directory)
    try:
        assert main(["train", *TINY]) == 0
        other = ["--name", "other", "--relora.rank", "2", "--optim.lr", "0.01"]
        assert main(["train", *TINY, *other]) == 0
    finally:
        os.chdir(before)
    return directory / "runs"


def page_of(*arguments):
    assert main(["report", *map(str, arguments)]) == 0
    named = [a for a in arguments if str(a).endswith(".html")]
    return Page((named[0] if named else arguments[0] / "report.html").read_text())


class TestAPage:
    def test_it_says_what_the_metrics_say(self, runs, capsys):
        run = runs / "first-run"
        page = page_of(run)
        assert f"page:    {run}/report.html" in capsys.readouterr().out
        held_out = [r["held_out_loss"] for r in records(run, "evaluation")]
        end = records(run, "end")[-1]
        assert page.cells["progress"] == ["20 of 20 steps"]
        assert page.cells["tokens"] == [f"{20 * 4 * 32:,}"]
        assert page.cells["held-out loss at first"] == [f"{held_out[0]:.4f}"]
        assert page.cells["after the warm start"] == [f"{held_out[1]:.4f}"]
        assert page.cells["at last"] == [f"{held_out[-1]:.4f}"]
        assert page.cells["restarts"] == ["2"]
        ranks = end["ranks"].values()
        assert page.cells["rank of the update"] == [
            f"{min(ranks)} to {max(ranks)} after 3 cycles, bound 12"
        ]
        for number, record in enumerate(records(run, "restart"), start=1):
            assert page.cells[str(number)][0] == str(record["step"])
            assert page.cells[str(number)][1] == f"{record['mean_update_norm']:.3g}"
            assert page.cells[str(number)][2] == f"{record['zeroed_fraction']:.2%}"
        assert page.cells["relora.rank"] == ["4"]
        assert page.cells["torch"] == [records(run, "start")[0]["torch"]]
        for title in ("loss, nats a token", "learning rate", "tokens a second", "bound k·r"):
            assert title in page.drawn
        assert any("singular values" in text for text in page.drawn)

    def test_it_needs_nothing_beside_it(self, runs):
        page = page_of(runs / "first-run")
        assert page.fetched == ["data:,"]
        assert not page.tags & {"script", "img", "iframe", "object"}

    def test_the_same_run_gives_the_same_page(self, runs):
        texts = []
        for _ in range(2):
            page_of(runs / "first-run")
            text = (runs / "first-run/report.html").read_text()
            texts.append(re.sub(r"<p>made .*</p>", "", text))
        assert texts[0] == texts[1]

    def test_names_are_text(self, runs, tmp_path):
        evil = tmp_path / "<script>alert(1)<"
        shutil.copytree(runs / "first-run", evil)
        page_of(evil, "--out", tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        assert "<script" not in text
        assert "&lt;script&gt;alert(1)&lt;" in text


def test_every_value_of_a_record_is_documented(runs):
    text = (Path(__file__).parents[3] / "docs/reference/files.md").read_text()
    table = text[text.index("## metrics.jsonl") :]
    documented = {
        event: set(re.findall(r"`([\w.]+)`", values))
        for event, values in re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", table, re.MULTILINE)
    }
    written = {}
    for record in read(runs / "first-run/metrics.jsonl"):
        written.setdefault(record["event"], set()).update(record.keys() - {"event", "step"})
    assert set(written) == {"start", "step", "evaluation", "restart", "end"}
    assert documented.keys() == written.keys() | {"skipped", "spike", "compiled"}
    for event, names in written.items():
        assert documented[event] == names


def without(records, *names):
    return [{k: v for k, v in record.items() if k not in names} for record in records]


class TestOtherRuns:
    def write(self, directory, records):
        directory.mkdir()
        (directory / "metrics.jsonl").write_text("".join(map(_line, records)))
        return directory

    def test_one_without_a_warm_start_is_handed_nothing_over(self, runs, tmp_path):
        records = [
            {**r, "phase": "relora"} if "phase" in r else r
            for r in read(runs / "first-run/metrics.jsonl")
        ]
        run = open_run(self.write(tmp_path / "run", records))
        assert run.handed_over is None
        assert open_run(runs / "first-run").handed_over == 6

    def test_ones_that_knew_less_are_shown_beside_others(self, runs, tmp_path):
        lines = read(runs / "first-run/metrics.jsonl")
        old = without(lines, "effective_ranks", "stable_ranks", "spectra", "peak_memory")
        other = self.write(tmp_path / "old", old)
        page = page_of(runs / "first-run", other, "--out", tmp_path / "page.html")
        assert page.cells["relora.rank"] == ["4", "-"]
        text = (tmp_path / "page.html").read_text()
        assert "The same in all runs." in text

    def test_the_last_steps_may_be_skipped_ones(self, runs, tmp_path):
        lines = read(runs / "first-run/metrics.jsonl")
        last = [r for r in lines if r["event"] != "step" or r["step"] < 19]
        last.append({"event": "skipped", "step": 19, "phase": "relora", "loss": "nan"})
        run = open_run(self.write(tmp_path / "run", last))
        assert run.steps[0] == 20


class TestRunsBesideEachOther:
    def test_each_has_a_column_and_what_differs_is_shown(self, runs, tmp_path):
        page = page_of(runs / "first-run", runs / "other", "--out", tmp_path / "page.html")
        assert page.cells["rank of the update"] == [
            "12 to 12 after 3 cycles, bound 12",
            "6 to 6 after 3 cycles, bound 6",
        ]
        assert page.cells["relora.rank"] == ["4", "2"]
        text = (tmp_path / "page.html").read_text()
        differing = text[text.index("<h2>Options") : text.index("<details>")]
        assert set(re.findall(r"<tr><th>([a-z_.]+)</th>", differing)) == {
            *("name", "optim.lr", "relora.rank")
        }
        assert {"first-run", "other"} <= set(page.drawn)
        assert not (tmp_path / "page.png").exists()

    def test_a_name_is_no_formula(self, runs, tmp_path):
        dear = tmp_path / "$a_1$"
        shutil.copytree(runs / "other", dear)
        drawn = page_of(runs / "first-run", dear, "--out", tmp_path / "page.html").drawn
        assert {text for text in drawn if "$" in text} == {"$a_1$"}

    def test_they_need_a_place(self, runs, capsys):
        assert main(["report", str(runs / "first-run"), str(runs / "other")]) == 2
        assert "--out must be given for several runs" in capsys.readouterr().err


@pytest.fixture
def growing(runs, tmp_path):
    """Return a run in mid-course, and a function that lets it come to its end."""
    whole = runs / "first-run"
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(whole / "config.yaml", half)
    lines = [_line(r) for r in read(whole / "metrics.jsonl")]
    (half / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:20])
    return half, lambda: shutil.copy(whole / "metrics.jsonl", half)


class TestWhileItRuns:
    def test_what_is_known_is_shown(self, growing):
        page = page_of(growing[0])
        assert page.cells["progress"][0].endswith("of 20 steps, not at its end")
        assert "known at the end" in page.drawn

    def test_any_beginning_of_a_run_is_shown(self, growing, runs):
        lines = [_line(r) for r in read(runs / "first-run/metrics.jsonl")]
        first = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == "step")
        for count in range(first + 1, len(lines), 5):
            (growing[0] / "metrics.jsonl").write_text("".join(lines[:count]))
            page_of(growing[0])

    def test_it_is_made_again_until_the_end(self, growing):
        half, finish = growing
        watching = threading.Thread(target=main, args=[["report", str(half), "--watch", "1"]])
        watching.start()
        page = half / "report.html"
        late = time.monotonic() + 60
        while not page.exists():
            assert time.monotonic() < late
            time.sleep(0.05)
        assert '<meta http-equiv="refresh" content="1">' in page.read_text()
        finish()
        watching.join(timeout=60)
        assert not watching.is_alive()
        assert "refresh" not in page.read_text()
        assert Page(page.read_text()).cells["progress"] == ["20 of 20 steps"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [("", "holds no training step"), ('{"event": "start"}\n', "is damaged")],
    )
    def test_metrics_of_nothing(self, growing, capsys, text, message):
        half = growing[0]
        (half / "metrics.jsonl").write_text(text)
        assert main(["report", str(half)]) == 2
        assert message in capsys.readouterr().err
        assert not (half / "report.html").exists()

    def test_a_watch_of_no_time(self, runs, capsys):
        assert main(["report", str(runs / "first-run"), "--watch", "0"]) == 2
        assert "1 second or more; got 0" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
class TestInABrowser:
    def test_it_is_drawn_without_a_complaint(self, runs, tmp_path):
        page_of(runs / "first-run", runs / "other", "--out", tmp_path / "page.html")
        picture = tmp_path / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        taken = [*flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,2400"]
        run = subprocess.run(
            [BROWSER, *taken, f"--screenshot={picture}", f"file://{tmp_path}/page.html"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        assert "CONSOLE" not in run.stderr
        from matplotlib.image import imread

        shown = imread(picture)
        assert shown.shape[:2] == (2400, 1300)
        figure = shown[700:1800, :, :3]
        assert (figure.max(-1) - figure.min(-1) > 0.3).mean() > 0.001  # lines in colours
