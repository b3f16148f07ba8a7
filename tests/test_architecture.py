"""House rules that a reader of one file cannot see: who may import whom, sizes, no code in data, no private APIs."""
import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dnnlib", "torch_utils", "training", "metrics", "inference", "data_prep", "transport")
SOURCES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py")) + sorted(ROOT.glob("*.py"))
OURS = {*FOLDERS, "legacy", "train", "gen_images", "gen_video", "run_inversion", "directions", "visualizer",
        "calc_metrics", "dataset_tool", "demo", "export"}

# Arrows point one way: dnnlib <- torch_utils <- {training, metrics} <- inference <- legacy <- scripts;
# data_prep, which makes data sets, stands above training and below inference, which takes no more of it than the reader
# of sources and the ways to make a picture square (INFERENCE_MAY_READ_BY); transport, the studies, stands above them,
# and nothing, not even a script, imports it.
MAY_IMPORT = {
    "dnnlib": {"dnnlib"},
    "torch_utils": {"dnnlib", "torch_utils"},
    "training": {"dnnlib", "torch_utils", "training"},
    "metrics": {"dnnlib", "torch_utils", "metrics"},
    "inference": {"dnnlib", "torch_utils", "training", "metrics", "data_prep", "inference"},
    "legacy": {"dnnlib", "torch_utils", "training"},
    "data_prep": {"dnnlib", "torch_utils", "training", "data_prep"},
    "transport": {"dnnlib", "torch_utils", "training", "metrics", "inference", "legacy", "transport"},
}
INFERENCE_MAY_READ_BY = ("data_prep.sources", "data_prep.transforms")
# Commands in inference open networks as scripts do; no other module imports them.
COMMANDS_OF_INFERENCE = {"inference/centroids.py"}
# The parts of training/, modules and sub-packages, in the order in which one builds on the other: each may import only
# what stands above it here, and of that what its line names.
TRAINING = {
    "config": set(),
    "diffaug": set(),
    "data": set(),
    "networks_stylegan3": {"config"},
    "dataset": {"data"},
    "generator": {"config", "networks_stylegan3"},
    "feature_networks": {"data", "dataset"},
    "discriminators": {"config", "diffaug", "feature_networks"},
    "step": {"config", "diffaug", "data", "networks_stylegan3", "discriminators"},
    "loss": {"config", "networks_stylegan3", "discriminators", "step"},
    "trainer": {"config", "networks_stylegan3", "feature_networks", "discriminators", "step", "loss"},
    "run": {"config", "diffaug", "data", "networks_stylegan3", "dataset", "generator", "feature_networks",
            "discriminators", "step", "trainer"},
    "watch": {"config", "diffaug", "data", "networks_stylegan3", "dataset", "generator", "discriminators", "step",
              "trainer", "run"},
    "training_loop": {"run", "watch"},
}
# All that a step may use besides those parts: nothing in it saves, reports or knows a folder.
STEP_MAY_USE = {"collections.abc", "dataclasses", "functools", "math", "time", "typing", "numpy", "torch",
                "torch_utils.distributed", "torch_utils.images", "torch_utils.misc", "torch_utils.ops"}
# Within transport a study knows what all studies share, and no other study. Modules beside the folders are commands:
# they may import any folder, and nothing imports them.
STUDIES = ("san", "ttc", "congested", "latent1d")
TRANSPORT_MAY_IMPORT = {"common": {"common"}} | {study: {study, "common"} for study in STUDIES}
# Third-party modules that live in one place.
CONFINED = {
    "torch.distributed": {"torch_utils/distributed.py"},
    "pickle": {"torch_utils/safe_pickle.py", "torch_utils/checkpoint.py"},
    "dill": set(),
    "timm": {"torch_utils/published.py", "training/feature_networks/", "metrics/detectors/"},
    "torch_fidelity": {"metrics/detectors/"},
    "requests": {"dnnlib/download.py"},
    "urllib3": {"dnnlib/download.py"},
    "matplotlib": {"training/watch/html_report.py", "transport/common/plotting.py"},
    "ot": {"transport/latent1d/semidiscrete.py"},
    "wandb": {"training/watch/reporting.py"},
    "imageio_ffmpeg": {"inference/video_files.py"},
    "huggingface_hub": {"dnnlib/hub.py", "inference/export/model_card.py", "torch_utils/published.py"},
    "onnx": {"inference/export/onnx_graph.py"},
    "onnxscript": {"inference/export/onnx_graph.py"},
    "onnxruntime": {"inference/export/onnx_graph.py"},
    "open_clip": {"inference/directions/clip.py"},
    "gradio": {"inference/page/app.py", "inference/page/server.py"},
    "starlette": {"inference/page/server.py"},
    "tarfile": set(),
    "lmdb": {"data_prep/sources/tables.py"},
    "pyarrow": {"data_prep/sources/tables.py"},
}
MAX_FUNCTION, MAX_LOOP, MAX_CLASS, MAX_COMMAND = 80, 100, 150, 40
MAX_LOOP_IMPORTS, MAX_TRAIN_SCRIPT = 12, 300       # Imports of the training loop, and lines of train.py.
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
    allowed = MAY_IMPORT.get(owner, {*FOLDERS, "legacy"} - {"transport"})
    if relative(path) in COMMANDS_OF_INFERENCE:
        allowed = allowed | {"legacy"}
    assert ours <= allowed, f"{relative(path)} imports {sorted(ours - allowed)}"
    assert not ours & scripts - {owner}, "scripts are not imported"
    for module, places in CONFINED.items():
        if any(name == module or name.startswith(module + ".") for name in names):
            assert any(relative(path).startswith(place) for place in places), f"{module} in {relative(path)}"


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports, by their full names, also where they are imported by name from their package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = whole & set(MODULES)
            found |= modules | ({node.module} if modules != whole else set())
    return found


