"""Data sets: fetching and verifying (`store`), readers, and procedural stand-ins."""

from defectlab.data.store import DataError, data_dir, weights_dir

__all__ = ["DataError", "data_dir", "weights_dir"]
