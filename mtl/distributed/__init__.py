"""Several processes that train one model: how they find each other, what they exchange, DDP, SyncBatchNorm."""
