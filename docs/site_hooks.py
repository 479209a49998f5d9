"""
Hooks of mkdocs for `make docs`. The site has the files of the repository at their own paths, so that a relative link works
in both.
"""

import re
from pathlib import Path

from griffe import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parent.parent

# Pages, and what they show or link to.
PUBLISHED = (
    "*.md",
    "CITATION.cff",
    "LICENSE",
    "benchmarks/**/*.*",
    "docs/*.md",
    "docs/*.css",
    "examples/*.*",
    "experiments/*.*",
    "hub_card/space/*.md",
    "lmms_eval_tasks/**/*.*",
    "recipes/**/*.*",
    "src/*.py",
    "tests/test_modeling_ta_llava.py",
    "setup.cfg",
    "constraints.txt",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, and those of the repository instead of those of `docs_dir`."""
    kept = [file for file in files if file.generated_by is not None or not is_in(file, config.docs_dir)]
    paths = sorted({path for pattern in PUBLISHED for path in ROOT.glob(pattern) if "__pycache__" not in path.parts})
    for path in paths:
        kept.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return Files(kept)


def is_in(file: File, folder: str) -> bool:
    return file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(folder)


class TransformersDocstrings(Extension):
    """Docstrings in the style of Transformers: [`Name`] is a name, and types of arguments are in Markdown."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\[(`[^`\]]+`)\](?![(\[])", r"\1", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *\w[\w, ]* \()(.*)(\):)", without_markup, text, flags=re.MULTILINE)


def without_markup(argument: re.Match) -> str:
    return argument[1] + argument[2].replace("`", "").replace("*", "") + argument[3]
