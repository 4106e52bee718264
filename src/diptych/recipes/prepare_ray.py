"""Preparation on a Ray cluster: Ray Data starts workers and gives them shards, which they claim as others do."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.recipes.prepare import WAIT_SECONDS, Options, Result, Work


class Worker:
    """A worker process: it loads the models once, and then makes shards."""

    def __init__(self, options: Options) -> None:
        self.work = Work(options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns `job` and `shard` (numbers) to `result`, one for each, as plain values."""
        results: list[dict[str, Any]] = []
        for at, number in zip(batch["job"].tolist(), batch["shard"].tolist(), strict=True):
            job = self.work.jobs[at]
            result = Result(job.label, job.place, job.made.folder)
            while not self.work.do(job, number, result):
                time.sleep(WAIT_SECONDS)
            results.append({**asdict(result), "folder": str(result.folder), "at": at})
        return {"result": results}


def prepare_on_ray(options: Options, workers: int) -> tuple[list[Result], list[str]]:
    """`prepare.prepare` by `workers` of a Ray cluster (RAY_ADDRESS; without it, one is started here). Each has a GPU
    where the cluster has any and `device` is not "cpu".

    Raises:
        UserError: the extra `ray` is not installed, or fewer than one worker is asked for.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs the extra `ray`: pip install 'diptych[ray]'") from error
    if workers < 1:
        raise UserError(f"--ray must be at least 1, not {workers}")
    plan = Work(replace(options, device="cpu"))  # writes the manifests, and says what there is to do
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of its own default
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if address else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
    try:
        gpus = 1 if options.device != "cpu" and ray.cluster_resources().get("GPU") else 0
        units = ray.data.from_items([{"job": at, "shard": number} for at, number in plan.units()])
        done = units.map_batches(
            Worker,
            fn_constructor_args=(options,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
        ).take_all()
    finally:
        if started:
            ray.shutdown()
    results = [Result(job.label, job.place, job.made.folder) for job in plan.jobs]
    for row in done:
        said = row["result"]
        result = results[said["at"]]
        assert result.folder == Path(said["folder"])
        result.written, result.there = result.written + said["written"], result.there + said["there"]
        result.items += said["items"]
        result.bad |= said["bad"]
    return results, plan.skipped
