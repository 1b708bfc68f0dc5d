"""The best of several choices for a premise (multiple choice).

python pipelines/choose.py --model MODEL                                  # sample rows
python pipelines/choose.py --input copa/ --output chosen/ --model MODEL --question-column question
ray job submit -- python pipelines/choose.py --input … --output … --model …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("choose"))
