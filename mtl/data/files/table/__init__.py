"""Tables: CSV or Parquet with a row for each image."""

from mtl.data.files.table.rows import Tables, label_names, read_tables
from mtl.data.files.table.table import Table

__all__ = ["Table", "Tables", "label_names", "read_tables"]
