"""Imports run down only, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "staff"
# a chapter (a folder) or a file at the top may import what stands in a row below its own, inside functions
# too
ROWS = [
    ["cli"],
    ["flags"],
    ["__init__"],
    ["tryout"],
    ["comparison"],
    ["jobs", "candidates", "diagnosis"],
    ["pipeline"],
    ["runs"],
    ["report"],
    ["planning"],
    ["timing"],
    ["scoring"],
    ["inspection"],
    ["models"],
    ["words"],
    ["methods", "graph"],
    ["data"],
    ["config", "types", "files", "bars", "settings"],
]
# what is lower than its chapter for now
EXCEPTIONS = {
    ("models", "scoring"),
}
HUGGING_FACE = {"transformers", "peft", "datasets", "huggingface_hub", "accelerate", "tokenizers"}
KNOWS_HUGGING_FACE = {
    "__init__",  # for a type alone, like the next
    "runs/outputs",
    "data",
    "models",
    "scoring/prefix",
    "comparison/evaluate",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}" if node.module == "staff" else node.module
                for alias in node.names
            )


def modules():
    return [
        (path.relative_to(SOURCE).with_suffix("").parts[0], path) for path in sorted(SOURCE.rglob("*.py"))
    ]


def loads(code, *names):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(found.stdout.split()) & set(names)


def test_every_module_has_a_row():
    assert {name for name, _ in modules()} == {name for row in ROWS for name in row}


@pytest.mark.parametrize("module", modules(), ids=lambda pair: str(pair[1].relative_to(SOURCE)))
def test_imports_run_down(module):
    name, path = module
    row = {name: i for i, names in enumerate(ROWS) for name in names}
    for imported in imports(path):
        parts = imported.split(".")
        if (
            parts[0] == "staff"
            and len(parts) > 1
            and parts[1] in row
            and parts[1] != name
            and (name, parts[1]) not in EXCEPTIONS
        ):
            assert row[parts[1]] >= row[name], f"{name} imports {parts[1]}"
        assert parts[0] != "ray" or path.name == "on_ray.py", f"{path} imports {imported}"
        if parts[0] in HUGGING_FACE:
            assert {name, str(path.relative_to(SOURCE).with_suffix(""))} & KNOWS_HUGGING_FACE, (
                f"{path} imports {imported}"
            )


def test_importing_staff_and_its_numbers_loads_no_torch():
    assert not loads(
        "import staff, staff.methods, staff.config, staff.runs.store, staff.planning, staff.cli, "
        "staff.data.rows, staff.pipeline",
        "torch",
        "transformers",
    )


def test_methods_are_numpy_alone():
    assert not loads("import staff.methods", "torch", "transformers", "sklearn", "pyarrow", "scipy", "yaml")


def test_kernels_know_no_transformers():
    assert not loads(
        "import staff.scoring.gradnorm, staff.scoring.scopes, staff.scoring.scorer", "transformers", "peft"
    )


def test_what_trains_is_loaded_where_something_is_trained():
    assert not loads("import staff.runs.pieces", "transformers.trainer", "peft", "datasets", "sympy")


FRONT_DOORS = {"cli", "__init__"}  # name what they call as it is named: commands, and the public API
IN_EVERY_FILE = {"logger"}


def names_of(path):
    """The public names that a file's own top level defines; imports are somebody else's."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id


def test_no_two_public_things_share_a_name():
    homes = {}
    for _, path in modules():
        if path.stem not in FRONT_DOORS:
            for name in set(names_of(path)) - IN_EVERY_FILE:
                homes.setdefault(name, []).append(str(path.relative_to(SOURCE)))
    shared = {name: files for name, files in homes.items() if not name.startswith("_") and len(files) > 1}
    assert shared == {}
