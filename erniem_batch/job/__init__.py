"""The batch job: shards in, tagged shards out, on Ray Data.

The way of a record: `units` plans slices of input files -> `run` streams them through an actor
pool -> `actor` reads its slice (`read`), asks the Predictor, writes one file (`write`) and gives
back one receipt.
"""

from erniem_batch.job.config import JobConfig
from erniem_batch.job.run import RunReport, run_job

__all__ = ["JobConfig", "RunReport", "run_job"]
