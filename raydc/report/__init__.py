"""The report of a run: one self-contained HTML page and its figures. Plain functions on tables; no Ray, no storage."""
