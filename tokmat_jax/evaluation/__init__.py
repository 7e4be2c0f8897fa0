"""The report card: does it beat ordinary decoding? `python -m tokmat_jax evaluate` runs it.

    held-out text ──► prompts ──► methods ──► samples ──► judge, metrics ──► scores ──► frontier
    pair.py                       methods.py  store.py    judge.py           scores.py  frontier.py
                                     │                                          │
                                     └──► figures.py, gap.py, geometry.py ──► plots.py ──► report.py
"""
