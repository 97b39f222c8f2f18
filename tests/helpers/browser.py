"""Show a page in headless Chromium at several widths, and measure its elements."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The page is shown in a frame of each width; what is wrong becomes the text of an element.
MEASURE = r"""
function faults(frame) {
  const page = frame.contentDocument, found = [], wide = page.documentElement.clientWidth;
  if (page.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  for (const e of page.querySelectorAll("h1,h2,h3,p,li,td,th,figcaption,dt,dd")) {
    const box = e.getBoundingClientRect();
    if (box.width && !e.closest(".scroll") && (box.left < -1 || box.right > wide + 1))
      found.push("beyond the page: " + e.textContent);
  }
  let pictures = 0;
  for (const svg of page.querySelectorAll("svg[role=img]")) {
    const area = svg.getBoundingClientRect();
    if (!area.width) continue;
    pictures += 1;
    const name = svg.getAttribute("aria-labelledby");
    if (area.right > wide + 1) found.push("beyond the page: " + name);
    const texts = [...svg.querySelectorAll("text")].map(e => [e, e.getBoundingClientRect()]);
    texts.forEach(([e, box], at) => {
      if (box.left < area.left - 1 || box.right > area.right + 1 || box.top < area.top - 1
          || box.bottom > area.bottom + 1) found.push("cut off in " + name + ": " + e.textContent);
      if (parseFloat(getComputedStyle(e).fontSize) * area.width / svg.viewBox.baseVal.width < 9)
        found.push("small in " + name + ": " + e.textContent);
      for (const [other, its] of texts.slice(at + 1))
        if (Math.min(box.right, its.right) - Math.max(box.left, its.left) > 0.5
            && Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top) > 3)
          found.push("overlap in " + name + ": " + e.textContent + " / " + other.textContent);
    });
  }
  return {width: wide, pictures, found, ground: getComputedStyle(page.body).backgroundColor};
}
addEventListener("load", () => {
  document.getElementById("out").textContent =
    JSON.stringify([...document.querySelectorAll("iframe")].map(faults));
});
"""
SCHEMES = {"dark": 0, "light": 1}


def measure_page(text, widths, scheme, folder):
    """Return for each width how many pictures are shown, the ground colour and what is wrong."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:9000px;border:0" srcdoc="{escape(text)}"></iframe>'
        for width in widths
    )
    path = folder / "frames.html"
    path.write_text(f"<!DOCTYPE html><script>{MEASURE}</script>{frames}<pre id=out></pre>", "utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000"]
    options += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--dump-dom"]
    run = {"capture_output": True, "check": True, "timeout": 120, "env": dict(os.environ, LANG="C")}
    dom = subprocess.run([CHROMIUM, *options, path.as_uri()], **run).stdout.decode()
    return json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
