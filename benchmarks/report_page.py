"""How fast the rollout browser of a report opens and scrolls, beside the same page that loads every rollout at once.

    python benchmarks/report_page.py REPORT [--rounds 5] [--out benchmarks/results/report_page.json]

REPORT is a folder of `dualvla report` with a thousand rollouts or so; Chromium opens both pages from disk, in turn.
Wall times: what else the machine does counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"]
_INDEX = '<script defer src="data/index.js"></script>'
_PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
_SCROLL = """async () => {
    const list = document.getElementById("list"), frames = [];
    let last = await new Promise(requestAnimationFrame);
    for (let i = 0; i < 60; i++) {
        list.scrollTop += 700;
        const now = await new Promise(requestAnimationFrame);
        frames.push(now - last);
        last = now;
    }
    return frames.sort((a, b) => a - b)[57];
}"""


def eager_page(report: Path) -> None:
    """The baseline: rollouts.html that names every rollout's data in its head."""
    scripts = "".join(
        f'<script defer src="data/{file.name}"></script>'
        for file in sorted((report / "data").glob("*.js"))
        if file.name != "index.js"
    )
    page = (report / "rollouts.html").read_text()
    (report / "eager.html").write_text(page.replace(_INDEX, scripts + _INDEX))


def measure(browser: Browser, url: str) -> dict[str, float]:
    """One cold opening: ms to the first paint, to the first rollout shown, and the 95th percentile of a frame."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(url, wait_until="commit")
    page.locator(".pane").wait_for()
    found = {
        "first_paint_ms": page.evaluate(_PAINT),
        "first_rollout_ms": page.evaluate("() => performance.now()"),
        "heap_mb": page.evaluate("() => performance.memory.usedJSHeapSize / 1e6"),
        "frame_p95_ms": page.evaluate(_SCROLL),
    }
    page.close()
    return found


def run(report: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copy = Path(folder) / "report"
        shutil.copytree(report, copy)
        eager_page(copy)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)
        names = {"lazy": "rollouts.html", "eager": "eager.html"}
        seen = {
            kind: [measure(browser, f"file://{copy / name}") for _ in range(rounds)] for kind, name in names.items()
        }
        chromium = browser.version
        browser.close()
    medians = {
        kind: {key: round(statistics.median(r[key] for r in rows), 1) for key in rows[0]} for kind, rows in seen.items()
    }
    needed = [f for f in report.iterdir() if f.suffix in (".css", ".js")]
    data = [f for f in (report / "data").glob("*.js") if f.name != "index.js"]
    before_films = sum(f.stat().st_size for f in (*needed, report / "rollouts.html", report / "data/index.js"))
    return {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, no GPU, Chromium {chromium}",
        "load_1min": round(os.getloadavg()[0], 1),
        "rollouts": len(data),
        "page_mb_before_films": round(before_films / 1e6, 2),
        "all_data_mb": round(sum(f.stat().st_size for f in data) / 1e6, 1),
        **medians,
        "ratio_first_rollout": round(medians["eager"]["first_rollout_ms"] / medians["lazy"]["first_rollout_ms"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, metavar="REPORT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the result is written as JSON")
    arguments = parser.parse_args()
    result = json.dumps(run(arguments.report.resolve(), arguments.rounds), indent=2)
    print(result)
    if arguments.out:
        arguments.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
