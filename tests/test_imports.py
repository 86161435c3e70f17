"""A module imports only from its own layer and lower ones, and never in a cycle."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "llmjax"

# The first prefix that matches gives a module's layer.
LAYERS = {
    "llmjax.__main__": 10,
    "llmjax.cli.main": 9,
    "llmjax.cli.flags": 1,
    "llmjax.cli": 8,
    "llmjax.train.program": 5,  # the compiled step, which the planner compiles for a machine that need not be present
    "llmjax.train.step": 5,
    "llmjax.train.fixed_tree": 5,
    "llmjax.train.fixed_update": 5,
    "llmjax.plan": 6,
    "llmjax.train": 7,
    "llmjax.evals.config": 1,
    "llmjax.evals": 4,
    "llmjax.analysis": 4,
    "llmjax.inference": 4,
    "llmjax.report": 4,
    "llmjax.serve": 5,
    "llmjax.sweep": 5,
    "llmjax.interop.importing": 4,
    "llmjax.interop.exporting": 4,
    "llmjax.interop.import_run": 4,
    "llmjax.interop.tokenizers": 4,
    "llmjax.interop": 3,
    "llmjax.run.next_commands": 1,
    "llmjax.run.tensorboard": 1,
    "llmjax.run.workdir": 1,
    "llmjax.run.state": 3,
    "llmjax.run.config": 3,
    "llmjax.run.objective_checks": 3,
    "llmjax.run.phase_config": 3,
    "llmjax.run": 4,
    "llmjax.curate": 3,
    "llmjax.models": 3,
    "llmjax.nn": 2,
    "llmjax.data": 2,
    "llmjax.parallel.interrupts": 0,
    "llmjax.parallel": 1,
    "llmjax.optim": 1,
    "llmjax.checkpoint": 1,
    "llmjax.metrics": 1,
    "llmjax.atomic": 0,
    "llmjax.binding": 0,
    "llmjax.batch": 0,
    "llmjax.errors": 0,
    "llmjax.patterns": 0,
}


def layer(module: str) -> int:
    """Raises KeyError for a module that has none; a package that LAYERS does not name is in the lowest one."""
    if module not in LAYERS and (PACKAGE.parent / pathlib.Path(*module.split("."))).is_dir():
        return 0
    matches = [number for prefix, number in LAYERS.items() if module == prefix or module.startswith(prefix + ".")]
    if not matches:
        raise KeyError(f"{module} has no layer: name it in LAYERS")
    return matches[0]


def modules() -> dict[str, pathlib.Path]:
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(path: pathlib.Path, names_of_modules: set[str]) -> set[str]:
    """Modules of this package that a file imports anywhere, inside functions too."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in names_of_modules else node.module for name in names}
    return imported & names_of_modules


def test_no_module_imports_from_a_higher_layer():
    files = modules()
    upward = [
        f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"
        for name, path in files.items()
        for other in imports(path, set(files))
        if layer(other) > layer(name)
    ]
    assert not upward, "\n".join(upward)


def test_no_cycle_of_imports():
    files = modules()
    graph = {name: imports(path, set(files)) - {"llmjax"} for name, path in files.items()}
    visited: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in visited:
            for other in graph[name]:
                visit(other, (*trail, name))
            visited.add(name)

    for name in graph:
        visit(name, ())


def test_evaluation_imports_no_module_of_training():
    """Importing the evaluation harness, generation and the report pulls in no module of llmjax.train, nor lm-eval."""
    modules = (
        "llmjax.evals.harness, llmjax.evals.requests, llmjax.evals.results, llmjax.inference.generate, llmjax.report"
    )
    code = f"import sys, {modules}; print([m for m in sys.modules if 'llmjax.train' in m or 'lm_eval' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_preparation_does_not_import_jax():
    """The modules that preparation's worker processes import."""
    imports = "llmjax.data.store.prepare, llmjax.data.store.token_store, llmjax.curate.engine.curate"
    code = f"import sys, {imports}; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
