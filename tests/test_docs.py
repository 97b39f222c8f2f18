"""The pages are right: every block runs, and every command, link and name exists."""

import ast
import doctest
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pages
import pytest
import torch
from gloo import run_ranks
from page_programs import AFTER, BEFORE, GROUP_PAGES, check_pages, run_page
from pages import PAGES, ROOT
from torch.distributed.run import get_args_parser

import lplb_triton
from lplb_triton import sync, topologies
from lplb_triton.bench import cli, plots
from lplb_triton.traces import record, trace
from lplb_triton.traces.record import Recorder
from lplb_triton.training import live_layer

# As when a script is run.
sys.path.append(str(ROOT / "examples"))
moe, moe_ep, moe_settings = map(
    importlib.import_module, ("train_moe", "train_moe_ep", "moe.settings")
)
SCRIPTS = {
    "train_moe": (moe.Config, moe_settings.HELP),
    "train_moe_ep": (moe_ep.Settings, moe_ep.HELP),
}
# Run on a small trace; the other commands need a GPU or minutes.
QUICK = ("advise", "balance", "record", "report")


# A newcomer reads README.md to the end, and benchmarks.md has figures of the present build only.
MOST_LINES = {"README.md": 150, "docs/benchmarks.md": 250}

PYTHON_PAGES = [page for page in PAGES if pages.in_language(page, "python")]
SHELL_PAGES = [page for page in PAGES if pages.in_language(page, "bash")]


@pytest.mark.parametrize("page", MOST_LINES)
def test_pages_are_short(page):
    """README.md and benchmarks.md stay within their numbers of lines."""
    assert len((ROOT / page).read_text().splitlines()) <= MOST_LINES[page]


def linked_pages(page):
    """Return the pages that a page links to."""
    targets = [link.partition("#")[0] for link in pages.links(page) if not link.startswith("http")]
    found = {((ROOT / page).parent / target).resolve() for target in targets if target}
    return {path.relative_to(ROOT).as_posix() for path in found} & set(PAGES)


def test_every_page_is_linked():
    """Every page is linked from README.md, or from a page that is linked there."""
    first = linked_pages("README.md")
    reached = first.union(*map(linked_pages, first))
    assert set(PAGES) - reached <= {"README.md"}


def test_first_screen_of_the_readme_has_a_program():
    """The first code block of README.md is a Python program within its first 20 lines."""
    first = pages.blocks("README.md")[0]
    assert first.language == "python" and first.line <= 20


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """Every code block names its language, and Python blocks are Python."""
    for block in pages.blocks(page):
        assert pages.problem(block) is None, f"{block}: {pages.problem(block)}"


def test_blocks_are_found_and_judged():
    """Code blocks are found with heading and language, and faulty ones are explained."""
    text = """# Page
<!-- not run: needs two hosts -->
```python
x = 1
```

## Part

    y = 2

- item

  ```ruby
  ```

```python
... here
```

    T_j = floor((c F_j) / 2)
      $ make all
"""
    found = pages.blocks("page", text)
    assert [(b.heading, b.language, b.not_run is None) for b in found] == [
        ("Page", "python", False), ("Part", "indented", True), ("Part", "ruby", True),
        ("Part", "python", True), ("Part", "indented", True),
    ]  # fmt: skip
    assert found[0].not_run == "needs two hosts" and found[0].line == 3
    wrong = ["fence it", "got 'ruby'", "not Python", "fence it"]
    assert pages.problem(found[0]) is None
    for block, words in zip(found[1:], wrong, strict=True):
        assert words in pages.problem(block)


def test_settings_belong_to_blocks():
    """Every setting of page_programs.py belongs to a page and a heading with a program."""
    known = {(page, block.heading) for page in PAGES for block in pages.in_language(page, "python")}
    assert {*BEFORE, *AFTER} <= known and set(GROUP_PAGES) <= set(PYTHON_PAGES)


@pytest.mark.parametrize("page", [page for page in PYTHON_PAGES if page not in GROUP_PAGES])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The Python blocks of a page run one after the other, as one program."""
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_python_blocks_run_in_two_processes(tmp_path, monkeypatch):
    """The programs of pages about groups run on two ranks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run_ranks(check_pages, 2, tmp_path)


def record_ranks(layers, experts):
    """Write what two ranks record, where the commands of the pages look for it."""
    for rank in range(2):
        with Recorder("trace.npz", experts, layers, rank=rank, world_size=2) as recorder:
            for _ in range(2):
                for layer in range(layers):
                    recorder.add(layer, torch.randint(experts, (64, 8)))
                recorder.step()


