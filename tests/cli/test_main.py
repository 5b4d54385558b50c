"""Help and the list answer without loading anything heavy."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("word", ["--help", "list"])
def test_help_and_list_load_nothing_heavy(word):
    code = (
        "import sys; from optjax.cli.main import main; main([sys.argv[1]]); "
        "print(sorted({'jax', 'matplotlib', 'tyro', 'xarray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "optjax", "rnu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "optjax: unknown command 'rnu'; did you mean 'run'?\n"
