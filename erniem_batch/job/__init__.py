"""The batch job: shards in, tagged shards out, on Ray Data.

The way of a record: `units` plans slices of input files -> `stream` sends them through an actor
pool -> `actor` reads its slice (`read`), asks the Predictor, writes one file (`write`) and gives
back one receipt -> `run` checks that all is there and publishes the `manifest`.
"""

from typing import TYPE_CHECKING

from erniem_batch.lazy import lazily

if TYPE_CHECKING:
    from erniem_batch.job.config import JobConfig
    from erniem_batch.job.manifest import result_files
    from erniem_batch.job.report import RunReport
    from erniem_batch.job.run import replay_job, run_job
    from erniem_batch.stopping import Stopped

# Where each name comes from, once it is asked for: `counter` and others do without torch.
_MODULES = {
    "JobConfig": "config",
    "RunReport": "report",
    "Stopped": "run",
    "replay_job": "run",
    "result_files": "manifest",
    "run_job": "run",
}

__all__ = ["JobConfig", "RunReport", "Stopped", "replay_job", "result_files", "run_job"]


__getattr__ = lazily(__name__, _MODULES, globals())
