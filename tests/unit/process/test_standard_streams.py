"""Standard streams that are closed, unread or cannot be written."""

import os
import subprocess
import sys

import pytest

_PROGRAM = (
    "import sys\n"
    "from trainer.process.standard_streams import secure_standard_streams\n"
    "secure_standard_streams()\n"
)


def test_output_to_a_closed_pipe_is_discarded() -> None:
    program = (
        _PROGRAM
        + "for number in range(20_000): print('line', number)\nprint('done', file=sys.stderr)"
    )
    command = f"{sys.executable} -c '{program.replace(chr(39), chr(34))}' | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "done\n")


def test_descriptor_of_a_closed_stream_is_not_reused_by_a_file(tmp_path: object) -> None:
    program = (
        _PROGRAM
        + "file = open(sys.argv[1], 'w'); print('stdout'); print('stderr', file=sys.stderr); "
        "file.write('file')"
    )
    command = f'exec \'{sys.executable}\' -c "$1" "$2" <&- >&- 2>&-'
    done = subprocess.run(
        ["bash", "-c", command, "bash", program, f"{tmp_path}/file"], timeout=60, check=False
    )
    assert done.returncode == 0
    with open(f"{tmp_path}/file") as file:
        assert file.read() == "file"


def test_full_disk_under_stdout_does_not_end_the_process() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM + "print('x', flush=True)"],
            stdout=full,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0


def test_unencodable_output_does_not_end_the_process() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", _PROGRAM + "print('caf\\u00e9')"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n")
