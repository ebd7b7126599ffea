"""Engines: from a suite to the records of its cases, whatever computes them and whatever fails."""
