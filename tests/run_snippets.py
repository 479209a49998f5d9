"""
Run the jobs of `test_snippets.py`, one after the other: `python run_snippets.py JOBS RESULTS`.

Both files hold a JSON list. A job has a `folder`, and either `code` or the `arguments` of `ta-llava`. Its result is the exit
code, stdout and stderr. Each job is a fork of this process, so it shares no variable with another job, and `transformers`,
which takes seconds to import, is imported once. So is the package, for commands.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline


torch.compiler.set_stance("force_eager")  # kernels would take minutes


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
    import ta_llava.inference  # after the code, so that a snippet fails if it forgets to import the package

    assert ta_llava.inference
    for index, job in enumerate(jobs):
        if "code" not in job:
            results[index] = run(job)
    Path(sys.argv[2]).write_text(json.dumps([results[index] for index in range(len(jobs))]))
