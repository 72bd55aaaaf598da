"""The laws of the house: who imports whom, where axes move, and what stays unimported.

The source is parsed, and processes of their own show what an import really brings in.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from originals import randomise
from PIL import Image

import mlx_zoo
from mlx_zoo.verify.reference import import_torchvision

PACKAGE = Path(mlx_zoo.__file__).parent
FILES = {
    ".".join(("mlx_zoo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
TORCH = {"torch", "torchvision", "timm", "transformers", "sentence_transformers", "safetensors"}

# Who may import whom when it is imported itself: a folder or file, and those below it. Whatever is
# in the same folder is free. A new folder has to be given its place here.
ARROWS = {
    "errors": (),
    "lazy": (),
    "backend": ("errors",),
    "models": ("models.layers", "backend"),
    "mapping": ("errors",),
    "preprocess": ("errors",),
    "catalogue": ("errors", "mapping.spec", "preprocess.image"),
    "specs": ("catalogue", "errors", "mapping.spec", "models", "preprocess"),
    "registry": ("catalogue", "errors", "specs", "mapping.engine"),  # to count parameters
    "hub": ("errors",),
    "describe": ("registry", "catalogue", "errors", "hub", "preprocess"),
    "quantization": ("registry", "backend"),
    "converting": (
        *("describe", "registry", "catalogue", "errors", "hub", "mapping", "quantization"),
    ),
    "publishing": ("describe", "registry", "catalogue", "hub", "mapping"),
    "zoo": (
        *("converting", "describe", "registry", "catalogue", "errors", "hub", "mapping"),
        *("quantization", "backend", "publishing"),
    ),
    "exporting": (
        *("describe", "registry", "catalogue", "errors", "hub", "mapping", "preprocess"),
        *("models.layers", "backend", "zoo"),
    ),
    "verify": (
        "zoo",
        "converting",
        "quantization",
        "describe",
        "registry",
        "catalogue",
        "errors",
        "hub",
        "mapping",
        "preprocess",
        "backend",
        "exporting",  # what was trained is compared with its export
        "models",  # what operations they use
    ),
    "tasks": ("zoo", "describe", "registry", "catalogue", "errors", "preprocess", "hub", "backend"),
    "training": (
        *("zoo", "describe", "registry", "catalogue", "errors", "preprocess", "hub", "mapping"),
        *("quantization", "tasks", "models", "backend", "verify.markup", "lazy"),
    ),
    "benchmark": (
        *("zoo", "describe", "registry", "catalogue", "errors", "preprocess", "verify", "tasks"),
        "backend",
    ),
}
ENTRANCES = ("", "__main__", "cli", "demo")  # see everything; nothing inside sees them


def imports(tree, *, top_level=False):
    """The full names of what a file imports; at top level, what is imported with the file itself.

    Names for a type checker alone count for neither.
    """
    found = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and top_level:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        nodes += ast.iter_child_nodes(node)
    return found


def ours(tree, **options):
    """Modules of the package that a file imports: 'mlx_zoo.hub.cache'."""
    for name in imports(tree, **options):
        if name == "mlx_zoo.__version__":
            continue
        while name.startswith("mlx_zoo") and name not in FILES:
            name = name.rpartition(".")[0]
        if name.startswith("mlx_zoo"):
            yield name


def place(module):
    """The folder or file, directly under the package, that a module is in."""
    return module.split(".")[1] if "." in module else ""


def roots(tree, **options):
    return {name.partition(".")[0] for name in imports(tree, **options)}


def is_in(module, allowed):
    return any(module == f"mlx_zoo.{a}" or module.startswith(f"mlx_zoo.{a}.") for a in allowed)


def test_the_parser_sees_imports_of_every_form():
    source = """
import a.b, c as d
from e import f
if TYPE_CHECKING:
    import types_only
else:
    import g
class C:
    import h
try:
    import i
except ImportError:
    pass
def function():
    from j.k import l
    importlib.import_module("m")
