"""The shape of the repository: siblings have one loop, common/ stays plumbing, the documentation stays true."""

import importlib
import re
import shlex

import pytest

from tests.helpers import ROOT, SCRIPTS

METHODS = {*SCRIPTS, *"barlow dino mae ibot vicreg lejepa directclr pixpro obow interclr selav simmim maskfeat".split()}
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
    assert len(text.splitlines()) <= 390
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


def commands(text):
    """Command lines of our scripts in a document, with continuation lines joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python|torchrun(?: --\S+)*) ((\w+)\.py .*)$", line)
        if match and (ROOT / f"{match[2]}.py").exists():
            yield match[1]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("*.py"))], ids=lambda p: p.name)
def test_documented_commands_parse(path):
    for command in commands(path.read_text()):
        script, *words = shlex.split(command.split("#")[0])
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
    assert recipes.RECIPES.keys() <= set(SCRIPTS)
    for script, flags in recipes.RECIPES.items():
        words = ["--data", "cifar10", *recipes.SHARED.split(), *flags.split()]
        assert importlib.import_module(script).parse_args(words).image_size == (28 if script == "relative_loc" else 32)
