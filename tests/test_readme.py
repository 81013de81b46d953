"""README.md says what is true: its commands parse, its flags exist, its recipes work, its links are there."""
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import model
import sample
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
FIRST_SCREEN = 40                                            # lines
PROGRAMS = ("python", "python3", "torchrun", "pip", "pytest", "ruff")


def code_lines(text: str) -> list[str]:
    """The lines of fenced and indented blocks, prompts removed, continued lines joined."""
    lines, fenced, before = [], False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before.strip() or before.startswith("    "))):
            lines.append(line.strip().removeprefix("$ "))
        before = line
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def words_of(line: str) -> list[list[str]]:
    """The simple commands of a shell line, as lists of words without assignments of the environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, commands = True, [[]]
    for word in lexer:
        if set(word) <= set("&|;()<>"):
            commands.append([])
        elif commands[-1] or not re.match(r"[A-Z_]+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def commands(text: str) -> list[list[str]]:
    found = []
    for line in code_lines(text):
        if re.match(rf"([A-Z_]+=\S* )*({'|'.join(PROGRAMS)})\b", line):
            found += words_of(line)
    return found


COMMANDS = commands(README)


def run_of(program: str) -> list[list[str]]:
    """The commands that start `program`, by python or by torchrun."""
    return [words for words in COMMANDS if words[0] in ("python", "python3", "torchrun") and program in words]


def parse_train(words: list[str], monkeypatch) -> train.Configs:
    """What `python train.py ...` or `torchrun ... train.py ...` would train with."""
    if words[0] == "torchrun":
        ranks = get_args_parser().parse_args(words[1:])
        assert ranks.training_script == "train.py"
        world = [int(n) for n in (ranks.nproc_per_node, ranks.nnodes) if n.isdigit()]
        monkeypatch.setenv("WORLD_SIZE", str(world[0] * world[-1]) if len(world) == 2 else "1")
    if "cuda" in words:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return train.parse(words[words.index("train.py") + 1:])


def flags_of(parse, capsys) -> set[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))


def test_there_is_a_readme_with_both_programs():
    assert len(README.splitlines()) > FIRST_SCREEN
    assert run_of("train.py")
    assert run_of("sample.py")


@pytest.mark.parametrize("words", run_of("train.py"), ids=" ".join)
def test_a_training_command_parses(words, monkeypatch):
    vae = model.AutoencoderTiny(model.TAEF2)                  # the folder is the reader's
    monkeypatch.setattr(model, "open_vae", lambda folder: (vae, {}))
    monkeypatch.setattr(model, "open_pipeline", lambda folder: {"vae": str(folder)})
    cfg, *_ = parse_train(words, monkeypatch)
    assert cfg.size >= 8


@pytest.mark.parametrize("words", run_of("sample.py"), ids=" ".join)
def test_a_sampling_command_parses(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in words[words.index("sample.py"):]:
        if path.endswith(".txt"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text("a house")
        if path.endswith("/"):
            (tmp_path / path).mkdir()
    held = [{"caption": "a house"}]
    monkeypatch.setattr(sample, "picture_set", lambda name: held)
    if "runs/64" in words:
        (tmp_path / "runs/64").mkdir(parents=True)
        (tmp_path / "runs/64/config.json").write_text("{}")
    args = sample.arguments(words[words.index("sample.py") + 1:])
    assert args.prompt or args.prompts or args.export or args.score or args.interactive


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_files_of_a_command_exist(words):
    if words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    for flag, value in itertools.pairwise(words):
        if flag == "-r":
            assert (ROOT / value).is_file()
    if words[0] == "pytest":
        assert all((ROOT / w.split("::")[0]).exists() for w in words[1:] if w.startswith("tests"))


def test_every_flag_in_backticks_exists(capsys):
    known = flags_of(train.parse, capsys) | flags_of(sample.arguments, capsys)
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    for tool in (ROOT / "tests").glob("*.py"):               # the measurements of the README
        known |= set(re.findall(r"[\"'](--[a-z][a-z0-9-]*)[\"']", tool.read_text(encoding="utf-8")))
    prose = re.sub(r"^\s*```.*?^\s*```", "", README, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", prose)
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span)}
    assert flags - known == set()


RECIPES = re.findall(r"^```diff\n (\w+\.py)\n(.*?)^```", README, re.M | re.S)


def patched(source: str, recipe: str) -> str:
    """A source with the lines of a recipe: ` ` is found there once, `-` goes, `+` comes."""
    before = "".join(line[1:] for line in recipe.splitlines(keepends=True) if line[:1] != "+")
    after = "".join(line[1:] for line in recipe.splitlines(keepends=True) if line[:1] != "-")
    assert source.count(before) == 1, before
    return source.replace(before, after)


def test_the_recipes_are_short_and_each_works_as_it_stands(tmp_path):
    """A sampler, a loss weight, a metric and a source, all at once in a copy of the program."""
    for name in {path.name for path in ROOT.glob("*.py")}:
        shutil.copy(ROOT / name, tmp_path)
    for name, recipe in RECIPES:
        path = tmp_path / name
        path.write_text(patched(path.read_text(encoding="utf-8"), recipe), encoding="utf-8")
        touched = [line for line in recipe.splitlines() if line[:1] in ("+", "-") and line[1:].strip()]
        assert len(touched) <= 15
    assert {name for name, _ in RECIPES} == {"diffusion.py", "train.py", "data.py"}

    def run(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr

    small = "--size 16 --channels 32 --head-dim 32 --attn-resolutions 4 --steps 2 --batch-size 4"
    run("train.py", *small.split(), "--val-every", "0", "--sample-every", "0", "--log-every", "1", "--prediction", "v",  # noqa: E501
        "--loss-weight", "root_snr", "--data", "stripes", "--device", "cpu")
    run("sample.py", "stripes 3 pixels apart", "--sampler", "midpoint", "--sample-steps", "2")
    lines = [json.loads(line) for line in (tmp_path / "runs/16/metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["mean_t"] < 1
    assert (tmp_path / "stripes-3-pixels-apart.png").is_file()


def test_the_first_screen_has_one_line_to_run_and_one_to_test():
    screen = code_lines("\n".join(README.splitlines()[:FIRST_SCREEN]))
    installs = [line for line in screen if "pip install" in line]
    assert len(installs) == 2
    run, test = sorted(installs, key=lambda line: "pytest" in line)
    assert re.search(r"-r requirements\.txt && (torchrun|python3?) .*train\.py", run)
    assert re.search(r"-r requirements-dev\.txt && (python3? -m )?pytest\b", test)


def test_ci_runs_the_test_command_of_the_readme():
    test, = {line for line in code_lines(README) if "requirements-dev.txt" in line and "pytest" in line}
    assert test in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", README)
    local = [link for pair in links for link in pair if link and not re.match(r"https?:|#|mailto:", link)]
    assert [link for link in local if not (ROOT / link.split("#")[0]).exists()] == []


def test_every_file_of_the_program_is_named():
    assert [p.name for p in ROOT.glob("*.py") if p.name not in README] == []


def test_no_path_of_a_machine_is_in_it():
    assert re.findall(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\S*", README) == []
