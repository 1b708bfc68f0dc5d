"""The predictor of the batch pipeline online, behind Ray Serve.

`serve run erniem_batch.serve:app model=demo` on any cluster; `erniem-batch serve` on a laptop.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Ray and FastAPI only for those who serve: batcher, engine and messages do without.
    if name == "app":
        from erniem_batch.serve.deployments import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
