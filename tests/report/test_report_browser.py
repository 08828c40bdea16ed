"""In headless Chromium the page prints nothing on the console, fits a phone, has nothing blank and can be dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pages import make_pages

image = pytest.importorskip("matplotlib.image")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
PHONE, DESK = 390, 1280
# A page around the page that measures how the browser shows it. The page itself may run no script.
PROBE = """
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0" onload="probe(this.contentDocument)"></iframe>
<pre id="found"></pre><script>
function probe(page) {{
  const scrolled = ".scroll > *, svg, details:not([open])";
  const inside = [...page.querySelectorAll("body *")].filter(each => !each.closest(scrolled));
  const wide = inside.filter(each => each.getBoundingClientRect().right > {width} + 0.5)
    .map(each => each.outerHTML.slice(0, 80));
  const size = name => {{
    const box = page.querySelector(name)?.getBoundingClientRect();
    return box?.width * box?.height || 0;
  }};
  const names = "h1, #figures, #charts svg, .matrix, .bars, .mistakes img, .filters img, #attempts, #config,"
    + " #environment";
  const images = [...page.images].filter(each => !each.closest("details:not([open])"));
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, wide,
    small: names.split(",").filter(name => size(name) < 400),
    scripts: page.scripts.length,
    broken: images.filter(each => !each.naturalWidth).length,
    images: images.length,
    charts: page.querySelectorAll("svg").length,
  }});
}}</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_pages(tmp_path_factory.mktemp("pages"))


def browse(profile: Path, url: str, *flags: str) -> tuple[str, list[str]]:
    """Open a URL; return (what Chromium printed, the lines of the page's console)."""
    assert BROWSER
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-extensions",
        "--enable-logging=stderr",
    )
    command = [BROWSER, *quiet, f"--user-data-dir={profile}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(tmp_path: Path, page: Path, width: int) -> dict:
    wrapper = page.parent / f"probe-{page.stem}-{width}.html"
    wrapper.write_text(PROBE.format(page=page.name, width=width))
    dom, console = browse(
        tmp_path, wrapper.as_uri(), "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=20000"
    )
    assert console == []
    text = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert text
    return json.loads(html.unescape(text[1]))


def screenshot(tmp_path: Path, page: Path, width: int, *flags: str) -> np.ndarray:
    file = tmp_path / "page.png"
    _, console = browse(tmp_path, page.as_uri(), f"--screenshot={file}", f"--window-size={width},2400", *flags)
    assert console == []
    pixels = image.imread(file)[:, :, :3]
    assert pixels.shape[:2] == (2400, width)
    return pixels


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["one", "seeds", "evil"])
def test_page_fits_and_everything_is_there(pages: dict[str, Path], tmp_path: Path, name: str, width: int) -> None:
    found = probe(tmp_path, pages[name], width)
    assert found["wide"] == []
    assert found["width"] <= width
    assert (found["small"], found["broken"], found["scripts"], found["charts"]) == ([], 0, 0, 6)
    assert found["images"] == {"one": 103, "seeds": 28, "evil": 6}[name]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_page_is_not_blank(pages: dict[str, Path], tmp_path: Path, width: int) -> None:
    pixels = screenshot(tmp_path, pages["one"], width)
    for part in np.array_split(pixels, 6):
        assert part.var() > 1e-3
    assert pixels.mean() > 0.7


def test_page_is_dark_where_the_reader_wants_it(pages: dict[str, Path], tmp_path: Path) -> None:
    pixels = screenshot(tmp_path, pages["one"], DESK, "--blink-settings=preferredColorScheme=0")
    assert pixels.mean() < 0.3
    assert all(part.var() > 1e-3 for part in np.array_split(pixels, 6))


def test_nobody_can_miss_the_fallback(pages: dict[str, Path], tmp_path: Path) -> None:
    top = screenshot(tmp_path, pages["evil"], PHONE)[:24]
    red, green, blue = top.reshape(-1, 3).mean(0)
    assert red > 0.6 > 0.4 > max(green, blue)


def test_page_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    """It prints on a few pages, with light colours even if the reader prefers dark ones."""
    file = tmp_path / "page.pdf"
    _, console = browse(
        tmp_path, pages["one"].as_uri(), f"--print-to-pdf={file}", "--blink-settings=preferredColorScheme=0"
    )
    assert console == []
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) <= 8
