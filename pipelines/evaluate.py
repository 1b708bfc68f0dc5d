"""How good a batch run or a model is, by annotated rows.

python pipelines/evaluate.py --predictions tagged/ --report report/                  # of a run
python pipelines/evaluate.py --task ner --model MODEL --gold 'dev/*.jsonl' --tune min_score.json
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("evaluate"))