def part_of(module: str) -> str:
    """The part of the package: what stands directly below it."""
    return module.split(".")[1]


def test_pixels_are_scaled_in_one_place():
    """Images go to [-1, 1] and back: two ways of rounding, and one way in."""
    for path in SOURCES:
        if relative(path) != "torch_utils/images.py":
            assert not re.search(r"/ ?127\.5 ?- ?1\b", path.read_text()), relative(path)


@pytest.mark.parametrize("path", sorted((ROOT / "inference").rglob("*.py")), ids=relative)
def test_inference_reads_and_makes_no_data_sets(path):
    parts = {name for name in imported_modules(path) if name.split(".")[0] == "data_prep"}
    strange = {name for name in parts if ".".join(name.split(".")[:2]) not in INFERENCE_MAY_READ_BY}
    assert not strange, f"imports {sorted(strange)}"


def test_every_part_of_training_has_its_place():
    parts = {path.stem for path in (ROOT / "training").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__"} == set(TRAINING)
    above: set[str] = set()
    for part, allowed in TRAINING.items():
        assert allowed <= above, f"{part} would import {sorted(allowed - above)}, which stand below it"
        above.add(part)


@pytest.mark.parametrize("path", sorted((ROOT / "training").rglob("*.py")), ids=relative)
def test_arrows_within_training(path):
    if path == ROOT / "training" / "__init__.py":
        return
    part = part_of(module_name(path))
    modules = imported_modules(path)
    assert "training" not in modules, "which part of training?"
    parts = {part_of(name) for name in modules if name.startswith("training.")}
    assert parts <= TRAINING[part] | {part}, f"imports {sorted(parts - TRAINING[part] - {part})}"
    if part == "step":
        others = {name for name in modules if not name.startswith("training.")}
        strange = {name for name in others if not any(name == m or name.startswith(m + ".") for m in STEP_MAY_USE)}
        assert not strange, f"a step has no use for {sorted(strange)}"


def test_commands_of_inference_are_not_imported():
    commands = {name.removesuffix(".py").replace("/", ".") for name in COMMANDS_OF_INFERENCE}
    assert commands <= set(MODULES)
    for path in SOURCES:
        assert not imported_modules(path) & commands, relative(path)


def test_modules_import_in_no_circle():
    graph = {name: imported_modules(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()         # Raises CycleError, which names the modules.


@pytest.mark.parametrize("path", sorted((ROOT / "transport").rglob("*.py")), ids=relative)
def test_studies_do_not_know_each_other(path):
    folder = path.parent.name
    tree = ast.parse(path.read_text())
    known = {part_of(name) for name in imported_modules(path) if name.startswith("transport.")}
    allowed = TRANSPORT_MAY_IMPORT.get(folder, {"common", *STUDIES})
    assert known <= allowed, f"{relative(path)} imports {sorted(known - allowed)} of transport"
    if path.name == "__main__.py" or (folder == "transport" and known & set(STUDIES)):
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)], (
            f"{relative(path)} only starts a study: what it does belongs there")


def test_every_folder_of_transport_is_a_study_or_what_they_share():
    assert {p.parent.name for p in (ROOT / "transport").glob("*/__init__.py")} == {"common", *STUDIES}


def length(node: ast.AST) -> int:
    """Lines of a body, without decorators and docstring."""
    doc = ast.get_docstring(node, clean=False) if hasattr(node, "body") else None
    return node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes(path):
    text = path.read_text()
    assert text.isascii(), "ASCII in code"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            is_command = any("command" in ast.unparse(d) for d in node.decorator_list)
            limit = MAX_COMMAND if is_command else MAX_LOOP if node.name == "training_loop" else MAX_FUNCTION
            assert length(node) <= limit, f"{node.name}: {length(node)} lines, at most {limit}"
        if isinstance(node, ast.ClassDef):
            assert length(node) <= LONG_CLASSES.get(node.name, MAX_CLASS), f"{node.name}: {length(node)} lines"


def test_the_loop_can_be_read_in_one_sitting():
    path = ROOT / "training" / "training_loop.py"
    ours = {name for name in imported_modules(path) if name.split(".")[0] in OURS}
    assert len(ours) <= MAX_LOOP_IMPORTS, sorted(ours)
    assert (ROOT / "train.py").read_text().count("\n") <= MAX_TRAIN_SCRIPT


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


def opens_text_without_encoding(node: ast.AST) -> bool:
    """Whether a call reads or writes text in the encoding of the user's locale, which may know ASCII only."""
    if not isinstance(node, ast.Call):
        return False
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if "encoding" in given or None in given:
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in ("read_text", "write_text"):
        return len(node.args) < (2 if name == "write_text" else 1)
    if name in ("TextIOWrapper", "open") and (name != "open" or isinstance(node.func, ast.Name)):
        mode = given.get("mode", ast.unparse(node.args[1]) if len(node.args) > 1 else "r")
        return name != "open" or any("b" not in word for word in re.findall(r"'([^']*)'", mode) or [mode])
    return "text" in given or "universal_newlines" in given         # As subprocess calls it.


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=relative)
def test_text_is_in_utf_8(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if opens_text_without_encoding(node)]
    assert not lines, "say encoding='utf-8'"


