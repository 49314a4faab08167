"""defectlab: a reproducible study of industrial surface-defect detection."""

__version__ = "0.1.0"
