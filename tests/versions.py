"""
Run the tests with several pairs of versions of transformers and torch: `make test-versions`. Each pair has an environment of
its own, which is removed before the next one is made. Rerun the command to run only the pairs that are missing for this
commit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).parent.parent

# Versions of transformers and torch: the oldest that setup.cfg allows and the newest, and the oldest transformers with the
# newest torch.
PAIRS = ["5.19.0/2.9.1", "5.19.0/2.15.0", "5.24.0/2.15.0"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="TRANSFORMERS/TORCH", help="e.g. 5.23.0/2.13.0")
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "runs" / "versions", help="folder for results and logs"
    )
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="arguments for pytest, e.g. -k cache")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for pair in options.pairs:
        transformers, torch = pair.split("/")
        folder = options.output_dir / f"transformers-{transformers}-torch-{torch}"
        results.append(run_once(folder, transformers, torch, options.pytest))
        table = format_table(results)
        (options.output_dir / "versions.md").write_text(table, encoding="utf-8")
        print(table, flush=True)
    if options.table is not None:
        options.table.write_text(table, encoding="utf-8")
    return int(any(result["failed"] or not result["passed"] for result in results))


def run_once(folder: Path, transformers: str, torch: str, pytest: list[str]) -> dict:
    """
    The result for one pair of versions, from an earlier run of the same commit or from a new run.

    Raises:
        `ValueError`: The earlier run had other arguments for pytest.
        `RuntimeError`: pytest was interrupted.
        `subprocess.CalledProcessError`: The packages cannot be installed together. pip printed the reason.
    """
    file = folder / "result.json"
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    if file.is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["pytest"] != pytest:
            raise ValueError(f"{folder} is of `pytest {' '.join(result['pytest'])}`. Choose another --output-dir.")
        if result.get("commit") == commit and not commit.endswith("-dirty"):
            return result
    folder.mkdir(exist_ok=True)
    pinned = {"transformers": transformers, "torch": torch}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.split("==")[0] not in pinned]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*lines, *map("==".join, pinned.items())]), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ta-llava-") as environment:
        venv.create(environment, with_pip=True)
        python = str(Path(environment, "bin", "python"))
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", str(constraints)]
        subprocess.run([*install, "--editable", ".[dev]"], cwd=ROOT, check=True)
        report = folder / "report.xml"
        with (folder / "log.txt").open("w") as log:
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *pytest]
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    if status not in (0, 1):  # all passed, some failed
        raise RuntimeError(f"pytest ended with {status}, see {folder / 'log.txt'}.")
    result = {**pinned, "python": sys.version.split()[0], "commit": commit, "pytest": pytest, **read_report(report)}
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def read_report(path: Path) -> dict:
    """Number of tests that passed and that were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def format_table(results: list[dict]) -> str:
    lines = ["# Versions", "", "Results of all tests with each pair of versions (`make test-versions`):", ""]
    lines += ["| transformers | torch | Python | passed | skipped | failed |", "|---|---|---|---:|---:|---:|"]
    lines += [
        f"| {each['transformers']} | {each['torch']} | {each['python']} | {each['passed']} | {each['skipped']} | "
        f"{len(each['failed'])} |"
        for each in results
    ]
    failed = [f"- {each['transformers']}, {each['torch']}: {name}" for each in results for name in each["failed"]]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
