"""`ray job submit --working-dir . -- python pipelines/ner.py …`, on a cluster of its own."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest
from clusters import RAY, head_with_jobs
from fault.corpus import make_corpus, save_model
from fault.results import is_data, names_in, read_result
from fault.runs import ROOT, wait_until

import erniem_batch
from erniem_batch.job import result_files

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

PATIENCE_S = 400.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SCRIPTS = {f"pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")}


@pytest.fixture(scope="module")
def head():
    with head_with_jobs(n_cpus=2) as head:
        yield head


@pytest.fixture(scope="module")
def client(head):
    from ray.job_submission import JobSubmissionClient

    # Not by environment variables, which Ray reads once in a process: other tests need others.
    return JobSubmissionClient(head.dashboard, headers={"Authorization": f"Bearer {head.token}"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Many small units; one row in twenty cannot be tagged."""
    folder = tmp_path_factory.mktemp("corpus")
    return make_corpus(folder / "in", seed=11, n_shards=24), save_model(folder / "model")


def _ner(corpus, output: Path, *options: str, dead_letters: str = "20%") -> list[str]:
    source, model = corpus
    command = ["python", "pipelines/ner.py", "--input", str(source.folder)]
    command += ["--output", str(output), "--model", str(model), "--unit-bytes", "3000"]
    command += ["--actors", "1", "--num-cpus-per-actor", "1", "--max-batch-tokens", "600"]
    return [*command, "--max-dead-letters", dead_letters, *options]


def _submit(client, command: Sequence[str]) -> str:
    """A job from this checkout as it is; its id."""
    name: str = client.submit_job(
        entrypoint=" ".join(command), runtime_env={"working_dir": str(ROOT)}
    )
    return name


