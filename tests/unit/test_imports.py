"""Who may import whom: the parts that must stay light, and those that must not know of Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "erniem_batch"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Ray is for these alone; everything else works without it.
WITH_RAY = ("job/", "serve", "train")
# Plain arithmetic and bookkeeping: nothing here computes with tensors.
WITHOUT_TORCH = (
    "batching.py",
    "config.py",
    "errors.py",
    "isolation.py",
    "labels.py",
    "records.py",
    "storage.py",
    "tasks/base.py",
    "tasks/ner.py",
    "text/pieces.py",
    "text/segments.py",
    "text/windows.py",
    *(module for module in MODULES if module.startswith("job/")),
)


def imported(module, top_level_only=False):
    """Full names of what a module imports, relative to nothing."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            names.add(str(node.module))
    return names


def _packages(module, **options):
    return {name.split(".")[0] for name in imported(module, **options)}


@pytest.mark.parametrize("module", MODULES)
def test_ray_is_for_the_job_alone(module):
    if not module.startswith(WITH_RAY):
        assert "ray" not in _packages(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("job/")])
def test_ray_is_imported_when_it_is_needed(module):
    """`--help` and mistakes in the flags should not wait for it."""
    assert "ray" not in _packages(module, top_level_only=True)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_tensors_in_here(module):
    assert "torch" not in _packages(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "storage.py"])
def test_only_storage_knows_the_libraries_of_object_storage(module):
    libraries = {"fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "aiobotocore", "azure", "aiohttp"}
    assert not _packages(module) & libraries


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_that_are_declared(module):
    """transformers and the like are for tests; a user may not have them. What the extra `eval`
    brings is imported by name, see `evaluate.libraries`, except for one picture."""
    assert not _packages(module) & {"transformers", "hypothesis", "pytest", "seqeval"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(("model/", "text/"))])
def test_the_library_knows_nothing_of_what_is_built_on_it(module):
    above = ("job", "cli", "predictor", "tasks", "local")
    assert not [n for n in imported(module) for a in above if n.startswith(f"erniem_batch.{a}")]


# Annotated rows and predictions are read as the job reads its input.
KNOW_THE_JOB = ("job/", "cli", "gold", "evaluate/")


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith(KNOW_THE_JOB)])
def test_only_the_command_line_knows_the_job(module):
    if not module.startswith(WITH_RAY):
        assert not [n for n in imported(module) if n.startswith("erniem_batch.job")]


@pytest.mark.parametrize("statement", ["import erniem_batch", "import erniem_batch.cli"])
def test_importing_does_not_import_ray(statement):
    code = f"{statement}; import sys; sys.exit('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_counter_needs_neither_torch_nor_arrow():
    """It is a process of its own in every run."""
    code = (
        "import erniem_batch.job.counter, sys; "
        "sys.exit(' '.join({'torch', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, check=False
    )
    assert done.stderr.decode().strip() == ""


def test_scripts_import_without_side_effects():
    """No connection, no environment, no output: only a guard at the end starts anything."""
    code = (
        "import os, sys, threading; before = dict(os.environ); sys.path.insert(0, 'pipelines'); "
        "import ner; assert dict(os.environ) == before; "
        "assert 'ray' not in sys.modules; assert threading.active_count() == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
