"""How many processes a run was asked for, so that one that starts alone by mistake is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import yaml
from accelerate.commands.config.config_args import default_config_file

from diptych.core.errors import UserError

SCHEDULERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Variables in which launchers that set no WORLD_SIZE say how many processes they started."""

ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""A variable that every process of `accelerate launch` has."""


def refuse_lonely_process(environment: Mapping[str, str] = os.environ, launcher: Sequence[str] | None = None) -> None:
    """Raise a UserError where a launcher was asked for several processes and this one would train by itself.

    `accelerate launch --num_processes 2` starts a single process on a machine without a GPU and does not say so
    (accelerate 1.15), and `srun` or `mpirun` start several that do not know of each other. `torchrun` sets WORLD_SIZE,
    which is what joins processes.

    Args:
        environment: the process's variables. launcher: the command line of the process that started this one; None
            reads it from the system.
    """
    if "WORLD_SIZE" in environment:
        return
    for variable, command in SCHEDULERS.items():
        count = environment.get(variable, "1")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"{command} started {count} processes ({variable}), but without WORLD_SIZE each would train alone; "
                f"start one task a machine with it, and in each: torchrun --nproc-per-node N -m diptych train ..."
            )
    if ACCELERATE not in environment:
        return
    count = _accelerate_processes(_parent_command() if launcher is None else launcher)
    if count > 1:
        raise UserError(
            f"accelerate launch was asked for {count} processes and started one (it does so on a machine without a "
            f"GPU); use: torchrun --nproc-per-node {count} -m diptych train ..."
        )


def _accelerate_processes(command: Sequence[str]) -> int:
    """How many processes an `accelerate launch` command line asks for, by its option or its configuration file."""
    options = dict[str, str]()
    for place, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.startswith("--"):
            following = command[place + 1] if place + 1 < len(command) else ""
            options[name.removeprefix("--").replace("-", "_")] = value or following
    asked = options.get("num_processes")
    if asked is None:
        path = Path(options.get("config_file", default_config_file))
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return 1  # accelerate itself refuses a file that it cannot read
        asked = str(values.get("num_processes", 1)) if isinstance(values, dict) else "1"
    return int(asked) if asked.isdigit() else 1


def _parent_command() -> list[str]:
    """The command line of the process that started this one; empty where the system does not show it."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
