"""The one reader of files of tensors: anyone's checkpoints, by name; nothing in them is ever run."""

from mtl.checkpoint.tensor_file.contents import Contents, LeftOut
from mtl.checkpoint.tensor_file.read import UnreadableError, is_in_shards, read_contents, read_shards
from mtl.checkpoint.tensor_file.shards import (
    FROZEN,
    MODEL,
    OPTIMIZER,
    SHARDS,
    ShardFile,
    Shards,
    damaged_shards,
    described,
    file_digest,
    files_of,
    join_chunks,
    shard_files,
    shards_digest,
)
from mtl.checkpoint.tensor_file.single import (
    TensorFileError,
    file_inside,
    read_header,
    read_safetensors,
    read_tensor_file,
)

__all__ = [
    "FROZEN",
    "MODEL",
    "OPTIMIZER",
    "SHARDS",
    "Contents",
    "LeftOut",
    "ShardFile",
    "Shards",
    "TensorFileError",
    "UnreadableError",
    "join_chunks",
    "damaged_shards",
    "described",
    "file_digest",
    "file_inside",
    "files_of",
    "is_in_shards",
    "read_contents",
    "read_header",
    "read_safetensors",
    "read_shards",
    "read_tensor_file",
    "shard_files",
    "shards_digest",
]