"""
    tree = ast.parse(source)
    assert {*imports(tree, top_level=True)} == {"a.b", "c", "e.f", "g", "h", "i"}
    assert {*imports(tree)} == {"a.b", "c", "e.f", "g", "h", "i", "j.k.l", "m"}


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module):
    here = place(module)
    if here in ENTRANCES:
        return
    assert here in ARROWS, f"{here} has no place in ARROWS"
    allowed = ARROWS[here] if here == "models" else (*ARROWS[here], here)
    wrong = [name for name in ours(TREES[module], top_level=True) if not is_in(name, allowed)]
    assert not wrong


def test_the_arrows_point_one_way():
    """ARROWS is in the order of building: what is used stands above its user."""
    used = {
        (place(module), place(name))
        for module, tree in TREES.items()
        for name in ours(tree, top_level=True)
        if place(module) not in ENTRANCES and place(name) != place(module)
    }
    order = list(ARROWS)
    assert all(order.index(b) < order.index(a) for a, b in used), used
    for source, targets in ARROWS.items():
        assert all(
            order.index(target.partition(".")[0]) <= order.index(source) for target in targets
        )


def test_nothing_is_imported_in_a_circle():
    graph = {module: {*ours(tree, top_level=True)} - {module} for module, tree in TREES.items()}
    # A module stands on its package too, but not on what the package re-exports.
    graph["mlx_zoo"] = set()
    finished, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        path.append(module)
        for other in graph[module]:
            visit(other)
        finished.add(path.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", [name for name in FILES if place(name) not in ENTRANCES])
def test_nothing_inside_sees_the_entrances(module):
    assert not [name for name in ours(TREES[module]) if place(name) in ENTRANCES]


@pytest.mark.parametrize("module", [name for name in FILES if place(name) == "hub"])
def test_the_hub_knows_nothing_of_networks(module):
    """Not in its functions either."""
    assert {place(name) for name in ours(TREES[module])} <= {"hub", "errors"}


@pytest.mark.parametrize("module", [name for name in FILES if place(name) == "models"])
def test_models_are_mlx_alone(module):
    assert roots(TREES[module]) <= {
        "__future__",
        "collections",
        "dataclasses",
        "math",
        "typing",
    } | {
        "mlx",
        "mlx_zoo",
        "functools",
        "itertools",
    }
    assert all(is_in(name, ("models.layers", "backend")) for name in ours(TREES[module]))


@pytest.mark.parametrize("module", [name for name in FILES if place(name) == "mapping"])
def test_the_mapping_is_pure(module):
    """No files, no network, no torch, no clock."""
    pure = {"__future__", "collections", "dataclasses", "fnmatch", "functools", "hashlib"}
    pure |= {"itertools", "json", "logging", "math", "numpy", "re", "typing", "mlx", "mlx_zoo"}
    assert roots(TREES[module]) <= pure
    assert all(is_in(name, ("mapping", "errors")) for name in ours(TREES[module]))
    called = {ast.unparse(n.func) for n in ast.walk(TREES[module]) if isinstance(n, ast.Call)}
    assert not called & {"open", "mx.load", "mx.save", "mx.save_safetensors", "eval", "exec"}


@pytest.mark.parametrize("module", FILES)
def test_torch_is_imported_by_the_reference_alone_and_inside_functions(module):
    """And by the worker of a benchmark, a process in which nothing of ours is imported then."""
    assert not roots(TREES[module], top_level=True) & TORCH
    if module not in ("mlx_zoo.verify.reference", "mlx_zoo.benchmark.worker"):
        assert not roots(TREES[module]) & TORCH


def test_the_reference_does_import_torch():
    """So that the law above is about something."""
    assert roots(TREES["mlx_zoo.verify.reference"]) >= {"torch", "torchvision", "timm"}


@pytest.mark.parametrize("module", FILES)
def test_the_hub_client_is_imported_by_the_hub_alone_and_inside_functions(module):
    if place(module) in ENTRANCES:
        assert "huggingface_hub" not in roots(TREES[module])
        return
    assert "huggingface_hub" not in roots(TREES[module], top_level=True)
    assert place(module) == "hub" or "huggingface_hub" not in roots(TREES[module])


# Axes -------------------------------------------------------------------------------------------

MOVES = {"transpose", "moveaxis", "swapaxes", "permute", "rollaxis", "T", "mT", "einsum"}


def moves(tree):
    """Where axes are moved: (the line, what is moved)."""
    return [
        (node.lineno, ast.unparse(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in MOVES
    ]


def test_axes_of_weights_move_in_the_layout_alone():
    found = {module for module, tree in TREES.items() if moves(tree)}
    allowed = {"mlx_zoo.mapping.layout", "mlx_zoo.verify.reference"}  # the latter: input images
    allowed |= {"mlx_zoo.verify.operations", "mlx_zoo.verify.conformance"}  # it is their subject
    allowed |= {"mlx_zoo.backend.ops", "mlx_zoo.backend.cpu"}  # the operands of products
    allowed |= {"mlx_zoo.verify.double"}  # likewise
    allowed |= {"mlx_zoo.backend.cuda"}  # heads and tokens
    allowed |= {"mlx_zoo.backend.transposed"}  # where weights lie in memory; their axes stay
    assert "mlx_zoo.mapping.layout" in found
    assert {name for name in found if place(name) != "models"} <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if place(name) == "models"])
def test_a_network_moves_the_axes_of_activations_only(module):
    wrong = [(line, what) for line, what in moves(TREES[module]) if "weight" in what]
    assert not wrong


# What a process imports -------------------------------------------------------------------------

SLOW = ("torch", "torchvision", "timm", "transformers", "sentence_transformers", "huggingface_hub")
# Besides those, what only some uses of the package need.
EDGE = ("PIL", "tokenizers", "click", "rich", "safetensors")


def run(code, *arguments, check=True):
    """Run Python code in a process of its own and give what it prints, with what it imported."""
    lines = [
        "import json, sys",
        code,
        f"found = [n for n in {SLOW + EDGE!r} if sys.modules.get(n)]",
        "print(); print(json.dumps(found))",
    ]
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *printed, found = done.stdout.splitlines()
    return "\n".join(printed), set(json.loads(found))


def test_a_process_shows_what_it_imports():
    _, found = run("import safetensors, rich")
    assert found == {"safetensors", "rich"}


def test_import_alone_brings_in_nothing_slow():
    assert run("import mlx_zoo")[1] == set()
    assert (
        run("import mlx_zoo; mlx_zoo.list_models('resnet*'); mlx_zoo.info('resnet50')")[1] == set()
    )


LOAD = (
    "import mlx_zoo\nmodel = mlx_zoo.load(sys.argv[1], pretrained={})\nprint(type(model).__name__)"
)


def test_the_bundled_network_loads_without_anything_slow():
    printed, found = run(LOAD.format(True), "resnet_digits")
    assert "ResNet" in printed
    assert found == set()


def test_a_pth_loads_without_torch(tmp_path):
    torchvision = import_torchvision()
    torch.save(randomise(torchvision.models.resnet18()).state_dict(), tmp_path / "w.pth")
    printed, found = run(LOAD.format("sys.argv[2]"), "resnet18", tmp_path / "w.pth")
    assert "ResNet" in printed
    assert found == set()


def test_a_folder_loads_without_torch(minilm):
    printed, found = run(LOAD.format(True), f"local-dir:{minilm}")
    assert "Bert" in printed
    assert found == set()


def test_loading_again_from_the_cache_is_as_lean(minilm, cache):
    for _ in range(2):
        _, found = run(LOAD.format(True), f"local-dir:{minilm}")
    assert found == set()
    assert any(cache.rglob("*.safetensors"))


# The command line -------------------------------------------------------------------------------

CLI = """
from mlx_zoo.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
except SystemExit as error:
    assert not error.code, error.code