def test_text_without_encoding_is_found():
    for code in ("open(p)", "open(p, 'a')", "p.read_text()", "p.write_text(x)", "io.TextIOWrapper(f)",
                 "open(p, mode='w')", "open(p, 'w' if new else 'ab')", "run(c, text=True)",
                 "p.read_text(errors='replace')"):
        assert opens_text_without_encoding(ast.parse(code, mode="eval").body), code
    for code in ("open(p, 'rb')", "open(p, mode='ab')", "open(p, 'a', encoding='utf-8')", "os.open(p, 0)",
                 "archive.open(name)", "p.read_text('utf-8')", "open(p, 'ab' if old else 'wb')", "f.text(text(x))"):
        assert not opens_text_without_encoding(ast.parse(code, mode="eval").body), code


# What Python has on some systems only.
SYSTEM_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog", "msvcrt", "winreg"}
SYSTEM_NAMES = {
    "os": {
        "pread", "pwrite", "sysconf", "sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "killpg", "setsid",
        "getpgid", "setpgid", "getuid", "geteuid", "getgid", "statvfs", "fstatvfs", "posix_fallocate",
        "posix_fadvise", "mkfifo", "nice", "getloadavg", "uname", "wait4", "waitid", "fchown", "chown",
        "register_at_fork", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "WNOHANG", "sendfile", "copy_file_range",
        "memfd_create", "openpty"
    },
    "signal": {
        "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP",
        "SIGCONT", "pthread_sigmask", "pthread_kill", "setitimer", "alarm", "sigwait", "sigtimedwait", "pause"
    },
}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_what_some_systems_lack_is_asked_for(path):
    """A module only some systems have is imported in a `try`; of a name a file asks before with hasattr or getattr."""
    tree = ast.parse(path.read_text())
    tried = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    asked = {(call.args[0].id, call.args[1].value) for call in ast.walk(tree)
             if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("hasattr", "getattr")
             and isinstance(call.args[0], ast.Name) and isinstance(call.args[1], ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and imports(node) & SYSTEM_MODULES:
            assert node in tried, f"line {node.lineno}: {sorted(imports(node))}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in SYSTEM_NAMES.get(node.value.id, ()):
                assert (node.value.id, node.attr) in asked, f"line {node.lineno}: {ast.unparse(node)}"


def test_no_private_torch_and_no_removed_packages():
    for path in SOURCES:
        text = path.read_text()
        assert "pkg_resources" not in text, path
        tree = ast.parse(text)
        uses = imports(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in uses if re.match(r"torch\._(C|dynamo|inductor)\b", name)], path


@pytest.mark.slow
def test_commands_that_sample_and_score_load_no_more_than_they_need():
    """Each of these takes as long to load as a few images take to make."""
    code = ("import gen_images, gen_video, calc_metrics, export, sys\n"
            "print([name for name in ('torch._dynamo', 'timm', 'torchvision', 'scipy.signal') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


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
    prefix = "torch_utils.ops."
    return {name.removeprefix(prefix): {other.removeprefix(prefix) for other in imported_modules(path) & set(MODULES)
                                        if other.startswith(prefix)}
            for name, path in MODULES.items() if name.startswith(prefix)}


def test_operations_have_no_circle():
    graphlib.TopologicalSorter(imports_of_operations()).prepare()       # An error names the circle.


def test_operations_import_what_the_docs_say():
    section = (ROOT / "docs" / "ops.md").read_text().partition("\n## Where what is\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \|.*\|([^|]*)\|$", section)
    told = {module: set(re.findall(r"`(\w+)`", uses)) for module, uses in rows}
    assert told == imports_of_operations()
    for i, (module, _) in enumerate(rows):
        assert told[module] <= {above for above, _ in rows[:i]}, f"{module} uses what stands below it"
