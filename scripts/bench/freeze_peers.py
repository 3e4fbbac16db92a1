"""Five freezes that do not hold, in a loop by hand, in Lightning's callbacks and here: what moves, and who says so.

    [PYTHONPATH=DIRECTORY] python scripts/bench/freeze_peers.py

Each cell is one short training on random data. `FinetuningScheduler` is taken from the import path if it is there
(`pip install --no-deps -t DIRECTORY finetuning-scheduler`); Lightning is in the extra `dev`. Each is used as its
documentation shows. "holds" means that what was asked for is what happened; "silent" that it is not, and that nothing
said so.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import mtl
from mtl.audit import AuditError
from mtl.freeze import trainable_parameters
from mtl.patterns import PatternError

NUM_STEPS = 6
Row = Callable[[], str]


class Net(nn.Module):
    """A trunk of three layers, whose first and last have names that begin alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.bn, self.layer10 = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)
        # Whether the last batch was normalised by its own mean and variance.
        self.by_batch = False

    def forward(self, x: Tensor) -> Tensor:
        given, bn = self.layer1(x), self.bn
        normalised = bn(given)
        assert bn.running_mean is not None
        kept = functional.batch_norm(given, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        self.by_batch = not torch.allclose(normalised, kept, atol=1e-4)
        out: Tensor = self.head(torch.relu(self.layer10(torch.relu(normalised))))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda width: torch.randn(16, width, generator=generator)  # noqa: E731
    return [(draw(8), draw(1)) for _ in range(NUM_STEPS)]


def moved(before: dict[str, Tensor], model: nn.Module, start: str) -> bool:
    """Whether a bit of what begins with a name has changed."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(start)}
    return any(not torch.equal(tensor, before[name]) for name, tensor in own.items())


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, to_none: bool = True) -> None:
    for x, y in batches():
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


def freeze_by_text(model: nn.Module, texts: Iterable[str]) -> None:
    for name, parameter in model.named_parameters():
        if any(text in name for text in texts):
            parameter.requires_grad = False


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- by hand, alone and with the audit


def by_hand(fault: str, audited: bool) -> str:
    """A loop by hand with one of the faults; with the audit attached, what that says."""
    model = net()
    frozen = {"part of a name": ["layer1"], "misspelt": ["layer1"], "thawed": []}.get(fault, ["layer1", "bn"])
    optimizer = adam(model.parameters())
    if fault == "part of a name":
        freeze_by_text(model, ["layer1"])
        optimizer = adam(trainable(model))
    elif fault == "statistics":
        freeze_by_text(model, ["layer1", "bn"])
        optimizer = adam(trainable(model))
    elif fault == "misspelt":
        freeze_by_text(model, ["layr1"])
    elif fault == "decay":
        steps(model, optimizer, to_none=False)
        freeze_by_text(model, ["layer1", "bn"])
        model.eval()
    elif fault == "thawed":
        freeze_by_text(model, ["layer1", "bn"])
        optimizer = adam(trainable(model))
        model.requires_grad_(True)
    before = copy_of(model)
    audit = mtl.attach(model, optimizer, freeze=frozen, policy="collect") if audited else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(model, optimizer, to_none=fault != "decay")
    if audit is not None:
        audit.end()
        kinds = sorted({violation.kind for violation in audit.report.violations})
        return f"caught: {', '.join(kinds)}" if kinds else "silent"
    return verdict(fault, before, model)


def verdict(fault: str, before: dict[str, Tensor], model: Net) -> str:
    is_held = {
        "part of a name": moved(before, model, "layer10") and not moved(before, model, "layer1."),
        "statistics": not moved(before, model, "bn."),
        "misspelt": not moved(before, model, "layer1."),
        "decay": not moved(before, model, "layer1."),
        "thawed": moved(before, model, "layer1."),
    }[fault]
    if fault == "statistics" and is_held and model.by_batch:
        return "silent: they stay, and it normalises by the batch's"
    return "holds" if is_held else "silent"


# --- Lightning


def by_lightning(fault: str, scheduled: bool) -> str:
    """The same freeze by a callback: `BaseFinetuning`, or a schedule of FinetuningScheduler."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BaseFinetuning

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "finetuning_scheduler"):
        logging.getLogger(name).disabled = True

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # FinetuningScheduler wants the parameters of its first phase, `BaseFinetuning` those that train.
            return adam(trainable(self))

    class Freeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            own = pl_module.net
            if fault == "misspelt":
                self.freeze(own.layr1)
            elif fault == "part of a name":
                self.freeze(own.layer1)
            else:
                self.freeze([own.layer1, own.bn], train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if fault == "thawed" and epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.layer1, optimizer, lr=1e-2)

    module = Module()
    before = copy_of(module.net)
    try:
        fit(module, schedule(fault) if scheduled else Freeze())
    except Exception as error:  # noqa: BLE001  whatever they raise is their answer
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    if scheduled and fault == "part of a name":
        # Phase 1 names layer1, and was to thaw nothing else.
        return "silent" if moved(before, module.net, "layer10") else "holds"
    return verdict(fault, before, module.net)


