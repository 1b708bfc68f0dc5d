"""Ray Data around transformers' pipeline, as tutorials have it: Parquet in, Parquet out.

    PYTHON naive_job.py MODEL_FOLDER INPUT_FOLDER OUTPUT_FOLDER THREADS BATCH

Prints {"seconds"}: from the first batch handed to the model until the last file is written, so that
starting Ray and loading the model do not count. For token classification with the plain tokenizer
of ErnieM, which gives no offsets.
"""

import json
import os
import sys
import time
from pathlib import Path

MODEL, INPUT, OUTPUT, THREADS, BATCH = sys.argv[1:]
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = THREADS

import ray  # noqa: E402


class Tagger:
    def __init__(self):
        from tutorial import ner_pipeline

        self.pipeline = ner_pipeline(Path(MODEL), int(THREADS))
        self.started = None

    def __call__(self, batch):
        self.started = self.started or time.time()
        Path(OUTPUT, "started").write_text(str(self.started))
        found = self.pipeline(list(batch["text"]), batch_size=int(BATCH))
        batch["entities"] = [
            json.dumps([[e["entity_group"], e["word"], float(e["score"])] for e in entities])
            for entities in found
        ]
        return batch


def main():
    ray.init(num_cpus=int(THREADS) + 2, include_dashboard=False, log_to_driver=False)
    Path(OUTPUT).mkdir(parents=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    ray.data.read_parquet(INPUT).map_batches(
        Tagger, batch_size=64, concurrency=1, num_cpus=int(THREADS)
    ).write_parquet(OUTPUT)
    ended = time.time()
    print(json.dumps({"seconds": ended - float(Path(OUTPUT, "started").read_text())}))


if __name__ == "__main__":
    main()
