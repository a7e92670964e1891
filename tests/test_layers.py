"""The rules that keep the package a pile of layers rather than a ball; read from the source, nothing is imported."""

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rto_megatron"
LAYERS = [
    "errors",
    "config",
    "batch",
    "algorithms",
    "data",
    "metrics",
    "pages",
    "distributed",
    "models",
    "rollout",
    "schedule",
    "credit",
    "stages",
    "parity",
    "doctor",
    "planner",
    "report",
    "__main__",
    "launch",
]
"""Bottom to top: a module imports its own layer and the ones below it."""
BESIDE = {"metric_names": "metrics"}
"""Top-level modules that belong to the layer of another."""

MEGATRON_LAYERS = {"distributed", "models", "rollout"}
PURE_SCHEDULE = {
    f"schedule.{name}"
    for name in (
        "work",
        "placement",
        "lane",
        "packs",
        "step",
        "policy",
        "cast",
        "pace",
        "trace_folder",
        "order",
        "trace",
        "simulate",
        "rooflines",
        "limits",
        "fit",
        "workload",
        "pipeline_time",
    )
} | {"data.shares", "distributed.timetable", "rollout.blocks"}
"""Decides the schedule, and simulates it: imports no torch, directly or through others of ours."""
DEVICE_WORDS = {"cuda", "nccl", "gloo", "transformer_engine"}
DEVICE_MODULES = {"distributed.runtime", "distributed.cpu", "distributed.cpu_patches", "distributed.cpu_stand_ins"}
SAYS_NOTHING = {"utils", "util", "common", "manager", "helper", "helpers", "handler", "base", "misc"}


class Module:
    """One file of the package."""

    def __init__(self, path: Path, root: Path = PACKAGE) -> None:
        parts = path.relative_to(root).with_suffix("").parts
        self.name = ".".join(part for part in parts if part != "__init__")
        self.path = path
        self.layer = BESIDE.get(parts[0], parts[0])

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), str(self.path))

    @cached_property
    def imports(self) -> set[str]:
        """Full name of everything that is imported anywhere in the file, inside functions too."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: write the import from rto_megatron, without dots"
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        return found

    def imports_of(self, package: str) -> set[str]:
        return {name for name in self.imports if name == package or name.startswith(package + ".")}


MODULES = {
    module.name: module
    for module in map(Module, sorted(PACKAGE.rglob("*.py")))
    if module.path != PACKAGE / "__init__.py"
}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())


def our_imports(module: Module) -> set[str]:
    """Names of our modules that a module imports; `from package import name` may mean a module or what is in it."""
    ours = {name.removeprefix("rto_megatron").lstrip(".") for name in module.imports_of("rto_megatron")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours} & set(MODULES)


@every_module
def test_every_module_has_a_layer(module):
    assert module.layer in LAYERS, f"{module.path}: belongs to no layer; move it into one of {LAYERS}"


@every_module
def test_imports_point_down(module):
    mine = LAYERS.index(module.layer)
    above = sorted(name for name in our_imports(module) if LAYERS.index(MODULES[name].layer) > mine)
    assert not above, (
        f"{module.name} is in '{module.layer}' and imports {above}, which lie above it; "
        "pass what it needs as an argument, or move the shared part down"
    )


def test_no_module_imports_itself_in_a_circle():
    try:
        TopologicalSorter({name: our_imports(module) - {name} for name, module in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"{' <- '.join(error.args[1])} is a circle; move what both ends need into a module below them")


@every_module
def test_reading_a_config_needs_no_torch(module):
    if module.layer in ("errors", "config"):
        heavy = sorted(module.imports_of("torch") | module.imports_of("megatron") | module.imports_of("transformers"))
        assert not heavy, (
            f"{module.name} imports {heavy}; a wrong config must be told at once: move the use above config"
        )


@every_module
def test_the_schedule_decides_without_torch(module):
    if module.name in PURE_SCHEDULE:
        heavy = sorted(module.imports_of("torch") | module.imports_of("megatron"))
        theirs = our_imports(module) - PURE_SCHEDULE
        below = sorted(name for name in theirs if MODULES[name].layer not in ("errors", "config"))
        assert not heavy and not below, (
            f"{module.name} imports {heavy + below}; it must stay plain Python: let the caller hand in what it says"
        )


@every_module
def test_megatron_stays_in_its_layers(module):
    if module.layer not in MEGATRON_LAYERS:
        found = sorted(module.imports_of("megatron"))
        assert not found, (
            f"{module.name} imports {found}; megatron belongs under {sorted(MEGATRON_LAYERS)}: wrap it there"
        )


@every_module
def test_torch_distributed_stays_in_its_layer(module):
    if module.layer not in ("distributed", "launch"):  # the launcher starts torchrun, before there are ranks
        found = sorted(module.imports_of("torch.distributed") - {"torch.distributed.ProcessGroup"})
        assert not found, (
            f"{module.name} imports {found}; only distributed/ communicates: "
            "call or add a function in distributed/collectives.py that says what is meant and over whom"
        )


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of every identifier, part of a module's name, and word of a text that is not a docstring."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Name):
            found = [node.id]
        elif isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found = re.findall(r"\w+", node.value)
        yield from ((getattr(node, "lineno", 0), word.lower()) for word in found)


@every_module
def test_devices_are_named_in_the_runtime_only(module):
    if module.name not in DEVICE_MODULES:
        found = sorted({f"line {line}: {word}" for line, word in words(module.tree) if word in DEVICE_WORDS})
        assert not found, (
            f"{module.name} names a device ({', '.join(found)}); only {sorted(DEVICE_MODULES)} may: "
            "ask Runtime (device, backend, has_transformer_engine), and give it a field if one is missing"
        )


@every_module
def test_names_say_something(module):
    classes = [node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    in_classes = {word.lower() for name in classes for word in re.findall(r"[A-Z][a-z]+", name)}
    in_path = set(re.split(r"[._]", module.name))
    empty = sorted((in_classes | in_path) & SAYS_NOTHING)
    assert not empty, f"{module.name}: {empty} says nothing; name what the module or class is about"


def checked(source: str) -> set[str]:
    return {word for _, word in words(ast.parse(source))} & DEVICE_WORDS


def test_the_word_check_sees_code_and_texts_but_not_docstrings_or_longer_names():
    assert checked('x = torch.device("cuda:0")') == {"cuda"}
    assert checked("torch.cuda.synchronize()") == {"cuda"}
    assert checked("import transformer_engine.pytorch as te") == {"transformer_engine"}
    assert checked('"""Without CUDA."""\n# nccl\nhas_transformer_engine = use_gloo_process_groups') == set()


def test_an_import_from_above_is_seen_inside_a_function_too(tmp_path):
    path = tmp_path / "data" / "reader.py"
    path.parent.mkdir()
    path.write_text("def read():\n    from rto_megatron.metrics import Mean\n")
    with pytest.raises(AssertionError, match=r"is in 'data' and imports \['metrics'\], which lie above it"):
        test_imports_point_down(Module(path, root=tmp_path))
