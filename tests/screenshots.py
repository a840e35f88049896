"""The pictures of the documentation, taken in a headless browser of a run: its report, and TensorBoard's first screen.

    python -m tests.screenshots runs/quickstart          writes docs/images/report.png, report-phone.png, tensorboard.png

In: a run directory, which is only read. Out: PNG files. The tests take the same pictures of a made-up run.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pipeline.report.page import render
from tests.browser import Browser, NoBrowserError, open_browser
from tests.tensorboard_server import tensorboard_server

REPORT, PHONE, TENSORBOARD = "report.png", "report-phone.png", "tensorboard.png"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLORS = 128  # of the palette: flat charts look the same with it, in a third of the bytes
# Without WebGL (tests/browser.py) the curves are paths, so that a script sees whether they are there.
CARDS_ARE_DRAWN = """(() => {
  const cards = [...document.querySelectorAll("card-view")].filter(card => card.getBoundingClientRect().top < innerHeight);
  return cards.length > 1 && cards.every(card => card.querySelector(".series-view > svg path"));
})()"""


def take_report(browser: Browser, page: Path, directory: Path) -> list[Path]:
    """The top of a report on a desktop and on a phone."""
    taken = []
    for name, width, height, scale in ((REPORT, 1000, 1400, 1.25), (PHONE, 390, 844, 2.0)):
        browser.show(width, height, scale)
        browser.open(page.as_uri())
        browser.screenshot(directory / name)
        taken.append(_with_palette(directory / name))
    return taken


def take_tensorboard(browser: Browser, log_dir: Path, directory: Path) -> Path:
    """TensorBoard as its address opens it, with the curves of the runs below `log_dir`."""
    with tensorboard_server(log_dir, directory / "tensorboard.log") as address:
        browser.show(1440, 900)
        browser.open(address)
        browser.wait(CARDS_ARE_DRAWN)
        browser.screenshot(directory / TENSORBOARD)
    return _with_palette(directory / TENSORBOARD)


def _with_palette(path: Path) -> Path:
    out = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(out, format="png", optimize=True)
    path.write_bytes(out.getvalue())
    return path


def main() -> None:
    """Take the pictures of a run and move them to `--output`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run_dir", type=Path, nargs="?", default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    if not (run_dir / "tensorboard").is_dir():
        sys.exit(f"error: {arguments.run_dir} has no curves. Make them: make demo")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        page, log_dir = directory / "report.html", directory / "runs"
        page.write_text(render(run_dir), encoding="utf-8")
        (log_dir / run_dir.name).mkdir(parents=True)
        (log_dir / run_dir.name / "tensorboard").symlink_to(run_dir / "tensorboard")
        try:
            with open_browser(directory / "profile") as browser:
                taken = [*take_report(browser, page, directory), take_tensorboard(browser, log_dir, directory)]
        except NoBrowserError as error:
            sys.exit(f"error: {error}")
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path in taken:
            target = arguments.output / path.name
            target.write_bytes(path.read_bytes())
            print(f"{target} ({target.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
