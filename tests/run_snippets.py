"""
Runs jobs, one after the other. Each has a process of its own that begins where this one is, with `transformers` imported,
which takes seconds, and for commands the package too; but with no variable of another job. For `test_snippets.py`.

`python run_snippets.py JOBS RESULTS`: files of JSON, lists. A job has a `folder`, and `code` or the `arguments` of
`ta-llava`; a result is its exit code and what it wrote to stdout and stderr.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline


def run(job: dict) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            os.chdir(job["folder"])
            status = 0
            try:
                if "code" in job:
                    exec(compile(job["code"], "snippet", "exec"), {"__name__": "__main__"})
                else:
                    from ta_llava.cli import app

                    app(job["arguments"])
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        return status, out.read(), error.read()


if __name__ == "__main__":
    assert all((transformers, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for index, job in enumerate(jobs):
        if "code" in job:
            results[index] = run(job)
    import ta_llava.inference  # now, so that a snippet that forgets to import the package has failed

    assert ta_llava.inference
    for index, job in enumerate(jobs):
        if "code" not in job:
            results[index] = run(job)
    Path(sys.argv[2]).write_text(json.dumps([results[index] for index in range(len(jobs))]))
