"""Imports lead one way: no cycle, no trainer in the core, and few places for what is special."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULES = [
    (package, ".".join(path.relative_to(ROOT / package).with_suffix("").parts))
    for package in ("relora_core", "reference_trainer")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def imported(package: str, module: str) -> set[str]:
    """Return the full names of the modules that a file imports, wherever in it."""
    found = set()
    file = (ROOT / package).joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}.{module} has a relative import"
            own = (ROOT / node.module.replace(".", "/")).is_dir()
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if own else {node.module}
    return found


def test_the_contracts_hold():
    """Those of pyproject.toml: no cycle, and no trainer in the core."""
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "relora_core"])
def test_the_core_needs_torch_and_safetensors_only(module):
    roots = {name.split(".")[0] for name in imported("relora_core", module)}
    allowed = {"torch", "safetensors", "relora_core", *sys.stdlib_module_names}
    kit = module.startswith("testing.")  # of an extra; it needs no test framework beside
    assert roots <= (allowed | {"hypothesis"} if kit else allowed)


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "relora_core"])
def test_few_files_of_the_core_name_sharding(module):
    names = imported("relora_core", module)
    assert "torch.distributed.tensor" not in names or module in (
        "distributed.dtensor",
        "distributed.sharding",
        "distributed.local",
    )
    assert "torch.distributed.fsdp" not in names or module == "distributed.fsdp"


def test_one_file_of_the_core_uses_what_torch_keeps_private():
    """Modules' own dictionaries and methods aside, which subclasses are meant to know."""
    allowed = {"_parameters", "_buffers", "_modules"}
    used = set()
    for module in (m for p, m in MODULES if p == "relora_core" and m != "_torch_private"):
        file = (ROOT / "relora_core").joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("torch"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                used |= {(module, name) for name in names if name.startswith("_")}
            elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                if ast.unparse(node.value) in ("self", "cls", "super()"):
                    allowed.add(node.attr)  # the core's own, or a method that torch has overridden
                used.add((module, node.attr))
            elif isinstance(node, ast.ClassDef):
                allowed |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
    assert not {(module, name) for module, name in used if name not in allowed}


def test_the_core_imports_neither_sharding_nor_sympy_before_they_are_used():
    """Each takes as long to import as all of torch."""
    code = (
        "import sys, relora_core, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "relora_core.add_low_rank_(model, '*', rank=2)\n"
        "model(torch.ones(64, 8)).sum().backward()\n"
        "relora_core.merge_(model)\n"
        "relora_core.reinit_(model)\n"
        "relora_core.merged_state_dict(model)\n"
        "late = {'torch.distributed.tensor', 'torch.distributed.fsdp', 'sympy', 'torch._dynamo'}\n"
        "print(sorted(late & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_the_map_for_contributors_names_every_module(package, module):
    path = f"{module.replace('.', '/')}.py"
    room, _, rest = path.partition("/")
    tables = {s.split("`")[1]: s for s in _tables() if s.startswith("| `")}
    own = f"{package}/{room}/" in tables
    where, name = (f"{package}/{room}/", rest) if own else (f"{package}/", path)
    if name.endswith("__init__.py"):
        return
    section = tables[where]
    assert f"`{name}`" in section


def _tables() -> list[str]:
    return re.split(r"\n\n+", (ROOT / "CONTRIBUTING.md").read_text())
