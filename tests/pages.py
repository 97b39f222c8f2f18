"""Code blocks, links and headings of the pages, and the programs that shell blocks would call."""

import ast
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
# README.md, CONTRIBUTING.md and every page under docs/.
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
# A diff changes a file of another project, so it isn't run.
LANGUAGES = ("bash", "diff", "python", "text")
COMMANDS = ("compute-sanitizer", "lplb-bench", "make", "pip", "python", "torchrun")
# This comment precedes a block that can't run in a test, and gives the reason.
MARKER = re.compile(r"<!-- not run: (.*\S) -->")


@dataclass(frozen=True)
class Block:
    """A code block, with the heading that it is under and the reason if it can't be run."""

    page: str
    line: int
    heading: str
    language: str
    text: str
    not_run: str | None = None

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page, text=None):
    """Return the code blocks of a page in order; indented ones have the language ``indented``."""
    found, heading, previous = [], "", None
    for token in _tokens(page, text):
        if previous is not None and previous.type == "heading_open":
            heading = token.content
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "indented"
            marked = MARKER.fullmatch(previous.content.strip()) if previous is not None else None
            reason = marked[1] if marked and previous.type == "html_block" else None
            found.append(Block(page, token.map[0] + 1, heading, language, token.content, reason))
        previous = token
    return found


def in_language(page, language):
    """Return the blocks of a page in one language, in order."""
    return [block for block in blocks(page) if block.language == language]


def problem(block):
    """Return the fault of a block that shows before it is run, or None."""
    if block.language == "indented":
        shell = re.search(rf"^\s*\$?\s*({'|'.join(COMMANDS)})\b", block.text, re.MULTILINE)
        return "an indented block holds code: fence it" if shell or _is_python(block) else None
    if block.language not in LANGUAGES:
        return f"a fence must say one of {LANGUAGES}, got {block.language!r}"
    if block.language == "python" and not _is_python(block):
        return "not Python"
    return None


def _is_python(block):
    try:
        ast.parse(block.text)
    except SyntaxError:
        return False
    return True


def code_spans(page):
    """Return every `code span` of a page."""
    return [content for kind, content in code_by_heading(page) if kind == "code"]


def code_by_heading(page):
    """Return headings and code spans in order, as pairs ``("heading" or "code", text)``."""
    found, tokens = [], _tokens(page)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if before is not None and before.type == "heading_open":
            found.append(("heading", token.content))
        for child in token.children or ():
            if child.type == "code_inline":
                found.append(("code", child.content))
    return found


def links(page):
    """Return the targets of the links and pictures of a page."""
    children = [child for token in _tokens(page) for child in token.children or ()]
    found = [child.attrs["href"] for child in children if child.type == "link_open"]
    return found + [child.attrs["src"] for child in children if child.type == "image"]


def anchors(page):
    """Return the names by which links reach a page's headings, as GitHub makes them."""
    headings = [content for kind, content in code_by_heading(page) if kind == "heading"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _tokens(page, text=None):
    return MarkdownIt().enable("table").parse(text or (ROOT / page).read_text(encoding="utf-8"))


def commands(text, folder):
    """Run a shell script with stand-ins for `COMMANDS`; return what it called, words by call.

    The shell itself interprets comments, variables, continued lines and file names. Its PATH has
    only the stand-ins, so any other program is an error.
    """
    shell, called = shutil.which("bash"), folder / "called"
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    called.write_text("")
    for name in COMMANDS:
        program = programs / name
        program.write_text(
            f"#!{shell}\nprintf '%s\\0' {name} \"$@\" >>'{called}'\nprintf '\\n\\0' >>'{called}'\n"
        )
        program.chmod(0o755)
    done = subprocess.run(
        [shell, "-euc", text], cwd=folder, env={"PATH": str(programs)}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    calls = called.read_text().split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls]
