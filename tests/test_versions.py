"""`make test-versions` runs the versions that `setup.cfg` and the docs declare."""

import re
from configparser import ConfigParser

from conftest import ROOT
from versions import PAIRS, format_table, read_report


def test_the_oldest_versions_are_the_declared_ones():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = dict(line.split(">=") for line in setup["options"]["install_requires"].split() if ">=" in line)
    oldest = dict(zip(("transformers", "torch"), PAIRS[0].split("/")))
    assert declared == {name: version.rpartition(".")[0] for name, version in oldest.items()}
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "hub_card/model_card.md.jinja")]
    said = [match for text in texts for match in re.findall(r"transformers`? \(?(?:from )?(5\.\d+)", text)]
    assert said and set(said) == {declared["transformers"]}
    assert re.findall(r"torch \(from ([\d.]+)\)", texts[0]) == [declared["torch"]]


def test_failed_tests_are_named_in_the_table(tmp_path):
    case = '<testcase classname="tests.test_a" name="{}">{}</testcase>'
    cases = "".join(
        case.format(name, f"<{outcome}/>" if outcome else "")
        for name, outcome in (("one", ""), ("two", "failure"), ("three", "error"), ("four", "skipped"))
    )
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    report = read_report(tmp_path / "report.xml")
    assert report == {"passed": 1, "skipped": 1, "failed": ["tests.test_a::two", "tests.test_a::three"]}
    table = format_table([{"transformers": "5.19.0", "torch": "2.9.1", "python": "3.11.7", **report}])
    assert "| 5.19.0 | 2.9.1 | 3.11.7 | 1 | 1 | 2 |" in table and "- 5.19.0, 2.9.1: tests.test_a::three" in table
