"""The batch job: shards in, tagged shards out, on Ray Data.

The way of a record: `units` plans slices of input files -> `stream` sends them through an actor
pool -> `actor` reads its slice (`read`), asks the Predictor, writes one file (`write`) and gives
back one receipt -> `run` checks that all is there and publishes the `manifest`.
"""

from erniem_batch.job.config import JobConfig
from erniem_batch.job.manifest import result_files
from erniem_batch.job.report import RunReport
from erniem_batch.job.run import Stopped, replay_job, run_job

__all__ = ["JobConfig", "RunReport", "Stopped", "replay_job", "result_files", "run_job"]
