"""The distributions hold the whole package, and it works away from its checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lplb_triton

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "topologies", "bench")
DATA = "lplb_triton/bench/data/moe256.npz"
IMPORT_ALL = """
import sys
import lplb_triton, lplb_triton.kernels, lplb_triton.topologies, lplb_triton.bench
import lplb_triton.bench.cli
from lplb_triton.traces.trace import packaged
for module in (lplb_triton, lplb_triton.kernels, lplb_triton.topologies, lplb_triton.bench):
    print(module.__file__)
assert packaged().experts == 256
assert lplb_triton.topologies.cube().shape == (8, 2)
print(lplb_triton.__version__)
"""

pytestmark = pytest.mark.slow


def call(*command, cwd, **environment):
    """Run a command outside the checkout; return its stdout, show everything if it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def import_all(python, cwd, **environment):
    """Import every package in a fresh process; return the folder each came from."""
    *files, version = call(python, "-c", IMPORT_ALL, cwd=cwd, **environment).split("\n")[:-1]
    assert version == lplb_triton.__version__
    assert len(files) == 1 + len(LINKED)
    return [Path(file) for file in files]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a copy of the sources, so that no build writes into the real ones."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lplb_triton", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__", "*.tmp")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """Return a folder with a sdist, and the wheel built from the sources."""
    out = tmp_path_factory.mktemp("dist")
    call(
        sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel",
        "--outdir", out, checkout, cwd=out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(built):
    (found,) = built.glob("*.tar.gz")
    return found


def source_files():
    """Every module of the package by the name it has in a wheel."""
    found = set()
    for folder, _, names in os.walk(ROOT / "lplb_triton", followlinks=True):
        inside = Path(folder).relative_to(ROOT)
        found |= {(inside / name).as_posix() for name in names if name.endswith(".py")}
    return found


def test_links_are_relative():
    """The linked folders of the package are relative links to packages."""
    for name in LINKED:
        link = ROOT / "lplb_triton" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
        assert (link / "__init__.py").is_file()


def test_wheel_holds_files_not_links(wheel):
    """The wheel holds every source as a plain file, equal to the checkout's."""
    sources = source_files()
    assert {f"lplb_triton/{name}/__init__.py" for name in LINKED} <= sources
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert sources | {DATA, "lplb_triton/py.typed"} <= names
        for name in sources:
            entry = archive.getinfo(name)
            # The upper half of the attributes is the Unix mode; 0o120000 would be a link.
            assert (entry.external_attr >> 16) & 0o170000 in (0, 0o100000), name
            assert archive.read(name) == (ROOT / name).read_bytes()
        assert archive.read(DATA) == (ROOT / DATA).read_bytes()
        top = {name.split("/")[0] for name in names}
    assert top == {"lplb_triton", f"lplb_triton-{lplb_triton.__version__}.dist-info"}


def test_wheel_metadata(wheel):
    """The wheel's metadata has the command, dependencies, license and Python version."""
    info = f"lplb_triton-{lplb_triton.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "lplb-bench = lplb_triton.bench.cli:main" in entry_points
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    unconditional = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
    assert unconditional == {"torch", "triton", "numpy", "scipy"}
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_sdist_holds_files_not_links(sdist):
    """The sdist holds every source as a plain file."""
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in source_files() | {DATA, "lplb_triton/py.typed", "pyproject.toml", "LICENSE"}:
        assert members[name].isfile(), name


@pytest.mark.parametrize("origin", ["sources", "sdist"])
def test_installed_wheel_imports(origin, wheel, sdist, tmp_path):
    """A wheel from the sources or the sdist imports from where it is installed."""
    if origin == "sdist":
        call(
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
            "--wheel-dir", tmp_path, sdist, cwd=tmp_path,
        )  # fmt: skip
        (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "target"
    call(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target,
        wheel, cwd=tmp_path,
    )  # fmt: skip
    for file in import_all(sys.executable, tmp_path, PYTHONPATH=str(target)):
        assert file.is_relative_to(target)
    shown = call(
        sys.executable, "-m", "lplb_triton.bench", "--version", cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert shown.split() == ["lplb_triton", lplb_triton.__version__]


def test_editable_install_imports(checkout, tmp_path):
    """An editable install imports from its checkout and brings the command."""
    environment = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    purelib = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    # The dependencies are the running environment's; its own .pth files are not followed, so an
    # editable install there doesn't show through.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(purelib) / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    call(
        python, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation",
        "--editable", checkout, cwd=tmp_path,
    )  # fmt: skip
    for file in import_all(python, tmp_path):
        assert file.is_relative_to(checkout)
    shown = call(environment / "bin" / "lplb-bench", "--version", cwd=tmp_path)
    assert shown.split() == ["lplb_triton", lplb_triton.__version__]
