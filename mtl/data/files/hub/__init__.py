"""Data sets of Hugging Face's `datasets`: saved folders, Parquet files, folders of images, and those of the hub."""

from mtl.data.files.hub.hub import HubSet
from mtl.data.files.hub.opening import hub_columns, open_hub

__all__ = ["HubSet", "hub_columns", "open_hub"]
