"""Measurements of imgfs: every figure that docs/performance.md states comes from here (`python -m bench`)."""
