"""training/startup.py: what the training scripts do before their imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRAINING

from ctrl_csc_hf.training.run import one_line_errors


def run(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(TRAINING), **variables}
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, env=environment)


def test_any_letter_is_read_and_written_whatever_the_locale(tmp_path: Path) -> None:
    script = tmp_path / "é.py"
    code = "import startup, sys\nopen(sys.argv[1], 'w').write('ü')\nprint('Fréchet', sys.argv[1])"
    script.write_text(code, encoding="utf-8")
    path = tmp_path / "été"
    result = run(script, str(path), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.stdout.decode() == f"Fréchet {path}\n" and result.stderr == b""
    assert path.read_text(encoding="utf-8") == "ü"


def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    code = "import startup\nimport os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    script.write_text(code, encoding="utf-8")
    result = run(script)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_after_the_imports_ctrl_c_is_told_in_one_line(capsys: pytest.CaptureFixture) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ended.value.code == 130 and capsys.readouterr().err == "Stopped\n"


@pytest.mark.parametrize("name", ["train", "evaluate", "demo"])
def test_every_program_begins_with_it(name: str) -> None:
    docstring, rest = (TRAINING / f"{name}.py").read_text(encoding="utf-8").split('"""\n\n', 1)
    assert docstring and rest.startswith('if __name__ == "__main__":\n    import startup')
