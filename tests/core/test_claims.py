from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.core.claims import Claims
from diptych.core.errors import UserError

OTHER = """
import sys, time
from pathlib import Path
from diptych.core.claims import Claims

with Claims(Path(sys.argv[1])).take(7) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_piece_is_one_process_s_until_it_ends_however_that_is(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "claims"
    claims = Claims(path)
    with subprocess.Popen([sys.executable, "-c", OTHER, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with claims.take(7) as mine, claims.take(8) as next_one:
            assert (mine, next_one) == (False, True)
        other.send_signal(signal.SIGKILL)
    with claims.take(7) as mine:
        assert mine
    claims.close()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    claims = Claims(tmp_path / "claims")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="has no locks"), claims.take(1):
        pass
    claims.close()
