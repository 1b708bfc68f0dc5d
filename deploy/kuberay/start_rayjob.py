"""Creates a RayJob from a file and waits for its end; runs in a pod, see cronjob.yaml.

    python deploy/start_rayjob.py rayjob.yaml

A RayJob of the same name that still runs is waited for; one that has ended is deleted first.
Exit codes: 0 the run is complete, 1 it is not (the last line says why), 2 it could not be started.
"""

import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SERVER = "https://kubernetes.default.svc"
ENDED = ("Complete", "Failed", "ValidationFailed")
POLL_S = 20.0
# The API server may be away for a while, when it is replaced by a newer one.
MAX_SILENCE_S = 900.0
T = TypeVar("T")


class RayJobs:
    """The RayJobs of a namespace.

    Args:
        token: gives the bearer token; Kubernetes changes it every hour.
    """

    def __init__(self, client: httpx.Client, namespace: str, token: Callable[[], str]) -> None:
        self._client = client
        self._path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = token

    def get(self, name: str) -> dict[str, Any] | None:
        """None: there is none of this name."""
        response = self._send("GET", f"{self._path}/{name}")
        return None if response.status_code == 404 else self._checked(response)

    def create(self, job: dict[str, Any]) -> None:
        self._checked(self._send("POST", self._path, job))

    def delete(self, name: str) -> None:
        """It is gone only when `get` gives None: after its cluster and the job that submitted it,
        which has a name that the next one uses again."""
        response = self._send("DELETE", f"{self._path}/{name}?propagationPolicy=Foreground")
        if response.status_code != 404:
            self._checked(response)

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._token()}"}
        response = self._client.request(method, path, json=body, headers=headers)
        if response.status_code >= 500 or response.status_code == 429:
            response.raise_for_status()
        return response

    @staticmethod
    def _checked(response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            message = f"{response.status_code} from Kubernetes: {response.text[:500]}"
            raise SystemExit(_say(message, exit_code=2))
        answer: dict[str, Any] = response.json()
        return answer


def run(jobs: RayJobs, job: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> int:
    """Starts it, or finds it running, and waits; 0 if it succeeded."""
    name = job["metadata"]["name"]
    found = _patiently(lambda: jobs.get(name), sleep)
    if found is not None and _phase(found) in ENDED:
        _patiently(lambda: jobs.delete(name), sleep)
        while _patiently(lambda: jobs.get(name), sleep) is not None:
            sleep(POLL_S)
        found = None
    if found is None:
        # Not again after an error: it may have been created all the same, and the next try of this
        # pod finds out.
        jobs.create(job)
        _say(f"RayJob {name} created")
    else:
        _say(f"RayJob {name} runs already")
    while True:
        current = _patiently(lambda: jobs.get(name), sleep)
        if current is None:
            return _say(f"RayJob {name} was deleted by somebody", exit_code=1)
        if _phase(current) in ENDED:
            status = current["status"]
            # The message has the exit code of the command, see deploy/README.md.
            _say(
                f"{status.get('jobStatus')}: {status.get('reason', '')} {status.get('message', '')}"
            )
            return 0 if status.get("jobStatus") == "SUCCEEDED" else 1
        sleep(POLL_S)


def _patiently(call: Callable[[], T], sleep: Callable[[float], None]) -> T:
    """What it gives, after some silence of the server if need be."""
    silent = 0.0
    while True:
        try:
            return call()
        except httpx.HTTPError as error:
            if silent >= MAX_SILENCE_S:
                raise
            _say(f"{type(error).__name__}: {error}")
            silent += POLL_S
            sleep(POLL_S)


def _phase(job: dict[str, Any]) -> str | None:
    phase: str | None = job.get("status", {}).get("jobDeploymentStatus")
    return phase


def _say(message: str, exit_code: int = 0) -> int:
    print(message.strip(), flush=True)
    return exit_code


def main(path: str) -> int:
    """In a pod."""
    job = yaml.safe_load(Path(path).read_text())
    namespace = (ACCOUNT / "namespace").read_text()
    trusted = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    with httpx.Client(base_url=SERVER, verify=trusted, timeout=30) as client:
        return run(RayJobs(client, namespace, (ACCOUNT / "token").read_text), job)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