def check_command(name, *args):
    """Hold a command against the parser or the file that it is for."""
    if name == "lplb-bench":
        parse(args)
    elif name == "make":
        subprocess.run(["make", "--dry-run", *args], cwd=ROOT, check=True, capture_output=True)
    elif name == "pip":
        check_install(*args)
    elif name == "torchrun":
        parsed = get_args_parser().parse_args(args)
        if parsed.module:
            assert parsed.training_script == "lplb_triton.bench"
            parse(parsed.training_script_args)
        else:
            check_script(parsed.training_script, *parsed.training_script_args)
    else:
        # What stands ahead of it is another program's, such as compute-sanitizer.
        words = (name, *args)[(name, *args).index("python") + 1 :]
        if words[0] == "-m":
            assert words[1] in ("lplb_triton", "lplb_triton.bench")
            parse(words[2:] or ["--help"])
        else:
            check_script(*words)


def parse(args):
    """Let the parser of lplb-bench read a command, or its name alone."""
    try:
        cli._parser().parse_args([*args, *(["--help"] if len(args) == 1 else [])])
    except SystemExit as done:
        assert done.code == 0, args


def check_script(path, *args):
    assert (ROOT / path).is_file(), path
    name = Path(path).stem
    if name in SCRIPTS:
        kind, texts = SCRIPTS[name]
        moe.parse_arguments(args, kind, texts)
    else:
        assert not args, "unknown options"


def check_install(install, *requirements):
    assert install == "install"
    offered = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for requirement in requirements:
        found = re.fullmatch(r"(?:\.|lplb_triton)(?:\[(\w+)\])?", requirement)
        assert found and (found[1] is None or found[1] in offered), requirement


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_shell_blocks_run(page, tmp_path, monkeypatch):
    """Shell commands on the pages parse, and the quick ones run."""
    monkeypatch.chdir(tmp_path)
    # Drawing takes most of the time, and has tests of its own.
    monkeypatch.setattr(plots, "balance_png", lambda cells, title: b"")
    record_ranks(1, 256)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 256}
    Path("config.json").write_text(json.dumps({**sizes, "num_experts_per_tok": 8}))
    for block in pages.in_language(page, "bash"):
        for name, *args in pages.commands(block.text, tmp_path):
            check_command(name, *args)
            if name == "lplb-bench" and args[0] in QUICK:
                if args[0] == "balance":
                    args += ["--trace", "trace.rank00000.npz", "--no-report"]
                assert cli.main(args) == cli.OK, args


def test_wrong_commands_are_found(tmp_path, capsys):
    """A command with an unknown option, target, extra or file does not pass."""
    for text in (
        "lplb-bench balance --epp 8",
        "lplb-bench blance",
        "make runs",
        "pip install '.[benches]'",
        "pip install other",
        "python examples/train_moe.py --stepz 1",
        "python examples/train.py",
        "torchrun --nproc-per-node 2 examples/train_moe_ep.py --balance even",
    ):
        with pytest.raises((AssertionError, SystemExit, subprocess.CalledProcessError)):
            for command in pages.commands(text, tmp_path):
                check_command(*command)
    with pytest.raises(AssertionError, match="curl"):
        pages.commands("curl x", tmp_path)
    script = "A='1 2'\nX=3 lplb-bench $A \\\n  *.one # said\nmake"
    (tmp_path / "a.one").touch()
    assert pages.commands(script, tmp_path) == [["lplb-bench", "1", "2", "a.one"], ["make"]]


PLACEHOLDERS = {"FILE": "trace.npz", "NAME": "deepseek-v3", "N": "8"}


def words_of(span):
    """Words of a command in running text: dots stand for what was said before."""
    words = [word.removesuffix("...") for word in shlex.split(span)]
    return [PLACEHOLDERS.get(word, word) for word in words if word]


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_commands_in_the_text_exist(page, capsys):
    """Every command in running text exists, with its options."""
    for span in pages.code_spans(page):
        if span.startswith(("lplb-bench ", "make ", "pip ", "python ", "torchrun ")):
            check_command(*words_of(span))


def help_texts(capsys):
    """Help of lplb-bench and of each of its commands."""
    (commands,) = [a.choices for a in cli._parser()._actions if isinstance(a.choices, dict)]
    for args in ([], *([name] for name in commands)):
        with pytest.raises(SystemExit):
            cli.main([*args, "--help"])
        yield capsys.readouterr().out


