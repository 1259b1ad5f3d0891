"""The pages in a real browser: nothing is wider than the window, nothing is fetched, everything is legible, it prints.

Skipped where there is no Chromium (Debian: `apt-get install chromium`).
"""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_compare import make_comparison
from tests.test_report import make_calibration, make_report, planted_scores
from train import gate, report_compare
from train.report import completed, plain
from train.report_html import render
from train.report_parts import POLICY

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
OPTIONS += " disable-component-update hide-scrollbars allow-file-access-from-files"
# What the page says of itself: elements beyond the window's edge that no scrolling parent holds; what was loaded; and
# the least contrast of a text to what lies behind it, by WCAG 2.2 (4.5 is the least that it allows).
PROBE = r"""
const rgba = text => { const n = text.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1] };
const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
const light = c => { const p = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2] };
const behind = e => { const layers = []; for (let at = e; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]) };
const opacity = e => { let all = 1; for (let at = e; at; at = at.parentElement) all *= +getComputedStyle(at).opacity; return all };
const scrolls = e => { for (let at = e.parentElement; at; at = at.parentElement)
  if (getComputedStyle(at).overflowX !== 'visible' && at.getBoundingClientRect().right <= innerWidth + 1) return true; return false };
addEventListener('load', () => {
const found = { width: innerWidth, page: document.documentElement.scrollWidth, wide: [], faint: [],
  dark: matchMedia('(prefers-color-scheme:dark)').matches, loaded: performance.getEntriesByType('resource').map(e => e.name) };
for (const e of document.body.querySelectorAll('*')) {
  const box = e.getBoundingClientRect();
  if (!box.width || e.tagName === 'SCRIPT') continue;
  if (box.right > innerWidth + 1 && !scrolls(e)) found.wide.push(e.tagName + ' ' + e.textContent.slice(0, 30));
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const style = getComputedStyle(e), back = behind(e), ink = rgba(e.ownerSVGElement ? style.fill : style.color);
  const [a, b] = [light(over([ink[0], ink[1], ink[2], ink[3] * opacity(e)], back)), light(back)];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.faint.push(contrast.toFixed(2) + ' ' + e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30));
}
parent.postMessage(JSON.stringify(found), '*') });
"""  # noqa: E501
FRAME = """<!doctype html><meta charset="utf-8"><body><iframe src="page.html"
style="width:{width}px;height:3000px;border:0">
</iframe><pre id="found"></pre><script>
addEventListener('message', e => document.getElementById('found').textContent = e.data)</script></body>"""


def browse(folder: Path, file: Path, *more: str) -> str:
  """Opens a file in a fresh browser and returns what it prints."""
  flags = [f"--{name}" for name in OPTIONS.split()]
  command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", *more, file.as_uri()]
  return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def look(page: str, folder: Path, width: int, dark: bool) -> dict:
  """Returns what PROBE finds in a page; the policy, which forbids it to run, is lifted, so that all would be loaded."""
  loose = page.replace(POLICY, "default-src * 'unsafe-inline' data:")
  assert loose != page
  (folder / "page.html").write_text(loose.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
  (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
  scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
  shown = browse(
    folder, folder / "frame.html", "--window-size=1400,3200", scheme, "--virtual-time-budget=2000", "--dump-dom"
  )
  text = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1]
  return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@functools.cache
def full_report() -> str:
  """A page with every section, and names that are long."""
  report = make_report()
  report["matrix"]["multitask"]["triage"] |= {"interval": [0.85, 0.95], "calibration": make_calibration()}
  for share in (0.25, 0.75):
    name = f"averaged_{share:g}"
    sweep = {"of": "averaging", "share": share, "with": "continued"}
    report["stages"].append(
      {"name": name, "init_from": "multitask", "kind": "arm", "steps": 0, "tokens": 0, "seconds": 1.0, "sweep": sweep}
    )
    report["matrix"][name] = report["matrix"]["multitask"]
  report["skills"].append(
    {"name": "an_old_domain/a_task_with_quite_a_long_name", "kind": "generation", "metric": "chrf", "retained": True}
  )
  for row in report["matrix"].values():
    row["an_old_domain/a_task_with_quite_a_long_name"] = {"value": 0.5, "interval": [0.4, 0.6], "n": 40}
  rules = {
    "urgent_enough": {"skill": "triage", "at_least": 0.9, "sure": True},
    "kept": {"skill": "*", "keeps": 0.9},
    "dialect": {"skill": "domain", "better_than": "base"},
  }
  rules = gate.read_rules(rules, report["stages"], report["skills"])
  return render(plain(completed(report, planted_scores(), rules)))


@functools.cache
def comparison() -> str:
  """A page of two runs."""
  return report_compare.render(plain(make_comparison()))


PAGES = {"report": full_report, "comparison": comparison}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_the_page_fits_is_legible_and_fetches_nothing(name, width, dark, tmp_path):
  found = look(PAGES[name](), tmp_path, width, dark)
  assert (found["width"], found["dark"]) == (width, dark)
  assert found["page"] <= width and found["wide"] == []
  assert found["loaded"] == []
  assert found["faint"] == []


def test_the_probe_finds_what_is_wrong(tmp_path):
  page = f'<html><head><meta content="{POLICY}"></head><body><p style="width:900px;color:#bbb">faint</p>'
  found = look(page + '<img src="http://127.0.0.1:9/a.png"></body></html>', tmp_path, 390, False)
  assert found["page"] > 390 and found["wide"] and found["faint"] and found["loaded"]


def test_the_page_prints(tmp_path):
  (tmp_path / "page.html").write_text(full_report(), encoding="utf-8")
  browse(tmp_path, tmp_path / "page.html", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
  pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
  assert 2 <= pages <= 20
