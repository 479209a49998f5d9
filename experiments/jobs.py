"""Pieces of work of a long run, each on one core in a process of its own. A finished piece is a file, so runs resume."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


@dataclass
class Job:
    """
    One piece of work.

    Args:
        name (`str`): Name of its log file.
        function (`Callable`): A function of a module, since another process imports it.
        arguments (`tuple`): The arguments after the folder and the config.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple


def run_jobs(folder: Path, config: dict[str, Any], lists: Sequence[Sequence[Job]], workers: int) -> list[str]:
    """
    Runs the jobs, those of a list after all of the lists before it, and returns the names of those that failed. The lists
    after a failure are left out.
    """
    failed: list[str] = []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=sum(map(len, lists)), unit="job") as bar,
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
    ):
        for jobs in lists:
            futures = {pool.submit(run_job, job, folder, config): job for job in jobs}
            for future in as_completed(futures):
                if not future.result():
                    failed.append(futures[future].name)
                    tqdm.write(f"{failed[-1]} failed, see {folder / 'logs' / failed[-1]}.log", file=sys.stderr)
                bar.update()
            if failed:
                break
    return failed


def run_job(job: Job, folder: Path, config: dict[str, Any]) -> bool:
    """Runs a job, and returns whether it succeeded. Its output goes to its log file."""
    with (folder / "logs" / f"{job.name}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            job.function(folder, config, *job.arguments)
        except Exception:  # the other jobs go on
            traceback.print_exc()
            return False
    return True
