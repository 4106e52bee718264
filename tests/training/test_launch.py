"""A run that was asked for several processes and has one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

import warm
from diptych.core.errors import UserError
from diptych.recipes.run import make_accelerator
from diptych.training.config import RunConfig
from diptych.training.launch import refuse_lonely_process


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(variable: str) -> None:
    with pytest.raises(UserError, match=rf"4 processes.*{variable}.*torchrun"):
        refuse_lonely_process({variable: "4"}, [])
    refuse_lonely_process({variable: "1"}, [])
    refuse_lonely_process({variable: "4", "WORLD_SIZE": "4"}, [])


@pytest.mark.parametrize("option", [["--num_processes", "2"], ["--num-processes=2"]])
def test_accelerate_is_refused_by_its_command_line(option: list[str]) -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    with pytest.raises(UserError, match=r"asked for 2 processes.*torchrun --nproc-per-node 2"):
        refuse_lonely_process(launched, ["python", "accelerate", "launch", *option, "-m", "diptych"])
    refuse_lonely_process(launched, ["python", "accelerate", "launch", "--num_processes", "1", "-m", "diptych"])


def test_accelerate_is_refused_by_its_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 3\n")
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    with pytest.raises(UserError, match="asked for 3 processes"):
        refuse_lonely_process(launched, ["accelerate", "launch", "--config_file", str(file), "-m", "diptych"])
    with pytest.raises(UserError, match="asked for 2 processes"):  # the option wins over the file
        refuse_lonely_process(launched, ["accelerate", "launch", "--config_file", str(file), "--num_processes=2"])


def test_a_plain_start_is_no_launch() -> None:
    refuse_lonely_process({}, ["bash", "-c", "something --num_processes 2"])


@pytest.mark.slow
@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" not in os.environ and Path("/dev/nvidia0").exists(), reason="has a GPU")
def test_the_installed_accelerate_starts_one_process_and_training_refuses_it(tmp_path: Path) -> None:
    command = ["train", "toy/iomm_finetune_mix", "--out", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "diptych", *command]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert "accelerate launch was asked for 2 processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


def note_place(folder: Path) -> None:
    """What a process finds of its place among others."""
    found = make_accelerator(RunConfig(device="cpu"))
    place = [found.process_index, found.local_process_index, found.num_processes, found.is_main_process]
    (folder / f"{found.process_index}.json").write_text(json.dumps(place))
    found.wait_for_everyone()


def test_processes_of_two_machines_find_their_places(tmp_path: Path) -> None:
    """Three, as torchrun starts them on machines of two and of one: the number of a device is the local one."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "3"}
    every |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}
    machines = [("0", "0", "2"), ("1", "1", "2"), ("2", "0", "1")]
    processes = [
        warm.start(
            note_place,
            tmp_path,
            output=tmp_path / f"said-{rank}",
            environment={**every, "RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size},
        )
        for rank, local, size in machines
    ]
    with warm.ended(*processes):
        for process in processes:
            process.join(120)
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert places == [[0, 0, 3, True], [1, 1, 3, False], [2, 0, 3, False]]
