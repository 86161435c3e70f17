"""The package as it is installed: what travels in the wheel, and that it works away from the repository."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tomllib
import venv
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

import llmjax
from llmjax import binding
from llmjax.cli import main
from llmjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_listed_packages_are_those_of_the_tree():
    folders = [path.parent for path in (ROOT / "llmjax").rglob("__init__.py")]
    in_tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"llmjax.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == in_tree
    outside = [path for path in (ROOT / "llmjax").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert outside == [], "a folder without __init__.py is not installed"


def test_every_dependency_has_an_upper_bound():
    """A later release of a library must not break an install of this version."""
    project = PROJECT["project"]
    listed = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        listed += extra
    core = {"jax", "etils", "llmjax"}  # named again for their extras alone; bounded among the dependencies
    unbounded = [
        entry for entry in listed if "<" not in entry and "==" not in entry and entry.split("[")[0] not in core
    ]
    assert unbounded == []


def test_constraints_pin_every_package_of_an_install():
    """Also the dependencies of dependencies: an unpinned one may break an install a year from now."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    own = [requirement for extra in PROJECT["project"]["optional-dependencies"].values() for requirement in extra]
    pinned = {canonicalize_name(line.split("==")[0]) for line in (*lines, *(text for text in own if "==" in text))}
    missing, visited = set(), set()
    pending = [("llmjax", extra) for extra in ("", "test", "curate", "ray", "docs")]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed, such as docs
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(requirement.name), option) for option in ("", *requirement.extras)]
        if name != "llmjax" and name not in pinned:
            missing.add(name)
    assert missing == set()


def test_a_name_finds_the_shipped_config(monkeypatch, tmp_path):
    by_path = binding.load_file(str(ROOT / "configs" / "llama.py") + ":8B")
    monkeypatch.chdir(tmp_path)
    assert binding.load_file("llama:8B") == by_path
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "quickstart.py").read_text())
    assert binding.load_file("mine.py") == binding.load_file("quickstart")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("quikstart", "(did you mean 'quickstart'?); choose one of bert, classify, curate, "),
        ("LLAMA:8B", "(did you mean 'llama'?)"),
        ("__init__", "choose one of bert, "),
        ("", "there is no config ''; choose one of bert"),
        ("configs/llama.py:8B", "no such file (did you mean --config=llama:8B, which ships with llmjax?)"),
        ("nowhere/xyz.py", "no such file; give a Python file"),
        ("quickstart:8B", "has no sizes"),
        ("llama:9B", "no such size; choose one of tiny, 1B, 8B"),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_known(spec, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        binding.load_file(spec)
    assert words in str(error.value)


def test_configs_lists_names_sizes_and_summaries(capsys):
    assert main.run(["configs"]) == 0
    printed = capsys.readouterr().out
    assert "quickstart   A small decoder" in printed and "sizes: tiny, 1B, 8B, 70B, 405B" in printed
    assert all(f"\n{name} " in f"\n{printed}" for name in binding.shipped_files()) and "__init__" not in printed
    assert main.run(["configs", "llama"]) == 0
    printed = capsys.readouterr().out
    assert f"file:  {ROOT / 'configs' / 'llama.py'}" in printed and "llmjax train --config=llama " in printed
    with pytest.raises(UserError, match=r"did you mean 'llama'"):
        main.run(["configs", "lama"])


def fresh_environment(folder: pathlib.Path) -> pathlib.Path:
    """The Python of a new virtual environment, which sees the libraries of this one, but not its llmjax.

    So the test needs no network. .ci/run shows by `make venv` that the dependencies resolve from constraints.txt.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (pathlib.Path(site) / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


def pip_install(python: pathlib.Path, *arguments: str) -> None:
    """Install into the environment of `python` by the pip of this one, without dependencies and without network."""
    base = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*base, "--ignore-installed", "--no-build-isolation", *arguments], check=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that the build leaves nothing in the repository.
    source = tmp_path_factory.mktemp("source")
    names = ("llmjax", "configs", "pyproject.toml", "README.md", "LICENSE")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=240)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_package_and_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llmjax").rglob("*.py")} | {"llmjax/py.typed"}
    modules |= {"llmjax/serve/page.html"}
    modules |= {f"llmjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert wheel.name.startswith(f"llmjax-{llmjax.__version__}-")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_install_works_in_an_empty_folder(kind, request, tmp_path):
    """The first steps of the quickstart, by the installed command."""
    python = fresh_environment(tmp_path / "environment")
    if kind == "wheel":
        pip_install(python, str(request.getfixturevalue("wheel")))
    else:
        pip_install(python, "--editable", str(ROOT))
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "text.txt").write_text("".join(path.read_text() for path in sorted((ROOT / "llmjax").glob("*.py"))))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*command: str) -> str:
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr
        return process.stdout

    location = run(str(python), "-c", "import llmjax, llmjax.configs.llama; print(llmjax.__file__)")
    assert location.startswith(str(ROOT if kind == "editable" else tmp_path))
    program = str(python.with_name("llmjax"))
    assert run(program, "--version") == f"llmjax {llmjax.__version__}\n"
    assert "quickstart" in run(program, "configs")
    tiny = {"data.tokenizer.kind": "bytes", "data.seq_len": 32, "data.workers": 1, "data.sources.main.path": "text.txt"}
    tiny |= {"model.num_layers": 1, "model.embed": 16, "model.num_heads": 2, "model.mlp": 32, "train.steps": 2}
    settings = [f"--config.{name}={value}" for name, value in {**tiny, "sample.prompts": "()"}.items()]
    printed = run(program, "train", "--config=quickstart", "--workdir=run", *settings)
    assert "bits per byte" in printed and (folder / "run" / "report.html").is_file()
