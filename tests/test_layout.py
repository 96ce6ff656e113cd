"""The layout: few files in the root, imports that point down, small files and functions."""
import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from conftest import ONE_THREAD, ROOT

# From the ground up. A module may import what stands on a floor below its own, and the modules of
# its own folder.
FLOORS = (
    ("kernels", "ulma", "files", "intervals"),
    ("tokenizer",),
    ("model", "data"),
    ("packing",),
    ("lora",),
    ("world",),
    ("step",),
    ("training",),
    ("generate", "judge", "tools"),
    ("eval", "d2o"),
    ("train",),
    ("rlhf",),
    ("study",),
    ("bench", "tests"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
USED_ONLY_BY = {"train": {"rlhf", "study", "bench", "tests"},
                "eval": {"train", "study", "bench", "tests"}}
NOTHING_OF_THE_PROJECT = ("kernels", "ulma", "files", "intervals")


def name_of(path: Path) -> str:
    """The root module or the folder that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def project_files() -> list[Path]:
    """Every .py file but those of tests/ and bench/."""
    folders = [file.parent for file in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return sorted(file for file in files if name_of(file) not in ("tests", "bench"))


def all_files() -> list[Path]:
    return [*project_files(), *ROOT.glob("bench/*.py"), *ROOT.glob("tests/**/*.py")]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Root modules and folders of the project that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module if node.level == 0 else name_of(path))
    return {module.partition(".")[0] for module in modules} & FLOOR_OF.keys()


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def public_functions(path: Path) -> list[ast.FunctionDef]:
    """Functions of a module and methods of its classes whose names do not start with _."""
    classes = [node for node in parsed(path).body
               if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bodies = [parsed(path).body, *(node.body for node in classes)]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)
            and (not node.name.startswith("_") or node.name.endswith("__"))]


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """All parameters, * and ** included, without self and cls."""
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [arg for arg in found if arg and arg.arg not in ("self", "cls")]


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno} {getattr(node, 'name', '')}"


# ---- where files stand --------------------------------------------------------------------------

def test_the_root_holds_the_training_step_and_what_a_run_needs_beside_it():
    names = {file.stem for file in ROOT.glob("*.py")}
    assert len(names) <= 13, sorted(names)
    assert names <= FLOOR_OF.keys(), f"no floor: {sorted(names - FLOOR_OF.keys())}"


def test_every_folder_has_a_floor_and_says_in_one_sentence_what_it_is_for():
    for file in ROOT.glob("*/__init__.py"):
        assert name_of(file) in FLOOR_OF, f"{name_of(file)}/ has no floor"
        assert ast.get_docstring(parsed(file)), f"{file} has no docstring"


# ---- imports ------------------------------------------------------------------------------------

def test_imports_point_down_the_floors():
    wrong = [f"{path.relative_to(ROOT)} imports {other}" for path in project_files()
             for other in imports_of(path) - {name_of(path)}
             if FLOOR_OF[other] >= FLOOR_OF[name_of(path)]]
    assert not wrong


def test_the_ground_floor_imports_nothing_of_the_project():
    wrong = [f"{path.relative_to(ROOT)} imports {other}" for path in project_files()
             if name_of(path) in NOTHING_OF_THE_PROJECT
             for other in imports_of(path) - {name_of(path)}]
    assert not wrong


def test_train_and_eval_are_commands_not_libraries():
    wrong = [f"{path.relative_to(ROOT)} imports {other}" for path in all_files()
             for other in imports_of(path) & USED_ONLY_BY.keys()
             if name_of(path) not in USED_ONLY_BY[other] | {other}]
    assert not wrong


def test_training_loads_nothing_that_only_others_need():
    # Measured, not read: what an import loads depends on what it imports in turn.
    script = """
import json, sys
import train
after_train = sorted(sys.modules)
import rlhf.ppo
print(json.dumps([after_train, sorted(sys.modules)]))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ONE_THREAD,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for modules, others in zip(json.loads(run.stdout), (
            {"judge", "rlhf", "study", "tools"}, {"judge", "study", "tools"}), strict=True):
        assert "train" in modules
        assert not [module for module in modules if module.partition(".")[0] in others]


# ---- sizes --------------------------------------------------------------------------------------

def test_files_have_at_most_400_lines():
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
             for path in project_files()}
    assert not {name: count for name, count in lines.items() if count > 400}


def test_functions_have_at_most_60_lines():
    assert not [place(path, node) for path in project_files() for node in functions_of(path)
                if node.end_lineno - node.lineno + 1 > 60]


def test_functions_have_at_most_8_parameters_losses_and_kernels_aside():
    assert not [place(path, node) for path in project_files() for node in functions_of(path)
                if name_of(path) not in ("ulma", "kernels") and len(parameters(node)) > 8]


def test_every_public_parameter_has_a_type_hint():
    assert not [f"{place(path, function)}({arg.arg})" for path in project_files()
                for function in public_functions(path) for arg in parameters(function)
                if arg.annotation is None]
