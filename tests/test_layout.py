"""The shape of the project: who imports whom, twins that stay twins, sizes that stay small."""

import ast
import re

import pytest
from conftest import ROOT

LOCAL = {
    "engine",
    "evaluation",
    "attacks",
    "utils",
    "data",
    "checkpoint",
    "cifar",
    "options",
    "plots",
    "presets",
    "models",
    "graph",
    "parallel",
    "reading",
    "record",
    "report",
    "auto_attack",
    "checks",
    "export",
    "pictures",
    "referee",
    "schedules",
    "synthetic",
    "values",
    "files",
    "keeper",
    "resume",
    "rollback",
}
MAY_IMPORT = {
    "engine": {"utils", "graph", "keeper", "parallel", "record", "resume", "rollback", "schedules"},
    "evaluation": {"attacks", "auto_attack", "parallel"},
    "attacks": set(),
    "utils": set(),
    "auto_attack": {"attacks", "files", "parallel"},
    "checks": {"attacks"},
    "cifar": {"reading"},
    "data": {"cifar", "parallel", "synthetic"},
    "checkpoint": {"files", "reading"},
    "reading": set(),
    "export": {"files"},
    "files": set(),
    "graph": set(),
    "keeper": {"checkpoint", "files", "parallel", "resume", "utils"},
    "options": {"parallel", "presets", "values"},
    "parallel": {"utils"},
    "pictures": {"attacks", "files", "plots", "utils"},
    "plots": set(),
    "presets": set(),
    "record": {"checkpoint", "files", "plots", "utils"},
    "referee": {
        "auto_attack",
        "checkpoint",
        "checks",
        "evaluation",
        "export",
        "files",
        "parallel",
        "pictures",
        "report",
    },
    "report": {"files"},
    "resume": {"checkpoint", "files", "parallel", "reading", "utils"},
    "rollback": {"parallel", "resume"},
    "schedules": {"utils"},
    "synthetic": set(),
    "values": set(),
}
THIRD_PARTY = {
    "engine": {"torch", "numpy", "tqdm"},
    "evaluation": {"torch", "tqdm"},
    "attacks": {"torch"},
    "utils": {"torch", "numpy"},
    "cifar": {"numpy"},
    "data": {"torch", "numpy"},  # and torchvision by name, only to download
    "auto_attack": {"torch", "tqdm"},
    "checkpoint": {"torch"},
    "reading": {"torch"},
    "checks": {"torch"},
    "export": {"torch"},
    "pictures": {"torch"},
    "referee": {"torch"},
    "synthetic": {"numpy"},
    "graph": {"torch"},
    "options": set(),
    "values": set(),
    "parallel": {"torch"},
    "plots": {"matplotlib"},
    "files": set(),
    "presets": set(),
    "record": {"torch"},
    "keeper": {"torch"},
    "resume": {"torch", "numpy"},
    "report": {"torch", "numpy"},
    "rollback": {"torch"},
    "schedules": {"numpy"},
}
KNOWN = {"torch", "numpy", "torchvision", "matplotlib", "tqdm", "scipy"}
SCRIPTS = ["MIX_KL_CIFAR10.py", "MIX_KL_CIFAR100.py", "test_cifar10.py", "test_cifar100.py"]
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py")])


def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not any(alias.name == "*" for alias in node.names), f"{path.name}: star import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_one_way(module):
    found = imports(ROOT / f"{module}.py")
    assert found & LOCAL <= MAY_IMPORT[module]
    assert found & KNOWN <= THIRD_PARTY[module]


def test_models_import_torch_and_each_other_only():
    for path in (ROOT / "models").glob("*.py"):
        assert imports(path) & (LOCAL | KNOWN) <= {"torch", "models"}


def test_the_root_holds_what_the_design_lists():
    found = {path.name for path in ROOT.glob("*.py")}
    assert found == {f"{name}.py" for name in MAY_IMPORT} | set(SCRIPTS)


@pytest.mark.parametrize("first, second", [SCRIPTS[:2], SCRIPTS[2:]])
def test_twins_differ_in_their_tables_only(first, second):
    def functions(name):
        return [
            ast.dump(n) for n in tree(ROOT / name).body if not isinstance(n, (ast.Assign, ast.Expr))
        ]

    assert functions(first) == functions(second)
    doc = ast.get_docstring(tree(ROOT / first)).replace("CIFAR-10 ", "CIFAR-100 ")
    doc = doc.replace("CIFAR10.py", "CIFAR100.py").replace("cifar10.py", "cifar100.py")
    assert doc == ast.get_docstring(tree(ROOT / second))


@pytest.mark.parametrize(
    "module", ["models", *(m for m in MAY_IMPORT if m not in ("cifar", "data", "options"))]
)
def test_no_dataset_and_no_number_of_classes_is_known_below_the_scripts(module):
    for path in SOURCES:
        if module in (path.stem, path.parent.name):
            text = path.read_text()
            assert not re.search(r"(?<!test_)cifar", text, re.I)  # but a message may name a script
            assert not re.search(r"num_classes ?= ?\d", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"


def test_the_method_is_one_screen():
    (step,) = (n for n in tree(ROOT / "engine.py").body if getattr(n, "name", "") == "mix_kl_step")
    assert step.end_lineno - step.lineno + 1 <= 40


def test_flags_become_pixel_fractions_in_the_scripts_only():
    """Numbers such as 2 / 255 apart, others divide pixels (data) or steps of a grid (pictures)."""

    def divides(node):
        if not isinstance(getattr(node, "op", None), ast.Div):
            return False
        by = node.value if isinstance(node, ast.AugAssign) else node.right
        number = isinstance(getattr(node, "left", None), ast.Constant)
        return isinstance(by, ast.Constant) and by.value == 255 and not number

    found = {path.name: sum(map(divides, ast.walk(tree(path)))) for path in SOURCES}
    limits = dict(zip(SCRIPTS, (2, 2, 1, 1), strict=True)) | {"data.py": 2, "pictures.py": 2}
    assert {name: count for name, count in found.items() if count} == limits
