"""Takes a picture of a page in headless Chromium, as in the README.

python scripts/docs/screenshot.py runs/scenes/report.html docs/report.png --width 1280 --height 1500
python scripts/docs/screenshot.py runs/scenes/report.html docs/report-narrow.png --width 390 --height 844 --dark
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))
from browser import NAMES, find_browser, started_browser


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--scale", type=float, default=1, help="pixels of the picture for each pixel of the page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--at", default="", help="the id of a section that is scrolled to, such as curves")
    parser.add_argument("--whole", action="store_true", help="the whole page, not what the window shows")
    options = parser.parse_args()
    program = find_browser()
    if program is None:
        sys.stderr.write(f"expected one of {', '.join(NAMES)} in PATH\n")
        return 2
    scheme = "dark" if options.dark else "light"
    with started_browser(program) as browser:
        visit = browser.visit(options.page, options.width, options.height, scheme, options.scale)
        if options.at:
            browser.evaluate(visit, f"document.getElementById('{options.at}').scrollIntoView({{behavior: 'instant'}})")
        picture = Image.open(io.BytesIO(browser.screenshot(visit, options.whole)))
    picture.convert("RGB").save(options.file, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
