"""What must hold where vLLM is not installed."""

import ast
import logging
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import entry_points

from conftest import ROOT

from ta_llava.serving import register


def test_vllm_finds_the_plugin():
    [plugin] = entry_points(group="vllm.general_plugins", name="ta_llava")
    assert plugin.load() is register


def test_a_vllm_that_is_too_old_starts_without_the_plugin(monkeypatch, caplog):
    with suppress(ImportError):
        import vllm.logger  # noqa: F401 - takes all handlers off its loggers when it is first imported
    monkeypatch.setitem(sys.modules, "vllm.renderers.registry", None)
    logger = logging.getLogger("vllm.ta_llava.serving")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.WARNING, logger=logger.name):
        register()
    assert "vLLM 0.30 or newer" in caplog.text


def test_importing_the_package_does_not_import_vllm():
    script = 'import sys, ta_llava, ta_llava.serving; print("vllm" in sys.modules)'
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False"]


def test_no_other_file_of_the_package_imports_vllm():
    for path in (ROOT / "src").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert path.parent.name == "serving" or not any("vllm" in module for module in modules), path
