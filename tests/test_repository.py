"""The shape of the repository: siblings have one loop, common/ stays plumbing, the documentation stays true."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from results import run as results_run
from tests import helpers
from tests.helpers import ROOT, SCRIPTS, environment

METHODS = {*SCRIPTS, *"barlow dino mae ibot vicreg lejepa directclr pixpro obow interclr selav simmim maskfeat".split()}
METHODS -= {"scan"}  # as folders are, too
BANNERS = ["arguments", "augmentation", "model", "loss", "training"]
LOOP = r"\bRun\(args|run\.(?:open|place|start|epochs|steps|backward|update|log)\(|\bin (?:\w+\()?batches\b"
ORDER = "Run(args run.open( run.place( run.start( run.epochs( run.steps( batches run.backward( run.update( run.log("


def text_of(script):
    return (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_same_loop(script):
    """Whoever has read one finds each step of it in the others, once and in the same order."""
    found = re.findall(LOOP, text_of(script))
    assert ["batches" if step.startswith("in ") else step for step in found] == ORDER.split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_one_readable_page(script):
    text = text_of(script)
    limits = {"dino": 400, "esvit": 400, "cae": 480}  # two networks, eleven crops; four targets, a foreign tokenizer
    limits["simdino"], limits["ibot"] = 400, 430  # iBOT: masks, and a second loss
    limits["scan"] = 450  # two stages, each with its recipe, data and loss
    limits["ijepa"] = 400  # masks that groups share, checked and shown; what its targets are like
    assert len(text.splitlines()) <= limits.get(script, 320)
    assert re.findall(r"^# -{40,} (\w+)$", text, re.M) == BANNERS
    module = importlib.import_module(script)
    assert callable(module.main) and callable(module.parse_args)
    assert f"torchrun --nproc_per_node=8 {script}.py --data /imagenet" in module.__doc__
    for heading in ("Published", "Deviations", "To hack"):
        assert heading in module.__doc__, heading


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]), ids=lambda p: p.name)
def test_nothing_imports_a_script(path):
    if path.name == "demo.py":
        pytest.skip("it shows one")
    imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)
    assert not set(imported) & {p.stem for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("common/*.py")), ids=lambda p: p.name)
def test_common_is_short_and_names_no_method(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (200 if path.name == "run.py" else 420)
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    if path.name == "resnet.py":
        words -= {"simclr"}  # the source of the width multiplier
    if path.name != "layouts.py":  # published layouts are named after their methods
        assert not words & METHODS


def code(text):
    """Lines of a document with continuation lines joined, and what stands between backticks."""
    text = re.sub(r"\\\n\s*", " ", text)
    return [*text.splitlines(), *(" ".join(part.split()) for part in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))]


def commands(text):
    """Command lines of our scripts in a document."""
    for line in code(text):
        match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python|torchrun(?: --\S+)*) ((\w+)\.py .*)$", line)
        if match and (ROOT / f"{match[2]}.py").exists():
            yield match[1]


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")])
NAMED = [*DOCUMENTS, *sorted([*ROOT.glob("*.py"), *ROOT.glob("results/*.py")])]


@pytest.mark.parametrize("path", NAMED, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_parse(path):
    for command in commands(path.read_text()):
        script, *words = shlex.split(command.split("#")[0])
        importlib.import_module(script.removesuffix(".py")).parse_args(words)
    known = {*results_run.RECIPES, *results_run.EVALUATIONS}
    for line in code(path.read_text()):
        if match := re.match(r"\s*python results/run\.py ([^#]*)", line):
            names = re.sub(r"--(data|precision) \S+|--\w+", "", match[1]).split()
            assert set(names) <= known, line


def test_documents_name_what_is_there():
    for path in DOCUMENTS:
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", path.read_text()):
            there = path.parent / target if target else path
            assert there.exists(), f"{path}: {target}"
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M) if heading else ()
            known = [re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in known, f"{path}: {target}#{heading}"
    text = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        assert f"{script}.py" in text
    assert list(commands(text)), "the README shows how to run things"


def test_nothing_of_this_machine_is_tracked():
    folders = "common", "tests", "benchmarks", "results"
    for path in [*ROOT.glob("*.*"), *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*"))]:
        if path.suffix in {".py", ".md", ".txt", ".toml", ".jsonl", ".json"}:
            assert not re.search(r"/(root|home|tmp)/[a-z]", path.read_text()), path


@pytest.mark.parametrize("module", ["run", "cifar10"])
def test_recipes_of_the_results_are_accepted(module):
    """Flags that no script knows would show only after hours."""
    recipes = importlib.import_module(f"results.{module}")
    for name, flags in recipes.RECIPES.items():
        script = name.partition("-")[0]
        assert script in SCRIPTS
        words = ["--data", "cifar10", *recipes.SHARED.split(), *flags.split()]
        assert importlib.import_module(script).parse_args(words).image_size == (28 if script == "relative_loc" else 32)


# ----------------------------------------------------------------------------------------------- copies, installing
@pytest.mark.parametrize("script", ["mocov3", "odc", "interclr", "relative_loc", "mae", "swav"])
def test_a_copy_runs_with_the_tiny_flags_of_its_original(script, tmp_path, monkeypatch):
    """Under another name, with another class, without one of the flags; --flags come last."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common/args.py", tmp_path / "common")
    text = text_of(script).replace('"--hidden-dim"', '"--breadth"')
    for name in re.findall(r"^class (\w+)\(nn.Module\)", text, re.M):
        text = text.replace(name, "Mine")
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setattr(helpers, "SCRIPTS", dict(SCRIPTS))
    helpers.only("mine", "--queue 8")
    left = " ".join(SCRIPTS[script]).replace("--hidden-dim 32", "").split()
    assert {"mine": [*left, "--queue", "8"]} == helpers.SCRIPTS


def test_tests_of_one_script_only(tmp_path):
    """What `make test-mine` runs: tests of each kind, no others; a name that is not there is one line."""

    def collect(name):
        words = ["-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", "--script", name]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
        return done.stdout + done.stderr

    found = [line for line in collect("npid").splitlines() if "::" in line]
    assert all("npid" in line for line in found) and len(found) > 25
    for name in ("two_processes_equal_one", "bit_for_bit", "device", "limits", "[no data flag-npid]", "poor_data"):
        assert any(name in line for line in found), name
    assert not any("test_repository" in line for line in found)
    assert "--script mine_: there is no mine_.py here" in collect("mine_")


def test_installing_the_project_installs_no_module():
    """`pip install .` brings the dependencies; a package called common would meet those of other projects."""
    discovery = pytest.importorskip("setuptools.config.pyprojecttoml")
    settings = discovery.read_configuration(ROOT / "pyproject.toml", expand=True)
    assert settings["tool"]["setuptools"].items() >= {"packages": [], "py-modules": []}.items()
    assert "torch>=2.11" in settings["project"]["dependencies"]
