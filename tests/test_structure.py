"""The structure of the package: imports go down, floors are kept, nothing is pickled."""

import ast
from pathlib import Path

import vitquant

ROOT = Path(vitquant.__file__).parent
FLOORS = [
    {"errors"},
    {"numerics", "trace"},
    {"calibrate", "integer"},
    {"recipe"},
    {"passes", "artifact"},
    {"methods", "images"},
    {"digits"},
    {"models"},
    {"evaluate", "export"},
    {"api"},
    {"benchmark"},
    {"cli", "__init__"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def _imports(path: Path) -> set[str]:
    """The package's own modules that a file imports at module level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitquant":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vitquant.")}
    return found


def test_imports_go_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in _imports(path) - {own}:
            other_floor = FLOOR.get(other, FLOOR["api"])  # a name that the package itself exports
            if other_floor > FLOOR[own] or other_floor == FLOOR[own] != FLOOR["cli"]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_methods_do_not_know_each_other() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        if path.name != "__init__.py":
            assert "vitquant.methods" not in path.read_text()


def test_no_model_or_layer_names_in_the_core() -> None:
    names = ("qkv", "swin", "blocks.", "patch_embed", "deit")
    for floor in ("trace", "calibrate", "recipe", "passes", "artifact", "numerics"):
        for path in (ROOT / floor).rglob("*.py"):
            strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            docs = {
                ast.get_docstring(n, clean=False)
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
            }
            used = [s for s in strings if isinstance(s, str) and s not in docs]
            assert not [s for s in used if any(name in s.lower() for name in names)], path


def test_nothing_is_pickled() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "weights_only=False" not in text
        assert "torch.load(" not in text or "weights_only=True" in text, path
        assert "torch.save(" not in text, path
