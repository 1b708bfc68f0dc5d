"""Labels, or a number, for whole texts and pairs of texts.

python pipelines/classify.py                                              # sample texts by topic
python pipelines/classify.py --input corpus/ --output tagged/ --model MODEL --all-scores
python pipelines/classify.py … --candidate-labels 'sports, politics'      # zero-shot
ray job submit -- python pipelines/classify.py --input … --output …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("classify"))
