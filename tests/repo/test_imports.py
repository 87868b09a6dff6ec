"""Imports form layers: a module imports from lower ones only, and the core knows no trainer."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    "relora_core": [
        {
            "_sharding",
            "peft_format",
            "schedule",
            "two_paths",
            "merged",
            "embedding",
            "layouts",
            "randomness",
        }
        | {"low_bits"},
        {"linear", "selection", "quantized", "roll_call", "tensor_parallel", "spectrum"},
        {"lazy_weight", "pruning", "update"},
        {"low_rank", "moments"},
        {"reset"},
        {"optimizer"},
        {"register"},
        {"sites"},
        {"restart", "serialization", "bases", "adapters"},
        {"update_spectra"},
        {
            "__init__",
            "testing.expressions",
            "testing.small_layers",
            "testing.algorithm",
            "testing.curves",
        }
        | {"testing.subjects", "testing.optimizer_state"},
        {"testing.inputs", "testing.twin", "testing.training", "testing.jags", "testing.runner"},
        {"testing.history", "testing.compare", "testing.resets", "testing.machine"},
        {"testing.merges", "testing.redraws", "testing.lifetimes"}
        | {"testing.modules", "testing.strategies"},
        {"testing.module_battery", "testing.reset_battery", "testing.schedule_battery"}
        | {"testing.restart_battery"},
        {"testing.ours", "testing.__init__"},
        {"testing.__main__"},
    ],
    "reference_trainer": [
        {
            "__init__",
            "errors",
            "environment",
            "interruption",
            "model",
            "bench.__init__",
            "bench.memory",
            "streamed",
            "peak",
            "study.__init__",
            "estimate.__init__",
            "report.__init__",
        },
        {"config", "files", "flops", "bench.arms", "bench.results", "study.trial"},
        {"metrics", "bench.picture", "bench.projection", "study.plans"},
        {"options", "world", "documents", "tokenizer", "sealed"},
        {"prepare", "parallel", "checkpoint", "rank", "report.recorded"},
        {"data", "saving", "pretrained", "bench.subjects", "report.panels"},
        {"stage", "report.picture", "report.page"},
        {"begin", "evaluate", "journal", "export", "bench.measure", "study.train", "report.run"}
        | {"study.tables"},
        {"train", "plan", "bench.restarts", "bench.layouts", "study.picture"},
        {"bench.communication", "bench.tracker", "bench.checkpoints", "estimate.gpus"},
        {"bench.run", "study.run", "estimate.peaks"},
        {"estimate.run"},
        {"__main__"},
    ],
}
MODULES = [
    (package, ".".join(path.relative_to(ROOT / package).with_suffix("").parts))
    for package in LAYERS
    for path in sorted((ROOT / package).rglob("*.py"))
]
USES_THE_CORE = {"plan", "stage", "journal", "rank", "export", "bench.arms", "bench.restarts"} | {
    "bench.communication",
    "study.train",
    "study.tables",
}


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
        listed = [name for layer in layers for name in layer]
        assert sorted(listed) == sorted(name for p, name in MODULES if p == package)


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_imports_from_lower_layers_only(package, module):
    layers = LAYERS[package]
    level = next(i for i, layer in enumerate(layers) if module in layer)
    below = set().union(*layers[:level])
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
def test_one_file_of_the_core_names_sharding(module):
    names = imported("relora_core", module)
    private = {"torch.distributed.tensor", "torch.distributed.fsdp"}
    assert not names & private or module == "_sharding"


@pytest.mark.parametrize("module", [m for p, m in MODULES if p == "reference_trainer"])
def test_few_files_of_the_trainer_use_the_core(module):
    roots = {name.split(".")[0] for name in imported("reference_trainer", module)}
    assert "relora_core" not in roots or module in USES_THE_CORE
