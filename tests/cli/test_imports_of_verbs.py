"""What each verb imports, by name: nothing that only other verbs, or another configuration, need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import tiny_config

ROOT = Path(__file__).parent.parent.parent
# Of each only its own import takes a tenth of a second to more than one.
DEAR = {
    *("torch", "timm", "torchvision.io", "torch._dynamo.utils", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.distributed.checkpoint", "torchjd.aggregation", "cvxpy", "qpsolvers", "wandb", "wandb.apis.public"),
    *("matplotlib", "pandas", "scipy", "datasets", "tensorboard", "segmentation_models_pytorch", "onnx"),
}


def imported(*arguments: str, before: str = "") -> set[str]:
    """The dear modules that a command has imported at its end."""
    program = (
        f"import sys\n{before}\nfrom mtl.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as error: code = error.code\n"
        f"print('imported:', code, *sorted({DEAR!r} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code, *found = done.stdout.splitlines()[-1].removeprefix("imported: ").split()
    assert code in ("0", "None"), done.stderr
    return set(found)


def test_help_imports_none_of_them() -> None:
    assert imported("--help") == set()


def test_a_plan_imports_torch_and_timm_alone(tmp_path: Path) -> None:
    assert imported("plan", str(tiny_config(tmp_path))) == {"torch", "timm"}


def test_a_plan_with_a_method_that_weighs_gradients_imports_its_package(tmp_path: Path) -> None:
    config = str(tiny_config(tmp_path))
    found = imported("plan", config, "balance.method=upgrad")
    assert {"torchjd.aggregation", "qpsolvers"} <= found
    assert found & {"torchvision.io", "torch._dynamo.utils", "wandb", "matplotlib"} == set()


# Prints what is imported when a step begins and when it has ended, the first one.
WATCHED = f"""
import mtl.training.loop as loop
own, seen = loop.Trainer.train_step, []
def step(self, *given):
    before = {{*sys.modules}}
    own(self, *given)
    seen or print("begun:", *sorted({DEAR!r} & before), file=sys.stderr)
    seen or print("new:", *sorted({{*sys.modules}} - before), file=sys.stderr)
    seen.append(1)
loop.Trainer.train_step = step
"""


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_training_imports_no_more_before_its_first_step_and_nothing_in_it(tmp_path: Path, mode: str) -> None:
    config = tiny_config(tmp_path)
    arguments = ["train", str(config), f"tracking.mode={mode}"]
    program = f"import sys\n{WATCHED}\nfrom mtl.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":", 1) for line in done.stderr.splitlines() if line.startswith(("begun:", "new:")))
    wandb = {"wandb"} if mode == "offline" else set()
    # wandb looks for pandas itself.
    assert {*lines["begun"].split()} - {"pandas"} == {"torch", "timm", *wandb}
    # What torch loads of its own for a first backward is small.
    assert [name for name in lines["new"].split() if not name.startswith(("torch.", "mtl."))] == []