def schedule(fault: str) -> Any:
    """FinetuningScheduler with one of the faults in its schedule."""
    from finetuning_scheduler import FinetuningScheduler

    names = {
        "part of a name": [["net.head.*"], ["net.layer1.*"]],
        "misspelt": [["net.head.*", "net.layr10.*"], ["net.layer1.*"]],
        "thawed": [["net.head.*", "net.layer10.*"], ["net.layer1\\..*"]],
    }.get(fault, [["net.head.*", "net.layer10.*"]])
    # All that no phase names stays frozen.
    phases = {number: {"params": own, "max_transition_epoch": number + 1} for number, own in enumerate(names)}
    return FinetuningScheduler(ft_schedule=phases, epoch_transitions_only=True, restore_best=False)


def fit(module: Any, callback: Any) -> None:
    """Two epochs by Lightning's own trainer, in silence."""
    import lightning.pytorch as pl

    x, y = (torch.cat(each) for each in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet[0], quiet[1]:
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, loader)


# --- here


def here(fault: str) -> str:
    model = net()
    pattern = {"misspelt": ["layr1"], "part of a name": ["layer1"]}.get(fault, ["layer1", "bn"])
    before = copy_of(model)
    try:
        plan = mtl.plan_freeze(model, pattern)
    except PatternError as error:
        return f"refused: {error}"
    for phase in (plan, mtl.plan_freeze(model, ["bn"])) if fault == "thawed" else (plan,):
        mtl.enforce(model, phase)
        optimizer = adam(trainable_parameters(model, phase).values())
        audit = mtl.attach(model, optimizer, freeze=[*phase.patterns])
        try:
            steps(model, optimizer, to_none=fault != "decay")
        except AuditError as error:
            return f"refused: {error}"
        audit.end()
    return verdict(fault, before, model)


FAULTS = {
    "part of a name": "`layer1` is frozen by name; `layer10` is to train",
    "misspelt": "the name is misspelt, `layr1`",
    "statistics": "a BatchNorm is frozen: its running statistics do not change, and it normalises with them",
    "decay": "weight decay and `zero_grad(set_to_none=False)`: a layer that is frozen in mid-training stops changing",
    "thawed": "`layer1` is thawed after the optimizer was built; it trains",
}


def main() -> None:
    tools: dict[str, Callable[[str], str]] = {
        "by hand": lambda fault: by_hand(fault, audited=False),
        "by hand, with mtl's audit": lambda fault: by_hand(fault, audited=True),
        "Lightning BaseFinetuning": lambda fault: by_lightning(fault, scheduled=False),
    }
    with contextlib.suppress(ImportError):
        import finetuning_scheduler  # noqa: F401

        tools["FinetuningScheduler"] = lambda fault: by_lightning(fault, scheduled=True)
    tools["mtl"] = here
    sys.stdout.write(f"| | {' | '.join(tools)} |\n|---|{'---|' * len(tools)}\n")
    for fault, words in FAULTS.items():
        sys.stdout.write(f"| {words} | {' | '.join(tool(fault) for tool in tools.values())} |\n")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning")]
    sys.stdout.write(f"\n{', '.join(versions)}; {Path(__file__).name}\n")


if __name__ == "__main__":
    main()
