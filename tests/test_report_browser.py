"""The report in a real browser: figures are drawn, sorting works, nothing is too wide."""

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
from report_runs import make_disabling, make_finetune, make_run, ontology

from moe_jax.core import files
from moe_jax.report.build import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
TASKS, LAYERS, EXPERTS = 24, 4, 3

# Runs in the outer page, which holds the report in a frame of a given width.
PROBE = """
const frame = document.querySelector('iframe');
frame.addEventListener('load', () => {
  const page = frame.contentDocument, found = {};
  const routes = page.querySelector('figure[data-figure=routes]');
  const all = selector => [...routes.querySelectorAll(selector)];
  const change = (element, value, kind) => {
    element.value = value;
    element.dispatchEvent(new Event(kind, {bubbles: true}));
  };
  found.cells = all('rect.cell').length;
  found.figures = [...page.querySelectorAll('figure[data-figure]')]
    .map(f => [f.dataset.figure, f.querySelectorAll('svg').length]);
  found.given = routes.dataset.order.split('\\n');
  found.choices = all('.sort option').map(o => [o.value, o.textContent]);
  found.orders = {};
  for (const [value] of found.choices) {
    change(routes.querySelector('.sort'), value, 'change');
    found.orders[value] = routes.dataset.order.split('\\n');
  }
  change(routes.querySelector('.sort'), 'given', 'change');
  all('[data-column]')[5].dispatchEvent(new MouseEvent('click', {bubbles: true}));
  found.clicked = routes.dataset.order.split('\\n');
  const said = () => page.getElementById('tip').textContent;
  const cell = routes.querySelector('[data-i="7"]');
  cell.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 5, clientY: 5}));
  found.tip = said();
  found.frames = +routes.querySelector('input[type=range]').max + 1;
  change(routes.querySelector('input[type=range]'), 0, 'input');
  found.first = routes.querySelector('output').textContent;
  // [radius of a dot, that of one drawn on top of it]
  found.covered = [...page.querySelectorAll('figure svg')].flatMap(svg => {
    const dots = [...svg.querySelectorAll('circle')].map(c =>
      ['cx', 'cy', 'r'].map(name => +c.getAttribute(name)));
    return dots.flatMap(([x, y, r], i) => dots.slice(i + 1)
      .filter(d => Math.abs(d[0] - x) < 3 && Math.abs(d[1] - y) < 5).map(d => [r, d[2]]));
  });
  found.width = [frame.contentWindow.innerWidth, page.documentElement.scrollWidth];
  found.wide = [...page.querySelectorAll('body *')]
    .filter(e => !e.parentElement.closest('.scroll'))
    .filter(e => e.getBoundingClientRect().right > frame.contentWindow.innerWidth + .5)
    .map(e => e.outerHTML.slice(0, 80));
  found.paper = frame.contentWindow.getComputedStyle(page.body).backgroundColor;
  const link = routes.querySelector('a');
  frame.contentWindow.addEventListener('hashchange', () => setTimeout(() => {
    found.opened = page.querySelector(link.getAttribute('href')).open;
    document.body.dataset.found = JSON.stringify(found);
  }));
  frame.contentWindow.location.hash = link.getAttribute('href');
});
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(directory, page) of a report with everything in it."""
    path = tmp_path_factory.mktemp("browser")
    places = ontology(TASKS) | {"<b>$x$</b>_task_with_a_very_long_name_" + "x" * 60: ("z", "s")}
    runs = {"dense": make_run(path / "dense", places, experts=0),
            "moe": make_run(path / "moe", places, LAYERS, EXPERTS, seed=1)}  # fmt: skip
    make_disabling(runs["moe"])
    scores = [runs[name] / "eval" / "test" / "scores.jsonl" for name in ("dense", "moe")]
    files.write_bytes(scores[0], scores[1].read_bytes())  # so that all dots are on others
    made = report(path / "report", runs, make_finetune(path / "f", 4), permutations=20)
    return path, made.page


def look(made, width: int, *flags: str) -> tuple[dict, list[str]]:
    """What the probe found in a frame `width` pixels wide, and the console's lines."""
    path, page = made
    text = page.read_text(encoding="utf-8")
    assert "<head>" in text
    outer = path / f"outer{width}.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>'
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(text)}">'
        f"</iframe><script>{PROBE}</script></body>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={path / 'profile'}", "--window-size=1400,1000",
         "--enable-logging=stderr", "--virtual-time-budget=20000", *flags,
         "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, "\n".join(console) or done.stderr[-1000:]
    return json.loads(html.unescape(found[1])), console


@needs_browser
def test_the_page_works_in_a_browser(made):
    found, console = look(made, 1200)
    assert console == []
    assert found["cells"] == (TASKS + 1) * LAYERS * EXPERTS
    assert all(svgs == 1 for _, svgs in found["figures"]) and len(found["figures"]) >= 9
    assert found["frames"] == 5 and found["first"] == "step 200"
    assert found["tip"].startswith(found["given"][0]) and "encoder.2" not in found["tip"]
    assert "decoder.0 expert 1: weight 0." in found["tip"]

    numbers = json.loads((made[0] / "report" / "report.json").read_text())["routes"]["tasks"]
    tasks = sorted(numbers)
    assert sorted(found["given"]) == tasks
    category = {task: numbers[task]["category"] for task in tasks}
    chosen = {text: found["orders"][value] for value, text in found["choices"]}
    for name in set(category.values()):  # the category comes first
        order = chosen[name]
        inside = [category[task] == name for task in order]
        assert sorted(order) == tasks and inside == sorted(inside, reverse=True)
    for n, layer in enumerate(("encoder.0", "encoder.1", "decoder.0", "decoder.1")):
        for e in range(EXPERTS):
            order = chosen[f"{layer} expert {e}"]
            weights = [numbers[task]["route"][n][e] for task in order]
            assert sorted(order) == tasks
            assert all(a >= b - 1e-4 for a, b in pairwise(weights))
    assert found["clicked"] == chosen["encoder.1 expert 2"]
    assert found["opened"]


@needs_browser
def test_no_dot_hides_another(made):
    found, _ = look(made, 1000)
    assert len(found["covered"]) >= TASKS
    assert all(below > above for below, above in found["covered"])


@needs_browser
def test_nothing_is_wider_than_a_phone(made):
    found, console = look(made, 400)
    assert console == []
    assert found["width"][0] == 400 and found["width"][1] <= 400
    assert found["wide"] == []
    assert found["cells"] == (TASKS + 1) * LAYERS * EXPERTS


@needs_browser
def test_dark_mode_is_dark(made):
    light, _ = look(made, 400)
    dark, _ = look(made, 400, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    brightness = [sum(map(int, re.findall(r"\d+", x["paper"])[:3])) for x in (light, dark)]
    assert brightness[0] > 700 and brightness[1] < 200
