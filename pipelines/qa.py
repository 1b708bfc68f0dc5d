"""Answers that stand in a text, with their places.

python pipelines/qa.py                                                    # sample questions
python pipelines/qa.py --input corpus/ --output answers/ --model MODEL --top-k 3
ray job submit -- python pipelines/qa.py --input … --output …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("qa"))
