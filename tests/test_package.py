"""Rules of the package that are worth a test: order of modules, cheap imports, sizes, and documents that agree with the code."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import refrag

ROOT = Path(__file__).parents[1]
SOURCE = Path(refrag.__file__).parent
SOURCES = sorted(SOURCE.rglob("*.py"))
ORDER = ("errors", "config", "text", "data", "layout", "encoder", "policy", "hub", "model", "index", "engine", "evaluation", "demo", "cli")
MAY_IMPORT = {name: {name, *ORDER[:rank]} for rank, name in enumerate(ORDER)}
MAY_IMPORT["training"] = {"training", *ORDER[: ORDER.index("model") + 1]}
MAY_IMPORT["server"] = {"server", "page", *ORDER[: ORDER.index("engine") + 1]}
MAY_IMPORT |= {name: {name, *ORDER[: ORDER.index("engine") + 1]} for name in ("page", "integrations")}
MAY_IMPORT["evaluation"] |= {"training"}  # what measures a training step imports it; training imports nothing of evaluation
MAY_IMPORT["demo"] |= {"training"}
MAY_IMPORT["cli"] |= {"training", "server", "page"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository, not an installed package")


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported_parts(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level parts of refrag that a file imports anywhere, functions included, with the line."""
    package = ["refrag", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "refrag" else [module]
        for name in names:
            if name.startswith("refrag."):
                yield name.split(".")[1], node.lineno


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_a_module_imports_only_from_its_left() -> None:
    wrong = []
    for path in SOURCES:
        part = _part(path)
        if part == "__init__":
            continue
        assert part in MAY_IMPORT, f"{path.name}: give {part!r} its place in the order"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(SOURCE)}:{line} imports {name}" for name, line in _imported_parts(path, tree) if name not in MAY_IMPORT[part] and name != "__version__"]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("from .errors import InputError", ["errors"]),
        ("from ..text import Prompt", ["text"]),
        ("from .. import engine", ["engine"]),
        ("def f():\n    import refrag.cli", ["cli"]),
        ("from refrag.model import RefragModel", ["model"]),
        ("import torch", []),
    ],
)
def test_the_order_test_sees_every_form_of_import(line: str, parts: list[str]) -> None:
    file = SOURCE / "index" / "store.py" if ".." in line else SOURCE / "text.py"
    assert [part for part, _ in _imported_parts(file, ast.parse(line))] == parts


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_importing_refrag_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "lancedb", "numpy", "pyarrow"
    printed = _run(f"import sys, refrag; dir(refrag); print([m for m in {heavy} if m in sys.modules])").stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["bench", "latency", "--help"], ["eval", "qa", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom refrag.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print([m for m in ('torch', 'transformers', 'lancedb') if m in sys.modules], file=sys.stderr)"
    )
    finished = _run(code, *arguments)
    assert finished.stderr.strip() == "[]"
    assert "usage" in finished.stdout.lower()


def test_help_loads_few_modules() -> None:
    """400 when this was written; torch alone brings a thousand. How long that takes depends on the machine."""
    finished = _run("import sys; from refrag.cli import main\ntry: main()\nexcept SystemExit: print(len(sys.modules), file=sys.stderr)", "--help")
    assert int(finished.stderr.split()[-1]) < 550


def test_public_names_exist_and_typos_do_not() -> None:
    for name in refrag.__all__:
        assert getattr(refrag, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Reefrag'"):
        refrag.Reefrag  # type: ignore[attr-defined]


def test_files_and_functions_stay_small() -> None:
    files = [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    long_files = {str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450}
    long_functions = {
        f"{path.name}:{node.name}": lines for path in SOURCES for node in _functions(path) if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long_files
    assert not long_functions


def test_shape_annotations_stay_checkable() -> None:
    """jaxtyping reads annotations at run time, which the future import turns into strings."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
    assert [name for name, text in texts.items() if "jaxtyping" in text and "from __future__ import annotations" in text] == []


def test_every_part_has_a_test_file() -> None:
    parts = {_part(path) for path in SOURCES} - {"__init__"}
    tests = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    special = {"evaluation": "test_latency", "hub": "test_model"}
    assert [part for part in sorted(parts) if not any(name.startswith(special.get(part, f"test_{part}")) for name in tests)] == []


def test_types_and_version_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()
    try:
        installed = version("refrag")
    except PackageNotFoundError:
        pytest.skip("refrag is on the path but not installed")
    assert installed == refrag.__version__


def _repository_files() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    # The example of a user's folder, ~/, is fine; /tmp is everybody's.
    machine_path = re.compile(rb"(?<![\w.~/-])/(?:home|root|Users|work|opt|mnt|workspace)/[\w.-]+")
    found = []
    for path in _repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:1024]:
            found += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in machine_path.finditer(content)]
    assert not found


def test_weights_in_the_repository_stay_small() -> None:
    assert sum(path.stat().st_size for path in _repository_files() if path.suffix == ".safetensors") <= 12 * 2**20


def _readme_command(name: str) -> str:
    match = re.search(rf"^<!-- command: {name} -->\n```bash\n(.+?)\n```\n<!-- /command -->$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"README.md has no command {name!r}"
    return match.group(1)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    shown = subprocess.run([str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == _readme_command("test")


@pytest.mark.parametrize(("name", "last"), [("demo", "refrag demo"), ("test", "pytest")])
def test_each_readme_command_starts_from_nothing(name: str, last: str) -> None:
    steps = _readme_command(name).split(" && ")
    assert steps[0] == "python3 -m venv .venv"
    assert re.fullmatch(r"\.venv/bin/pip install -e ('\.\[dev\]'|\.)", steps[1])
    assert steps[2:] == [f".venv/bin/{last}"]


@pytest.mark.skipif(not (SOURCE / "demo" / "weights" / "config.json").exists(), reason="the bundled model is not built yet")
def test_readme_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.+?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 2
    ast.parse(blocks[1])
    exec(compile(blocks[0], "README.md", "exec"), {})
    first, *chunks = capsys.readouterr().out.splitlines()
    assert float(first.split()[-1]) > 1  # the compression rate
    assert {line.split()[0] for line in chunks} == {"True", "False"}
