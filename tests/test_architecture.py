"""House rules that a reader of one file cannot see: who may import whom, sizes, no code in data, no private APIs."""
import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dnnlib", "torch_utils", "training", "metrics", "inference", "data_prep", "transport")
SOURCES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py")) + sorted(ROOT.glob("*.py"))
OURS = {*FOLDERS, "legacy", "train", "gen_images", "calc_metrics", "dataset_tool", "demo"}

# Arrows point one way: dnnlib <- torch_utils <- {training, metrics} <- inference <- legacy <- scripts;
# data_prep, which makes data sets, stands beside inference; transport, the studies, stands above all but the scripts.
MAY_IMPORT = {
    "dnnlib": {"dnnlib"},
    "torch_utils": {"dnnlib", "torch_utils"},
    "training": {"dnnlib", "torch_utils", "training"},
    "metrics": {"dnnlib", "torch_utils", "metrics"},
    "inference": {"dnnlib", "torch_utils", "training", "metrics", "inference"},
    "legacy": {"dnnlib", "torch_utils", "training"},
    "data_prep": {"dnnlib", "torch_utils", "training", "data_prep"},
    "transport": {"dnnlib", "torch_utils", "training", "metrics", "inference", "legacy", "transport"},
}
# Third-party modules that live in one place.
CONFINED = {
    "torch.distributed": {"torch_utils/distributed.py"},
    "pickle": {"torch_utils/safe_pickle.py", "torch_utils/checkpoint.py"},
    "dill": set(),
    "timm": {"training/feature_networks/", "metrics/detectors/"},
    "torch_fidelity": {"metrics/detectors/"},
    "requests": {"dnnlib/download.py"},
    "matplotlib": {"training/run_report.py", "transport/plotting.py"},
    "ot": {"transport/"},
    "wandb": {"training/reporting.py"},
    "tarfile": {"inference/tar_store.py"},
    "lmdb": {"data_prep/sources/tables.py"},
    "pyarrow": {"data_prep/sources/tables.py"},
}
MAX_FILE, MAX_FUNCTION, MAX_LOOP, MAX_CLASS, MAX_COMMAND = 500, 80, 200, 150, 40
LONG_CLASSES = {"_Machine": 250}        # One method per pickle opcode.


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def trees():
    return [(p, ast.parse(p.read_text())) for p in SOURCES]


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_follow_the_arrows(path):
    names = imports(ast.parse(path.read_text()))
    owner = relative(path).split("/")[0].removesuffix(".py")
    ours = {name.split(".")[0] for name in names} & OURS
    scripts = OURS - set(FOLDERS) - {"legacy"}
    allowed = MAY_IMPORT.get(owner, {*FOLDERS, "legacy"})
    assert ours <= allowed, f"{relative(path)} imports {sorted(ours - allowed)}"
    assert not ours & scripts - {owner}, "scripts are not imported"
    for module, places in CONFINED.items():
        if any(name == module or name.startswith(module + ".") for name in names):
            assert any(relative(path).startswith(place) for place in places), f"{module} in {relative(path)}"


def length(node: ast.AST) -> int:
    """Lines of a body, without decorators and docstring."""
    doc = ast.get_docstring(node, clean=False) if hasattr(node, "body") else None
    return node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    assert text.isascii(), "ASCII in code"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            is_command = any("command" in ast.unparse(d) for d in node.decorator_list)
            limit = MAX_COMMAND if is_command else MAX_LOOP if node.name == "training_loop" else MAX_FUNCTION
            assert length(node) <= limit, f"{node.name}: {length(node)} lines, at most {limit}"
        if isinstance(node, ast.ClassDef):
            assert length(node) <= LONG_CLASSES.get(node.name, MAX_CLASS), f"{node.name}: {length(node)} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_file_has_its_licence_and_says_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)) or text.count("\n") == 1


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_habits(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
        if isinstance(node, ast.Global):
            pytest.fail(f"line {node.lineno}: global statement")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                assert not isinstance(default, ast.List | ast.Dict | ast.Set), f"{node.name}: mutable default"
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert ast.unparse(node.value) == "True", f"line {node.lineno}"


def test_no_private_torch_and_no_removed_packages():
    for path in SOURCES:
        text = path.read_text()
        assert "pkg_resources" not in text, path
        tree = ast.parse(text)
        uses = imports(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in uses if re.match(r"torch\._(C|dynamo|inductor)\b", name)], path


def test_nothing_large_or_generated_is_committed():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        # Numbers of the official implementation cannot be made here, and each case is whole.
        limit = 4 << 20 if name.startswith("tests/parity/data/") else 1 << 20
        assert not path.is_file() or path.stat().st_size < limit, name

#----------------------------------------------------------------------------
# The operations, whose modules lie in one folder.

def imports_of_operations() -> dict[str, set[str]]:
    """Module of torch_utils/ops -> those that it imports, at its top or anywhere else."""
    folder, found = ROOT / "torch_utils" / "ops", {}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for module in modules:
        tree = ast.parse((folder / f"{module}.py").read_text())
        names = imports(tree) | {f"{node.module}.{alias.name}" for node in ast.walk(tree)
                                 if isinstance(node, ast.ImportFrom) for alias in node.names}
        found[module] = {name.split(".")[2] for name in names if name.startswith("torch_utils.ops.")} & modules
    return found


def test_operations_have_no_circle():
    graphlib.TopologicalSorter(imports_of_operations()).prepare()       # An error names the circle.


def test_operations_import_what_the_docs_say():
    section = (ROOT / "docs" / "ops.md").read_text().partition("\n## Where what is\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \|.*\|([^|]*)\|$", section)
    told = {module: set(re.findall(r"`(\w+)`", uses)) for module, uses in rows}
    assert told == imports_of_operations()
    for i, (module, _) in enumerate(rows):
        assert told[module] <= {above for above, _ in rows[:i]}, f"{module} uses what stands below it"