"""


def cli_commands():
    """Those of the command line that compare with no original, and how they are used."""
    return {
        "list": ["list", "resnet*"],
        "info": ["info", "resnet50"],
        "info --system": ["info", "--system"],
        "load": ["load", "resnet_digits"],
        "convert": ["convert", "resnet_digits", "{tmp}/folder"],
        "export": ["export", "resnet_digits", "{tmp}/weights.safetensors"],
        "export folder": ["export", "resnet_digits", "{tmp}/folder"],
        "export function": ["export", "gpt2_docs", "{tmp}/net.mlxfn", "--length", "8,16"],
        "predict": ["predict", "resnet_digits", "{tmp}/image.png"],
        "predict gpt2": ["predict", "gpt2_docs", "Return the", "A"],
        "generate": ["generate", "gpt2_docs", "Return the", "--max-tokens", "5"],
        "list --families": ["list", "--families"],
        "embed": ["embed", "local-dir:{minilm}", "a sentence"],
        "finetune": ["finetune", "resnet_digits", "{tmp}/images.csv", "--max-steps", "1"],
        "cache list": ["cache", "list"],
        "cache verify": ["cache", "verify"],
        "cache prune": ["cache", "prune"],
    }


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("command", cli_commands().values(), ids=cli_commands())
def test_a_command_runs_without_torch(command, form, tmp_path, minilm):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (tmp_path / "images.csv").write_text("image,label\nimage.png,a\nimage.png,b\n")
    words = [word.format(tmp=tmp_path, minilm=minilm) for word in command]
    printed, found = run(CLI, *words, *(["--json"] if form == "json" else []))
    assert printed.strip()
    assert not found & {"torch", "torchvision", "timm", "transformers", "sentence_transformers"}
    assert "huggingface_hub" not in found
    if form == "json":
        json.loads(printed)


def test_the_demo_runs_where_torch_is_not_installed():
    """Where it is, the demo verifies against it."""
    hide = f"sys.modules.update(dict.fromkeys({tuple(TORCH)!r}))  # None: not to be found"
    printed, found = run(f"{hide}\n{CLI}", "demo")
    assert "the same network" in printed
    assert not found & TORCH


def test_every_command_is_listed_here():
    from mlx_zoo.cli import main

    known = {words[0] for words in cli_commands().values()}
    originals = {"verify", "conformance", "benchmark", "demo"}
    assert set(main.commands) - originals == known
