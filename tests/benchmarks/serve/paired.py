"""What a service adds to a forward pass, where only one asks: prints a line of JSON.

    python tests/benchmarks/serve/paired.py MODEL_FOLDER TASK TEXTS SECONDS URL

For each text in turn the pass is computed here, and then asked for there: both meet the machine as
it is in that moment, and the service is there in both. Milliseconds are medians. The client is that
of the standard library: httpx takes a millisecond more by itself.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPResponse
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

from bare import make_predictor

from erniem_batch.records import Encoded, Record

# One after the other each way, as with a client that does nothing else; the last of them counts.
IN_A_ROW = 3


def main() -> None:
    model, task, texts, seconds, url = sys.argv[1:]
    predictor = make_predictor(model, task)
    forward, request, there = [], [], []
    end = time.perf_counter() + float(seconds)
    where = urlsplit(url)
    assert where.hostname
    client = HTTPConnection(where.hostname, where.port, timeout=300)
    for i, text in enumerate(cycle(json.loads(Path(texts).read_text()))):
        if time.perf_counter() > end and forward:
            break
        (item,) = predictor.encode([Record(str(i), text)])
        assert isinstance(item, Encoded)
        for _ in range(IN_A_ROW):
            started = time.perf_counter()
            predictor.forward(item.windows)
            took = time.perf_counter() - started
        forward.append(took)
        for _ in range(IN_A_ROW):
            started = time.perf_counter()
            response = post(client, where.path, {"inputs": text})
            took = time.perf_counter() - started
        request.append(took)
        there.append(forward_ms(response) / 1000)
    added = [r - f for r, f in zip(request, forward, strict=True)]
    way = [r - t for r, t in zip(request, there, strict=True)]
    spent = {"forward": forward, "request": request, "forward_there": there,
             "added": added, "beside_forward_there": way}  # fmt: skip
    report = {f"{name}_ms": 1000 * statistics.median(many) for name, many in spent.items()}
    print(json.dumps(report | {"texts": len(forward)}))
    predictor.close()


def post(client: HTTPConnection, path: str, body: Mapping[str, str]) -> HTTPResponse:
    """An answer that has been read."""
    client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    response.read()
    assert response.status == 200, response.status
    return response


def forward_ms(response: HTTPResponse) -> float:
    timing = response.headers["server-timing"]
    parts = dict(part.split(";dur=") for part in timing.split(", "))
    return float(parts["forward"])


if __name__ == "__main__":
    main()
