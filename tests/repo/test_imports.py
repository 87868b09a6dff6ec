"""Imports form layers: a module imports from lower ones only, and the core knows no trainer."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    "relora_core": [
        "_torch_private embedding files globs low_bits randomness reach state_layouts",
        "_fsdp local products schedule",
        "_dtensor",
        "_sharding",
        "peft_format stepped ties two_paths",
        "bilinear candidates copies merged one_path",
        "linear quantized roll_call selection spectrum tensor_parallel",
        "factored pruning update",
        "forms",
        "lazy_weight",
        "low_rank moments",
        "reset shared_class",
        "optimizer",
        "register",
        "sites",
        "adapters averages bases merged_copies restart serialization summary targets",
        "update_spectra",
        "__init__ testing.algorithm testing.curves testing.expressions "
        "testing.optimizer_state testing.small_layers testing.subjects",
        "testing.inputs testing.jags testing.runner testing.training testing.twin",
        "testing.compare testing.history testing.machine testing.resets",
        "testing.leftovers testing.lifetimes testing.merges testing.modules testing.prunes "
        "testing.redraws testing.strategies",
        "testing.module_battery testing.reset_battery testing.restart_battery "
        "testing.schedule_battery",
        "testing.__init__ testing.ours",
        "testing.__main__",
    ],
    "reference_trainer": [
        "__init__ bench.__init__ bench.commands.__init__ bench.kernels bench.memory environment "
        "bench.suite.__init__ bench.suite.jobs bench.suite.timing errors estimate.__init__ head "
        "interruption loss nearest peak report.__init__ streamed study.__init__ terminal "
        "validated",
        "bench.ceilings bench.fusion bench.results bench.suite.records bench.suite.table "
        "files model",
        "bench.suite.runner",
        "bench.arms bench.launched config flops study.trial",
        "activations",
        "bench.picture bench.projection metrics phases study.plans",
        "documents options sealed tokenizer world",
        "bench.options checkpoint parallel prepare rank report.recorded",
        "bench.commands.show data phase_model pretrained report.panels saving",
        "bench.subjects report.page report.picture stage",
        "begin bench.measure evaluate feed export journal report.command study.tables study.train",
        "bench.commands.step bench.layouts bench.restarts plan study.picture",
        "bench.commands.prune bench.commands.restart run",
        "train",
        "bench.checkpoints bench.communication bench.suite.sizes bench.tracker bench.whole_step "
        "estimate.gpus",
        "bench.commands.checkpoint bench.commands.gpu_suite bench.commands.roofline "
        "bench.computation bench.suite.__main__ bench.suite.blocks bench.suite.gpu_tests "
        "bench.suite.machine bench.suite.products bench.suite.restarting bench.suite.selection "
        "bench.suite.stall bench.suite.steps bench.suite.training estimate.depth study.command",
        "bench.suite.expected",
        "bench.commands.traffic",
        "bench.commands.memory estimate.peaks",
        "estimate.row",
        "estimate.command",
        "commands.__init__ commands.export commands.prepare commands.train",
        "main",
        "__main__",
    ],
}
MODULES = [
    (package, ".".join(path.relative_to(ROOT / package).with_suffix("").parts))
    for package in LAYERS
    for path in sorted((ROOT / package).rglob("*.py"))
]
USES_THE_CORE = (
    "bench.arms bench.communication bench.restarts bench.suite.blocks bench.suite.selection "
    "bench.subjects bench.suite.steps bench.tracker bench.whole_step export journal "
    "phase_model phases plan rank stage study.tables study.train train world"
)


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


def test_the_table_lists_every_module():
    for package, layers in LAYERS.items():
        listed = [name for layer in layers for name in layer.split()]
        assert sorted(listed) == sorted(name for p, name in MODULES if p == package)


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_imports_from_lower_layers_only(package, module):
    layers = LAYERS[package]
    level = next(i for i, layer in enumerate(layers) if module in layer.split())
    below = set(" ".join(layers[:level]).split())
    names = imported(package, module)
    own = {n.removeprefix(f"{package}.") for n in names if n.startswith(f"{package}.")}
    assert own <= below


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "relora_core"])
def test_the_core_needs_torch_and_safetensors_only(module):
    roots = {name.split(".")[0] for name in imported("relora_core", module)}
    allowed = {"torch", "safetensors", "relora_core", *sys.stdlib_module_names}
    kit = module.startswith("testing.")  # of an extra; it needs no test framework beside
    assert roots <= (allowed | {"hypothesis"} if kit else allowed)


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "relora_core"])
def test_few_files_of_the_core_name_sharding(module):
    names = imported("relora_core", module)
    assert "torch.distributed.tensor" not in names or module in ("_dtensor", "_sharding", "local")
    assert "torch.distributed.fsdp" not in names or module == "_fsdp"


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


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "reference_trainer"])
def test_few_files_of_the_trainer_use_the_core(module):
    roots = {name.split(".")[0] for name in imported("reference_trainer", module)}
    assert "relora_core" not in roots or module in USES_THE_CORE.split()


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_the_map_for_contributors_names_every_module(package, module):
    rooms = {"testing": "relora_core/testing"}
    path = f"{module.replace('.', '/')}.py"
    room, _, rest = path.partition("/")
    where, name = (rooms[room], rest) if room in rooms else (package, path)
    if name.endswith("__init__.py"):
        return
    (section,) = (s for s in _tables() if s.startswith(f"| `{where}/` |"))
    assert f"`{name}`" in section


def _tables() -> list[str]:
    return re.split(r"\n\n+", (ROOT / "CONTRIBUTING.md").read_text())
