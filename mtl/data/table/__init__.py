"""Tables: CSV or Parquet with a row for each image."""

from mtl.data.table.rows import read_tables
from mtl.data.table.table import Table

__all__ = ["Table", "read_tables"]
