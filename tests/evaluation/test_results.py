"""Of which revision a result is."""

from __future__ import annotations

import subprocess
from pathlib import Path

from diptych.evaluation.results import commit


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout_and_of_its_worktrees(tmp_path: Path) -> None:
    main, branch, detached = tmp_path / "main", tmp_path / "branch", tmp_path / "detached"
    main.mkdir()
    assert commit(main) is None
    git(main, "init", "-q")
    git(main, "commit", "-q", "--allow-empty", "-m", "first")
    git(main, "worktree", "add", "-q", "-b", "side", str(branch))
    git(main, "worktree", "add", "-q", "--detach", str(detached))
    git(branch, "commit", "-q", "--allow-empty", "-m", "second")
    folders = (main, branch, detached)
    assert len({git(folder, "rev-parse", "HEAD") for folder in folders}) == 2
    assert [commit(folder) for folder in folders] == [git(folder, "rev-parse", "HEAD") for folder in folders]
    git(main, "pack-refs", "--all")  # branches in one file
    assert [commit(folder) for folder in folders] == [git(folder, "rev-parse", "HEAD") for folder in folders]
