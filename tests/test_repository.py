"""Files of the repository agree with each other: README, links and messages in the docs, workflows, setup, pre-commit."""

import ast
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "hub_card" / "space" / "README.md",
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_has_a_target(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.is_file(), f"{link} has no target"
        if anchor and target.name != "api.md":  # its headings come from docstrings
            assert anchor in headings(target), f"{link} has no such heading"


def test_make_targets_that_the_docs_name_are_there():
    for page in PAGES:
        named = set(
            re.findall(r"(?:^|`)make ([a-z][a-z-]+)(?=`|$| +#)", page.read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert named <= TARGETS, f"{page.name} names {sorted(named - TARGETS)}"


# Messages that the troubleshooting guide quotes, but that others print.
OF_OTHERS = (
    "ta-llava: command not found",
    "contains custom code which must be executed",
    "does not recognize this architecture",
    "pipeline(..., batch_size=n)",
    "Sample ID (record NUMBER of FILE): ...",
)


def texts_in(path: Path) -> list[str]:
    """The strings in a Python file. In an f-string, `...` stands for each value."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_messages_that_troubleshooting_quotes_are_those_of_the_package():
    """You search the guide for the words of a message, so they must be the same."""
    texts = "\n".join(text for path in sorted((ROOT / "src").rglob("*.py")) for text in texts_in(path))
    guide = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [line.split(" | ")[0] for line in guide.splitlines() if line.startswith("| ")]
    quoted = [a or b for symptom in symptoms for a, b in re.findall(r"`` (.+?) ?``|`([^`]+)`", symptom)]
    messages = [message for message in quoted if " " in message and message not in OF_OTHERS]
    parts = [part.strip(" ,.") for message in messages for part in message.split("...")]
    assert len(messages) > 30
    assert not [part for part in parts if len(part) > 6 and part not in texts]


def test_workflows_run_the_targets_of_continuous_integration():
    workflows = ROOT / ".github" / "workflows"
    ci = yaml.safe_load((workflows / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    ran = set(ci["make"]["strategy"]["matrix"]["target"])
    ran |= set(re.findall(r"run: make ([a-z-]+)", "".join(path.read_text() for path in workflows.glob("*.yml"))))
    assert ran <= TARGETS
    assert set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) <= ran


def test_setup_names_all_packages():
    """An editable install has all folders, but a wheel has only those in `setup.cfg`."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {
        name for name in setup["options"]["packages"].split() if not name.endswith((".checkpoints", ".hub_card"))
    }
    folders = [path.parent.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("__init__.py")]
    assert packages == {".".join(("ta_llava", *folder.parts)) for folder in folders}


def test_pre_commit_has_the_ruff_of_make():
    [pinned] = re.findall(r"^ruff==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[pinned]] * 2


# --- the code of the package ---------------------------------------------------------------------------------------

# Folders of the package from low to high: a file imports from its own layer and from lower ones.
LAYERS = [
    {""},
    {"common"},
    {"data"},
    {"building", "inference"},
    {"training", "evaluation", "analysis", "serving"},
    {"publishing"},
    {"cli"},
]


def part_of(file: Path) -> str:
    """What decides a file's layer: its folder, or its own name for the two files that do not travel with a checkpoint."""
    inner = file.relative_to(ROOT / "src")
    return inner.parts[0] if len(inner.parts) > 1 else "inference" if inner.stem == "inference" else ""


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def test_no_import_of_the_package_runs_back_up():
    files = [path for path in (ROOT / "src").rglob("*.py") if path.name not in ("__init__.py", "auto_classes.py")]
    assert len(files) > 70
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            folder = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                target = folder.joinpath(*name.split("."))
                target = target.with_suffix(".py") if target.with_suffix(".py").is_file() else target
                if target == ROOT / "src" / "__version__":  # of the package itself
                    continue
                assert layer_of(part_of(path)) >= layer_of(part_of(target)), f"{path} imports {target}"


def words_of(tree: ast.Module) -> set[str]:
    """All identifiers in some code, and its texts of one word."""
    words = set()
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg"):
            words.add(getattr(node, field, None))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            words.add(node.value)
    return words


def test_heads_of_the_hub_files_name_what_is_there():
    """So the lists of equations and steps keep up with the functions."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").glob("*.py")}
    words = set().union(*map(words_of, trees.values()))
    found = set()
    for path, tree in trees.items():
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", ast.get_docstring(tree) or ""):
            is_file = (ROOT / "src" / name).is_file()
            assert is_file or set(name.split(".")) <= words, f"The head of {path.name} names {name}"
            found.add(name)
    assert {"focus_scores", "merge_clusters", "TaLlavaModel._locate_prefix"} <= found
