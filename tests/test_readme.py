"""The README's Python runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_examples_run_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    assert len(blocks[0].strip().splitlines()) <= 22
    (tmp_path / "example.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "RUNNING" in done.stdout
    assert "batch_size" in done.stdout
    assert "hypergrad: reverse" in done.stderr
    assert (tmp_path / "tuned.png").is_file()
    assert (tmp_path / "results" / "my-sweep" / "result.nc").is_file()
