"""Frozen but not constant: modules whose output depends on the batch or on chance, though no bit of them changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.rotation import Rotation
from mtl.runtime.text import parents

# Attributes of modules that hold a drop rate; also `p`, if the class has `drop` in its name.
_RATES = ("drop_prob", "drop_p", "dropout", "drop_rate")

_IS_TRAINING = attrgetter("training")


class Constancy:
    """The norm layers and the dropout of the frozen part of a model.

    Attributes:
        norms: Norm layers with statistics, as (name, module).
    """

    def __init__(self, contract: Contract) -> None:
        places = [place for place in contract.frozen if place.is_full and not place.key_path]
        free = Counter(path for place in contract.free if place.kind != "attr" for path in parents(place.name))
        held = Counter(path for place in places for path in parents(place.name))
        is_frozen: dict[str, bool] = {}
        for path in sorted(contract.modules, key=lambda path: path.count(".") + bool(path)):
            # A module without tensors, such as dropout, belongs to the module around it.
            around = path != "" and is_frozen.get(path.rpartition(".")[0], False)
            is_frozen[path] = not free[path] if held[path] or free[path] else around
        frozen = {name: module for name, module in contract.modules.items() if is_frozen[name]}
        own_buffers = {id(place.owner) for place in places if place.kind == "buffer"}
        self.norms = [
            (name, module)
            for name, module in contract.modules.items()
            if isinstance(module, _NormBase) and (id(module) in own_buffers)
        ]
        batch_norms = [(name, module) for name, module in frozen.items() if isinstance(module, _BatchNorm)]
        self._without_statistics = [(name, norm) for name, norm in batch_norms if norm.running_mean is None]
        self._with_statistics = [(name, norm) for name, norm in batch_norms if norm.running_mean is not None]
        self._droppers = [(name, module) for name, module in frozen.items() if _rate(module) > 0]
        with_modes = [*self.norms, *self._with_statistics, *self._droppers]
        self._rotation = Rotation(list(dict.fromkeys(module for _, module in with_modes)))

    def check(self, step: int) -> Iterator[tuple[str, str, str, str]]:
        """Kind, name, cause and detail of modules that are not constant now."""
        if not (self._without_statistics or any(map(_IS_TRAINING, self._rotation.due(step)))):
            return
        for name, norm in self.norms:
            if norm.training:
                yield "train_mode", name, causes.TRAIN_MODE, f"{type(norm).__name__} is in train mode"
        for name, norm in self._without_statistics:
            detail = f"{type(norm).__name__} normalises by the statistics of each batch"
            yield "batch_statistics", name, causes.BATCH_STATISTICS, detail
        for name, norm in self._with_statistics:
            # Lightning's freeze, for one, sets this on a layer with statistics, and leaves it in train mode.
            if norm.training and not norm.track_running_stats:
                detail = f"{type(norm).__name__} is in train mode and normalises by the statistics of each batch"
                yield "batch_statistics", name, causes.BATCH_STATISTICS, detail
        for name, module in self._droppers:
            if module.training:
                detail = f"{type(module).__name__} in a frozen part drops at random"
                yield "active_dropout", name, causes.DROPOUT, detail


def _rate(module: nn.Module) -> float:
    """A module's drop rate in train mode, 0 to 1."""
    keys = (*_RATES, "p") if "drop" in type(module).__name__.lower() else _RATES
    rates = [vars(module).get(key) for key in keys]
    return max((float(rate) for rate in rates if isinstance(rate, int | float) and 0 <= rate <= 1), default=0.0)
