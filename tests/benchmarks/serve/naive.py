"""A service as tutorials write it: transformers behind `@serve.batch`. Prints a line when ready.

    python tests/benchmarks/serve/naive.py MODEL_FOLDER PORT THREADS

For token classification: a label for each token, no offsets, and long texts cut off at 512 tokens,
all of which is less work than ours. What tutorials get wrong in ways that would make this
comparison easy is set right: as many requests at a time as batches hold, no access log.
"""

import signal
import sys
import threading
import warnings

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

from erniem_batch.job.cluster import SPARE_CPUS, connect_to

MAX_BATCH_SIZE = 32


@serve.deployment(max_ongoing_requests=1024)
class Tagger:
    def __init__(self, folder: str, threads: int) -> None:
        import torch
        import transformers

        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=0.01)
    async def tag(self, texts: list[str]) -> list[dict]:
        batch = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=512,
            return_attention_mask=True,  # not by default, for ErnieM
            return_tensors="pt",
        )
        with self.torch.inference_mode():
            best = self.model(**batch).logits.argmax(-1)
        names = self.model.config.id2label
        answers = []
        for row, mask in zip(best.tolist(), batch["attention_mask"].tolist(), strict=True):
            n_tokens = sum(mask)
            labels = [names[label] for label in row[1 : n_tokens - 1]]
            answers.append({"labels": labels, "usage": {"n_tokens": n_tokens - 2}})
        return answers

    async def __call__(self, request: Request) -> dict:
        body = await request.json()
        return await self.tag(body["inputs"])


def main() -> None:
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ended = threading.Event()
    connect_to(None, threads + SPARE_CPUS)  # a Ray as ours has it
    log = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=log)
    tagger = Tagger.options(ray_actor_options={"num_cpus": threads})
    serve.run(tagger.bind(folder, threads), route_prefix="/", logging_config=log)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print("ready", flush=True)
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
