"""Evaluation: from a case to records, by the judge's word; and `evaluate` on any module."""
