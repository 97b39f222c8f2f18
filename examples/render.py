"""Run a script in cells and write a page with its texts, programs, outputs and pictures.

    python examples/render.py examples/walkthrough.py walkthrough.html

A line ``# %%`` begins a cell, ``# %% [markdown]`` one whose comments are text in Markdown. The
cells run in the current folder, which keeps the files that they write.
"""

import base64
import contextlib
import io
import re
import sys
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from lplb_triton.bench.report.style import STYLE

CODE = """
pre { background: var(--card); padding: 10px 12px; overflow-x: auto; font-size: .8rem;
  line-height: 1.4; overflow-wrap: normal }
pre.output { border-left: 4px solid var(--lp) } iframe { width: 100%; height: 700px; border: 0 }
img { max-width: 100% }
"""


def split_cells(text: str) -> list[tuple[str, str]]:
    """Return the cells of a script as (``"markdown"`` or ``"code"``, content)."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        first, _, rest = part.partition("\n")
        if "[markdown]" in first:
            lines = [line.removeprefix("#").removeprefix(" ") for line in rest.splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", rest.strip("\n")))
    return cells


def show_output(text: str, page: Path) -> str:
    """Lay out what a cell printed, with the pictures and reports that it names."""
    body = f'<pre class="output">{escape(text)}</pre>' if text.strip() else ""
    for name in re.findall(r"^picture: (.+)$", text, re.MULTILINE):
        data = base64.b64encode(Path(name).read_bytes()).decode()
        body += f'\n<img src="data:image/png;base64,{data}" alt="Picture of {escape(name)}">'
    for name in re.findall(r"^report: (.+)$", text, re.MULTILINE):
        link = escape(Path(name).resolve().relative_to(page.resolve().parent).as_posix())
        body += f'\n<p><a href="{link}">The report</a> by itself, and here:</p>'
        body += f'\n<iframe src="{link}" title="The report"></iframe>'
    return body


def render(script: Path, page: Path) -> None:
    """Run the cells of ``script`` one after the other, and write ``page``."""
    names: dict[str, object] = {"__name__": "__main__"}
    markdown, parts, title = MarkdownIt(), [], script.stem
    for kind, content in split_cells(script.read_text(encoding="utf-8")):
        if kind == "markdown":
            parts.append(markdown.render(content))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(content, str(script), "exec"), names)
        parts.append(f"<pre>{escape(content)}</pre>\n{show_output(printed.getvalue(), page)}")
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{CODE}</style>\n</head>\n<body>\n"
        '<div class="page" style="display: block; max-width: 860px">\n'
        + "\n".join(parts)
        + "\n</div>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    print(f"page: {page}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    render(Path(sys.argv[1]), Path(sys.argv[2]))
