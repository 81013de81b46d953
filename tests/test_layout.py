"""The house: six flat files, leaves that know nothing of each other, a page that breathes, no dead flag."""
import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = {"model": 13100, "diffusion": 7850, "text_encoder": 10050, "data": 18800, "train": 18900,
          "sample": 11700}                                    # [tokens]
ALL = 80200                                                  # of the six files together [tokens]
DENSE = 30                                                   # a line of so many tokens is a dense one
LEAVES = {"model", "diffusion", "data", "text_encoder"}
PACKAGES = {"torch", "numpy", "PIL", "sentencepiece", "tqdm", "safetensors"}
WHEN_ASKED_FOR = {"tensorboard", "wandb", "fsspec"}          # never at the top of a file
CONFIGS = {"train": "TrainConfig", "data": "DataConfig", "model": "ModelConfig",
           "diffusion": "DiffusionConfig", "text_encoder": "TextConfig"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in BUDGET}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
each_file = pytest.mark.parametrize("name", BUDGET)


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that are imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}"
            found.add(node.module.split(".")[0])
    return found


def config_class(name: str) -> ast.ClassDef:
    return next(n for n in TREES[name].body if isinstance(n, ast.ClassDef) and n.name == CONFIGS[name])


def fields(name: str) -> dict[str, ast.AnnAssign]:
    return {n.target.id: n for n in config_class(name).body if isinstance(n, ast.AnnAssign)}


ALL_FIELDS = [(name, field) for name in CONFIGS for field in fields(name)]


def test_there_are_six_files_and_no_helper_file():
    assert {p.stem for p in ROOT.glob("*.py")} == set(BUDGET)
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders <= {"tests", "assets", "runs", "__pycache__"}


@each_file
def test_a_leaf_imports_nothing_of_the_project(name):
    inside = imported(TREES[name]) & set(BUDGET)
    assert inside == (set() if name in LEAVES else LEAVES)


