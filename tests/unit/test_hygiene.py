"""What no single module is responsible for."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

from erniem_batch import stopping

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "erniem_batch").rglob("*.py"))
SCRIPTS = sorted((ROOT / "pipelines").glob("*.py"))
OURS = [*MODULES, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))]

# Folders of one machine; and the sibling folder that only tests may use, and only if it is there.
MACHINE_PATH = re.compile(r"""["'\s(=](/(?:home|root|tmp|work|Users|mnt)/[\w./-]+)""")


def _id(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", OURS, ids=_id)
def test_no_paths_of_one_machine(path):
    assert MACHINE_PATH.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", OURS, ids=_id)
def test_lines_end_as_they_should(path):
    content = path.read_bytes()
    assert b"\r" not in content
    assert b"\t" not in content
    assert not content or (content.endswith(b"\n") and not content.endswith(b"\n\n"))


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_public_names_exist(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [n for n in public if not hasattr(module, n)] == []
    assert list(public) == sorted(set(public))


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_every_module_says_what_it_is(path):
    if path.name != "__init__.py":
        assert path.read_text(encoding="utf-8").startswith('"""'), "a module docstring"


@pytest.mark.parametrize("path", SCRIPTS, ids=_id)
def test_scripts_have_help(path, monkeypatch, capsys):
    """In this process, which saves seconds each."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(stopping, "install", lambda: None)  # the signals of pytest stay its own
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert not ended.value.code, told
    assert "--output" in told or "--model" in told