def test_examples_in_help_are_right(capsys):
    """Every example in the help of lplb-bench parses."""
    found = 0
    for text in help_texts(capsys):
        # What an example does may stand behind it.
        for line in re.findall(r"^ +(lplb-bench (?:\S+ )*\S+)", text, re.MULTILINE):
            check_command(*shlex.split(line))
            found += 1
    assert found > 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_scripts_are_right(name, tmp_path, monkeypatch):
    """Every command in an example script's docstring parses."""
    monkeypatch.chdir(ROOT)
    text = importlib.import_module(name).__doc__
    shell = "\n".join(re.findall(r"^    (.*)", text, re.MULTILINE))
    found = pages.commands(shell, tmp_path)
    assert found
    for command in found:
        check_command(*command)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Every link inside the repository leads to a file and an anchor that exist."""
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), link
            assert not anchor or anchor in pages.anchors(path.relative_to(ROOT)), link


def test_layout_names_what_there_is():
    """Every folder in the layout of CONTRIBUTING.md exists."""
    blocks = pages.in_language("CONTRIBUTING.md", "text")
    (layout,) = [block.text for block in blocks if block.heading == "Layout"]
    for line in layout.splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_the_map_names_every_kernel_file():
    """Every file of kernels/ is in the map of docs/kernels.md, and the map names no other."""
    paths = [path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")]
    there = {path.as_posix() for path in paths if path.name != "__init__.py"}
    code = pages.code_by_heading("docs/kernels.md")
    heading, named = "", set()
    for kind, content in code:
        heading = content if kind == "heading" else heading
        if heading == "The map" and kind == "code" and content.endswith(".py"):
            named.add(content)
    assert there == {name for name in named if not name.startswith("lplb_triton/")}
    for name in named - there:
        assert (ROOT / name).is_file(), name


def test_functions_of_equations_exist():
    """Every function that the table of docs/method.md names is defined in the file it names."""
    text = (ROOT / "docs/method.md").read_text()
    rows = re.findall(r"^\| \(\d.*$", text, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        kernel, twin = row.strip("| ").split(" | ")[2:]
        for folder, cell in (("kernels", kernel), ("lplb_triton/reference", twin)):
            for file, name in re.findall(r"`(\S+\.py): (\w+)`", cell):
                path = ROOT / (file if file.startswith("lplb_triton/") else f"{folder}/{file}")
                pattern = rf"^ *(def|class) {name}\b"
                assert re.search(pattern, path.read_text(), re.MULTILINE), f"{file}: {name}"


def documented(heading, name):
    """What a name of docs/api.md under a heading is."""
    handle = typing.get_type_hints(lplb_triton.Replicas.sync_weights)["return"]
    others = lplb_triton, sync, sync.Communicator, topologies, record, trace, handle
    others += live_layer.LiveLayer, live_layer.LivePull
    for holder in (getattr(lplb_triton, heading.strip("`"), None), *others):
        found = holder
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(f"{name} under {heading} is nowhere")


def arguments(code):
    """Names, kinds and defaults of the arguments in ``name(a, *, b=1)``, comparable."""
    (function,) = ast.parse(f"def {code}: pass").body
    values = {}
    exec(compile(ast.Module([function], []), "api.md", "exec"), values)
    return parameters(values[function.name])


def parameters(call):
    found = inspect.signature(call).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


def test_names_and_arguments_in_api_are_right():
    """docs/api.md has every public name, and its signatures are those of the code."""
    heading, checked = "", set()
    for kind, content in pages.code_by_heading("docs/api.md"):
        if kind == "heading":
            heading = content
        call = re.fullmatch(r"([\w.]+)(\(.*\))(?: -> \w+)?", content, re.DOTALL)
        if kind == "code" and call and not call[1].startswith("torch."):
            shown = arguments("name" + call[2].replace("\n", " "))
            assert shown == parameters(documented(heading, call[1])), content
            checked.add(call[1])
    assert len(checked) > 40
    text = (ROOT / "docs/api.md").read_text()
    missing = [name for name in lplb_triton.__all__ if f"`{name}" not in text]
    assert not missing


def modules_with_examples():
    """Every module of the package whose docstrings hold examples."""
    for folder in ("lplb_triton", "topologies", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>>" in path.read_text():
                inside = path.relative_to(ROOT).with_suffix("")
                parts = inside.parts if folder == "lplb_triton" else ("lplb_triton", *inside.parts)
                yield ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    """The examples in a module's docstrings give the results that they show."""
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
