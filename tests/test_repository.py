"""The shape of the repository: siblings stay diffable, common/ stays plumbing, the documentation stays true."""

import difflib
import importlib
import itertools
import re
import shlex

import pytest

from tests.helpers import ROOT, SCRIPTS

METHODS = "simsiam simclr byol moco mocov3 barlowtwins barlow npid deepcluster odc swav mae dino".split()
BANNERS = ["arguments", "augmentation", "model", "loss", "training"]


def code_lines(script):
    """Lines of a script without its docstring, blank lines and comment lines."""
    text = (ROOT / f"{script}.py").read_text()
    text = text[text.index('"""', 3) + 3 :]
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def common_share(a, b):
    """Share of the lines of the shorter script that stand in the other one too, in the same order."""
    a, b = code_lines(a), code_lines(b)
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / min(len(a), len(b))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "simsiam"])
def test_siblings_share_most_of_their_lines(script):
    """simsiam.py is what the others were copied from: a diff with it shows the idea and little else."""
    assert common_share("simsiam", script) >= 0.6


@pytest.mark.parametrize("a, b", list(itertools.combinations(["simsiam", "simclr", "byol", "moco", "barlowtwins"], 2)))
def test_siamese_methods_stay_close(a, b):
    assert common_share(a, b) >= 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_one_readable_page(script):
    text = (ROOT / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 390
    assert re.findall(r"^# -{40,} (\w+)$", text, re.M) == BANNERS
    imported = re.findall(r"^(?:from|import) (\w+)", text, re.M)
    assert not set(imported) & set(SCRIPTS), "scripts do not import each other"
    module = importlib.import_module(script)
    assert callable(module.main) and callable(module.parse_args)
    assert f"torchrun --nproc_per_node=8 {script}.py --data /imagenet" in module.__doc__
    for heading in ("Published", "Deviations", "To hack"):
        assert heading in module.__doc__, heading


@pytest.mark.parametrize("module", sorted(p.name for p in (ROOT / "common").glob("*.py")))
def test_common_names_no_method(module):
    words = set(re.findall(r"[a-z0-9]+", (ROOT / "common" / module).read_text().lower()))
    if module == "resnet.py":
        words -= {"simclr"}  # the source of the width multiplier
    if module == "layouts.py":
        words -= set(METHODS)  # published layouts are named after their methods
    assert not words & set(METHODS)


def commands(text):
    """Command lines of our scripts in a document, with continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python|torchrun(?: --\S+)*) ((\w+)\.py .*)$", line)
        if match and (ROOT / f"{match[2]}.py").exists():
            yield match[1]


def documents():
    yield from (ROOT / name for name in ["README.md", *(p.name for p in ROOT.glob("*.py"))])


@pytest.mark.parametrize("path", list(documents()), ids=lambda p: p.name)
def test_documented_commands_parse(path):
    for command in commands(path.read_text()):
        script, *words = shlex.split(command.split("  #")[0].split("#")[0])
        importlib.import_module(script.removesuffix(".py")).parse_args(words)


def test_readme_names_what_is_there():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for script in SCRIPTS:
        assert f"{script}.py" in text
    assert list(commands(text)), "the README shows how to run things"


def test_nothing_of_this_machine_is_tracked():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("*/*.py"), *ROOT.glob("results/*/*")]:
        if path.suffix in {".py", ".md", ".toml", ".jsonl", ".json"}:
            assert not re.search(r"/(root|home|tmp)/[a-z]", path.read_text()), path


@pytest.mark.parametrize("module", ["run", "cifar10"])
def test_recipes_of_the_results_are_accepted(module):
    """Flags that no script knows would show only after hours."""
    recipes = importlib.import_module(f"results.{module}")
    assert recipes.RECIPES.keys() == set(SCRIPTS)
    for script, flags in recipes.RECIPES.items():
        words = ["--data", "cifar10", *recipes.SHARED.split(), *flags.split()]
        args = importlib.import_module(script).parse_args(words)
        assert args.image_size == 32


def test_readme_counts_the_lines():
    rows = re.findall(r"^\| \[(\w+)\.py\]\(\w+\.py\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {script: int(lines) for script, lines in rows} == {
        script: len((ROOT / f"{script}.py").read_text().splitlines()) for script in SCRIPTS
    }
