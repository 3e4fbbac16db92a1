"""Several processes that train one model: rendezvous, collectives, DDP, synchronised BatchNorm."""