@each_file
def test_only_the_run_time_packages_are_imported(name):
    allowed = set(sys.stdlib_module_names) | PACKAGES | set(BUDGET)
    assert imported(TREES[name]) <= allowed | WHEN_ASKED_FOR
    top = ast.Module([n for n in TREES[name].body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert imported(top) <= allowed


def test_requirements_are_the_run_time_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[=<>~! ;]", line)[0] for line in lines if line and not line.startswith(("#", "-"))}
    assert names == {"pillow" if p == "PIL" else p for p in PACKAGES}


@each_file
def test_no_exception_is_passed_over_in_silence(name):
    """Naming an exception and passing is a decision; passing over all of them is not."""
    broad = {None, "Exception", "BaseException"}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(n, ast.Pass) for n in node.body):
            assert (node.type and ast.unparse(node.type)) not in broad, f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except, line {node.lineno}"


@each_file
def test_file_opens_with_a_docstring_and_a_leaf_with_its_letters(name):
    text = ast.get_docstring(TREES[name])
    assert text
    if name in LEAVES:
        assert re.search(r"(Letters|Shapes):?\s", text)
        assert re.search(r"\bB batch|\bB pictures", text)


@each_file
def test_public_functions_have_docstrings(name):
    """For one of up to six lines its name may do, and `main` is the file's own docstring."""
    silent = {n.name for n in TREES[name].body if isinstance(n, ast.FunctionDef)
              and n.end_lineno - n.lineno > 5 and not n.name.startswith("_") and not ast.get_docstring(n)}
    assert silent <= {"main"}


def test_importing_a_file_does_no_work(tmp_path):
    """It prints nothing, takes no device, starts no thread, sets no seed, no option and writes no file."""
    probe = f"""
import importlib, os, random, threading
import numpy, torch

def state():
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.get_default_dtype(), dict(os.environ), sorted(os.listdir()), threading.active_count())

before = state()
for name in {list(BUDGET)}:
    importlib.import_module(name)
    assert state() == before, name
    assert not torch.cuda.is_initialized(), name
"""
    done = subprocess.run([sys.executable, "-B", "-c", probe], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_file
def test_only_definitions_stand_at_the_top_level(name):
    """No bare call runs at import, but for the guard at the end of a program and the docstring."""
    for node in TREES[name].body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'", f"line {node.lineno}"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"
        else:
            assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try), f"line {node.lineno}"


# -------------------------------------------------------------------------------------- a page that breathes


def tokens_of_lines(name: str) -> dict[int, int]:
    """How many tokens each code line bears, by its number: without comments, docstrings and layout."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    docstrings = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))

    found = Counter()
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline):
        line = token.start[0]
        told = token.type == tokenize.STRING and line in docstrings
        if token.type not in layout and not told:
            found[line] += 1
    return found


LINES = {name: tokens_of_lines(name) for name in BUDGET}
TABLES = {name: {line for node in tree.body if isinstance(node, ast.Assign)
                 for line in range(node.lineno, node.end_lineno + 1)} for name, tree in TREES.items()}


def test_tokens_are_counted_without_comments_docstrings_and_layout(monkeypatch):
    source = '''"""Doc
string."""
x = 1  # one

def f(a):
    """Told."""
    return ("a"
            "b")
'''
    monkeypatch.setitem(SOURCES, "x", source)
    monkeypatch.setitem(TREES, "x", ast.parse(source))
    assert tokens_of_lines("x") == {3: 3, 5: 6, 7: 3, 8: 2}


@each_file
def test_a_file_is_within_its_budget_of_tokens(name):
    assert LINES[name].total() <= BUDGET[name]


def test_all_files_are_within_their_budget_of_tokens():
    assert sum(lines.total() for lines in LINES.values()) <= ALL


@each_file
def test_a_line_of_a_file_takes_one_step(name):
    assert LINES[name].total() <= 12.5 * len(LINES[name])


def test_a_line_of_all_files_takes_one_step():
    total = sum(lines.total() for lines in LINES.values())
    assert total <= 11.5 * sum(map(len, LINES.values()))


@each_file
def test_few_lines_are_dense_and_none_outside_of_tables_is_packed(name):
    """Module-level tables are read by columns: in them a line may be full, but counts among the dense."""
    dense = sorted(line for line, tokens in LINES[name].items() if tokens >= DENSE)
    assert len(dense) <= 0.02 * len(LINES[name]), dense
    packed = sorted(line for line in dense if LINES[name][line] > 32 and line not in TABLES[name])
    assert packed == []


@each_file
def test_functions_are_short(name):
    long = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            most = 110 if (name, node.name) == ("train", "main") else 60
            if lines > most:
                long.append(f"{node.name}: {lines} lines")
    assert long == []


def test_the_training_loop_has_few_names():
    main = next(node for node in TREES["train"].body if isinstance(node, FUNCTIONS) and node.name == "main")
    names = {node.arg for node in ast.walk(main) if isinstance(node, ast.arg)}
    for node in ast.walk(main):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    assert len(names) <= 40, sorted(names)


# ------------------------------------------------------------------------------------------------ the flags


@pytest.mark.parametrize(("name", "field"), ALL_FIELDS)
def test_a_field_stands_on_one_statement_with_its_help_behind_it(name, field):
    node = fields(name)[field]
    last = SOURCES[name].splitlines()[node.end_lineno - 1]
    assert re.search(r"  # \S.{7,}$", last), f"no help behind {field}"
    assert node.value is not None, f"{field} has no default"


@pytest.mark.parametrize(("name", "field"), ALL_FIELDS)
def test_a_field_is_read_somewhere(name, field):
    """As an attribute outside of its own class; a checked `TABLE` of names alone does not read it."""
    own = config_class(name)
    reads = [n for tree in TREES.values() for n in ast.walk(tree)
             if isinstance(n, ast.Attribute) and n.attr == field and isinstance(n.ctx, ast.Load)
             and not (tree is TREES[name] and own.lineno <= n.lineno <= own.end_lineno)]
    assert reads, f"--{field.replace('_', '-')} is a dead flag"


def test_no_flag_is_defined_twice():
    names = [field for _, field in ALL_FIELDS]
    assert sorted(names) == sorted(set(names))


def test_every_name_in_the_tables_of_flags_is_a_field():
    train = importlib.import_module("train")
    known = {field for _, field in ALL_FIELDS}
    assert known >= train.MACHINE
    assert set(CONFIGS.values()) | known >= train.SHAPE
    for row in train.PRESETS.values():
        assert {"weights", "flops"} <= set(row) <= known | {"weights", "flops"}
    assert not known & {"weights", "flops"}


def test_no_line_is_too_wide_and_none_is_commented_out_code():
    code = re.compile(r"\s*# *(import |from \w+ import|def |return |print\(|\w+ = \w+\()")
    for name, source in SOURCES.items():
        for number, line in enumerate(source.splitlines(), 1):
            assert len(line) <= 110, f"{name}.py:{number}"
            assert not code.match(line), f"{name}.py:{number}"
