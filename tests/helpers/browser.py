"""Pages in a headless Chromium. It is no requirement of the project: a test that needs it is skipped without it."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

# In an inner frame each page has the width that is asked for; a window of Chromium has a least one.
FRAME = '<iframe src="{page}" style="width: {width}px; height: {height}px; border: 0; display: block"></iframe>'
# The outer page writes how wide each one wants to be.
MEASURE = """<!doctype html><body><pre id="widths"></pre><script>
(async () => {
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "width: WIDTHpx; height: 800px; border: 0";
    document.body.append(frame);
    await new Promise((done) => { frame.onload = done; frame.src = page; });
    const width = frame.contentDocument.documentElement.scrollWidth;
    document.getElementById("widths").append(page + " " + width + "\\n");
    frame.remove();
  }
  document.title = "measured";
})();
</script></body>"""


def page_widths(pages: Sequence[Path], width: int, folder: Path) -> dict[str, int]:
    """Address -> pixels that the page takes where it is given ``width``. ``folder``: for the files of the browser."""
    names = [path.as_uri() for path in pages]
    outer = folder / "measure.html"
    outer.write_text(MEASURE.replace("PAGES", str(names)).replace("WIDTH", str(width)))
    text = _chromium(folder, "--virtual-time-budget=60000", "--dump-dom", outer.as_uri())
    widths = dict(line.rsplit(" ", 1) for line in re.findall(r"file:\S+ \d+", text))
    assert set(widths) == set(names), text[-2000:]
    return {name: int(value) for name, value in widths.items()}


def screenshots(
    pages: Sequence[Path], size: tuple[int, int], folder: Path, *, dark: bool
) -> list[Image.Image]:
    """The upper part of each page, ``size`` pixels (width, height) of it, for a reader who prefers dark pages or light ones."""
    width, height = size
    frames = [FRAME.format(page=page.as_uri(), width=width, height=height) for page in pages]
    outer, picture = folder / "frames.html", folder / "frames.png"
    outer.write_text(f"<!doctype html><body style='margin: 0'>{''.join(frames)}</body>")
    _chromium(
        folder,
        f"--window-size={max(width, 600)},{height * len(pages)}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *("--hide-scrollbars", f"--screenshot={picture}", outer.as_uri()),
    )
    with Image.open(picture) as shown:
        whole = shown.convert("RGB")
    places = [(0, height * i, width, height * (i + 1)) for i in range(len(pages))]
    return [whole.crop(place) for place in places]


def _chromium(folder: Path, *arguments: str) -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]  # fmt: skip
    command += [f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