def _ray_job(head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", *arguments],
        cwd=ROOT,
        env={**head.environment, "RAY_API_SERVER_ADDRESS": head.dashboard},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def _end_of(client, job: str):
    assert wait_until(lambda: client.get_job_status(job) in ENDED, PATIENCE_S, every=0.3)
    return client.get_job_info(job)


def _log(client, job: str) -> list[str]:
    """Lines of a job's log, which a file shows as well as a terminal."""
    text = client.get_job_logs(job)
    # A tab is in a line of Ray's.
    assert not [c for c in text if ord(c) < 32 and c not in "\n\t"], text
    return text.splitlines()


def _report(client, job: str) -> dict:
    report: dict = json.loads(_log(client, job)[-1])
    return report


def _results(output: Path) -> dict[str, str]:
    """Names and versions of the result files there are."""
    return {name: v for name, v in names_in(str(output)).items() if is_data(name)}


# ---- what is shipped --------------------------------------------------------------------------


def test_only_the_scripts_are_shipped(tmp_path):
    """Ray's own packaging, on this checkout with all that lies in it."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert set(ZipFile(package).namelist()) == SCRIPTS
    assert package.stat().st_size < 50_000


@pytest.mark.slow  # the others submit by Ray's client, which this command is a shell of
def test_a_job_as_the_command_line_submits_it(head, client, tmp_path):
    """It finds the installed package with its demo model, and its working folder only scripts."""
    look = tmp_path / "look.py"
    look.write_text(
        "import json, pathlib, sys, erniem_batch\n"
        "files = [p.as_posix() for p in pathlib.Path().rglob('*') if p.is_file()]\n"
        "print(json.dumps([erniem_batch.__file__, files]))\n"
    )
    output = tmp_path / "out"
    ner = f"python pipelines/ner.py --model demo --limit 5 --output {output}"
    done = _ray_job(
        head, "submit", "--working-dir", ".", "--submission-id", "demo",
        "--", "sh", "-c", f"python {look} && {ner}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = _log(client, "demo")
    where, files = next(json.loads(line) for line in lines if line.startswith("["))
    assert where == erniem_batch.__file__
    assert set(files) == SCRIPTS
    report = json.loads(lines[-1])
    assert (report["exit_code"], report["n_rows"], report["n_ok"]) == (0, 5, 5)
    assert report["n_found"] > 5
    assert lines[-1] in done.stdout.splitlines()
    (file,) = result_files(str(output))
    assert pq.read_table(file).num_rows == 5
    assert (output / "_SUCCESS").exists()
    with pytest.raises(RuntimeError, match="demo"):  # an id is given once
        client.submit_job(entrypoint="true", submission_id="demo")


# ---- how a job ends ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(client, corpus, tmp_path_factory):
    """A run that nobody disturbs: its job, its output, and what stands in it."""
    output = tmp_path_factory.mktemp("whole") / "out"
    job = _submit(client, _ner(corpus, output))
    info = _end_of(client, job)
    assert (info.status, info.driver_exit_code) == ("SUCCEEDED", 0), client.get_job_logs(job)
    return job, output, read_result(str(output))


def test_a_job_that_succeeds(client, corpus, whole):
    """Every row is in its output or its dead letters; the log tells how far it is on the way."""
    job, _, result = whole
    assert set(result.ids) == corpus[0].good | corpus[0].bad
    assert result.ids.total() == len(result.ids)
    report = _report(client, job)
    assert (report["exit_code"], report["n_ok"]) == (0, len(corpus[0].good))
    assert (report["n_dead"], report["n_units_now"]) == (len(corpus[0].bad), report["n_units"])
    progress = [line for line in _log(client, job) if "progress units=" in line]
    assert len(progress) >= int(report["working_seconds"]) // 12  # each ten seconds


def test_exit_codes(head, client, corpus, whole, tmp_path):
    """`ray job submit` turns all of them into 1; Ray's job info has the real one."""
    strict = _submit(client, _ner(corpus, whole[1], dead_letters="0"))
    command = _ner(corpus, tmp_path / "out", "--text-column", "body")
    name = ("--submission-id", "wrong-column")
    done = _ray_job(head, "submit", "--working-dir", ".", *name, "--", *command)
    assert done.returncode == 1
    assert client.get_job_info("wrong-column").driver_exit_code == 2
    assert "body" in _log(client, "wrong-column")[-1]
    info = _end_of(client, strict)
    assert (info.status, info.driver_exit_code) == ("FAILED", 4)
    assert "exit code 4" in info.message
    report = _report(client, strict)
    assert (report["exit_code"], report["n_units_now"]) == (4, 0)  # all was done already


@pytest.mark.slow
def test_stopped_submitted_again_and_submitted_twice(head, client, corpus, whole, tmp_path):
    """What was finished stays as it is, the rest is done, and a second job keeps its hands off."""
    output = tmp_path / "out"
    lease = output / "_run" / "lease.json"
    n_units = _report(client, whole[0])["n_units"]
    stopped = _submit(client, _ner(corpus, output))
    assert wait_until(lambda: len(_results(output)) >= n_units // 4, PATIENCE_S, every=0.05)
    assert _ray_job(head, "stop", stopped).returncode == 0
    assert _end_of(client, stopped).status == "STOPPED"
    before = _results(output)
    assert n_units // 4 <= len(before) < n_units
    owner = json.loads(lease.read_bytes())["owner"]

    again = _submit(client, _ner(corpus, output))
    assert wait_until(lambda: json.loads(lease.read_bytes())["owner"] != owner, PATIENCE_S)
    twin = _submit(client, _ner(corpus, output))
    assert _end_of(client, twin).driver_exit_code == 2
    assert client.get_job_status(again) == "RUNNING"
    assert "another run is writing there" in _log(client, twin)[-1]
    info = _end_of(client, again)
    assert (info.status, info.driver_exit_code) == ("SUCCEEDED", 0), client.get_job_logs(again)

    report = _report(client, again)
    assert report["n_units_now"] == n_units - len(before)
    after = _results(output)
    assert {name: after[name] for name in before} == before
    result = read_result(str(output))
    assert result.digests == whole[2].digests
    assert result.letters == whole[2].letters
    assert (output / "_SUCCESS").exists()


def test_without_the_token_nobody_is_let_in(head):
    for path, body in (("/api/jobs/", None), ("/api/jobs/", b'{"entrypoint": "true"}')):
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            request = urllib.request.Request(head.dashboard + path, data=body, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert refused.value.code == (403 if headers else 401)
            refused.value.close()
