"""The cold audit: runs proven again from their files, and any two checkpoints compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl.audit.offline.compare import compare
from mtl.audit.offline.run import audit_run
from mtl.checkpoint.tensor_file import UnreadableError, read_contents
from mtl.cli import main
from mtl.runtime.fingerprint import root
from mtl.training.run import train
from runs import read_model, small_parts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        patch.setattr("mtl.checkpoint.folder.Checkpoints._prune", lambda _: None)
        folder = tmp_path_factory.mktemp("cold")
        return train(small_parts(folder, optim={"ema_decay": 0.5}), quiet=True).run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def flip(file: Path, name: str) -> None:
    """Turns over one bit of one element of one tensor, and leaves the file a good one."""
    tensors = load_file(file)
    tensors[name].view(-1)[:1].view(torch.uint8)[0] ^= 1
    save_file(tensors, file)


# --- a run


def test_a_clean_run_is_proven_again_checkpoint_by_checkpoint(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = audit_run(run_dir)
    frozen = [phase["frozen"]["fingerprints"] for phase in json.loads((run_dir / "audit.json").read_text())["phases"]]
    kept = read_model(run_dir / "checkpoints/last")
    per_phase = [sum(name in kept for name in each) for each in frozen]
    assert result.ok and result.num_checkpoints == 3
    assert result.num_tensors == per_phase[0] + 2 * per_phase[1] > 0
    assert main(["audit", str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith("audit: clean; ")


def test_one_bit_of_a_frozen_tensor_is_found_and_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run_dir / "checkpoints/step-00000005/frozen.safetensors", "trunk.layer1.0.conv1.weight")
    assert main(["audit", str(run_dir)]) == 3
    said = capsys.readouterr().out
    assert "step-00000005: trunk.layer1.0.conv1.weight was frozen in phase 'warm-heads', and is not the same" in said
    assert "step-00000005/frozen.safetensors: holds other tensors than were written at this step" in said
    assert "model.safetensors" not in said


def test_one_bit_of_a_tensor_that_trained_is_found(run_dir: Path) -> None:
    flip(run_dir / "checkpoints/last/model.safetensors", "heads.depth.out.bias")
    (finding,) = audit_run(run_dir).findings
    assert finding.endswith("step-00000012/model.safetensors: holds other tensors than were written at this step")


def test_a_file_of_another_step_is_found(run_dir: Path) -> None:
    files = [run_dir / f"checkpoints/step-000000{step}/model.safetensors" for step in ("10", "12")]
    shutil.copy(files[0], files[1])
    assert [finding.split(": ")[0] for finding in audit_run(run_dir).findings] == [str(files[1])]


def test_a_missing_file_of_frozen_tensors_is_named(run_dir: Path) -> None:
    file = run_dir / "checkpoints/step-00000010/frozen.safetensors"
    file.unlink()
    assert audit_run(run_dir).findings == [f"{file}: no such checkpoint"]


def test_a_number_changed_in_the_state_is_found(run_dir: Path) -> None:
    file = run_dir / "checkpoints/step-00000010/state.json"
    file.write_text(file.read_text().replace('"epoch": 1', '"epoch": 2').replace('"epoch": 2', '"epoch": 3'))
    assert audit_run(run_dir).findings == [f"{file}: says other things than were written at this step"]


@pytest.mark.parametrize("name", ["model.safetensors", "frozen.safetensors"])
def test_a_truncated_file_is_named(run_dir: Path, name: str) -> None:
    file = run_dir / "checkpoints/step-00000010" / name
    file.write_bytes(file.read_bytes()[:-7])
    (finding,) = audit_run(run_dir).findings
    assert finding.startswith(f"{file}: cannot be read")


def test_an_edited_audit_is_found(run_dir: Path) -> None:
    file = run_dir / "audit.json"
    audit = json.loads(file.read_text())
    audit["phases"][0]["frozen"]["fingerprints"]["trunk.bn1.weight"] = "0" * 32
    file.write_text(json.dumps(audit))
    findings = audit_run(run_dir).findings
    assert "audit.json: the fingerprints of phase 'warm-heads' are not those of its root" in findings


def test_a_run_that_was_cut_short_is_not_clean(run_dir: Path) -> None:
    file = run_dir / "audit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ok": False}))
    assert audit_run(run_dir).findings == ["audit.json: the run was not clean, or it was cut short"]


def change_audit(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = run_dir / "audit.json"
    audit = json.loads(file.read_text())
    change(audit)
    for phase in audit["phases"]:
        phase["frozen"]["root"] = root(phase["frozen"]["fingerprints"])
        phase["frozen"]["count"] = len(phase["frozen"]["fingerprints"])
    file.write_text(json.dumps(audit))


def test_only_tensors_that_have_the_bytes_of_their_phase_are_counted(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = audit_run(run_dir).num_tensors
    flip(run_dir / "checkpoints/step-00000005/frozen.safetensors", "trunk.layer1.0.conv1.weight")
    assert audit_run(run_dir).num_tensors == before - 1
    assert main(["audit", str(run_dir)]) == 3
    have = f"audit: 2 not as frozen; {before - 1} frozen tensors in 3 checkpoints have the bytes of their phase\n"
    assert capsys.readouterr().out.endswith(have)


def test_a_run_that_froze_nothing_is_neither_clean_nor_a_violation(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_audit(run_dir, lambda audit: [phase["frozen"]["fingerprints"].clear() for phase in audit["phases"]])
    assert main(["audit", str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert "  not proven: nothing was frozen in this run: nothing to prove\naudit: nothing proven; 0 frozen" in said
    assert "clean" not in said
    assert main(["audit", str(run_dir), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_frozen_names_that_no_checkpoint_holds_are_said_and_those_that_one_holds_are_not(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit_run(run_dir).unproven == []
    change_audit(run_dir, lambda audit: audit["phases"][0]["frozen"]["fingerprints"].update(unkept="0" * 32))
    result = audit_run(run_dir)
    assert result.ok and result.num_unkept == 1
    assert main(["audit", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "  not proven: phase 'warm-heads': no checkpoint holds unkept, which it froze\naudit: clean; " in said


def test_phases_without_a_checkpoint_and_checkpoints_without_a_phase_are_said(run_dir: Path) -> None:
    change_audit(run_dir, lambda audit: audit["phases"][0].update(name="another"))
    result = audit_run(run_dir)
    num_frozen = len(json.loads((run_dir / "audit.json").read_text())["phases"][0]["frozen"]["fingerprints"])
    assert result.ok and result.num_foreign == 1
    assert result.unproven == [
        "step-00000005: of phase 'warm-heads', of which audit.json has no contract",
        f"phase 'another': it has no checkpoint; it froze {num_frozen} tensors",
    ]
    change_audit(run_dir, lambda audit: audit["phases"][1].update(name="one more"))
    assert not audit_run(run_dir).ok, "nothing is left that was proven"


def test_phases_of_one_name_and_a_wrong_count_are_found(run_dir: Path) -> None:
    file = run_dir / "audit.json"
    audit = json.loads(file.read_text())
    audit["phases"][1]["name"] = "warm-heads"
    audit["phases"][1]["frozen"]["count"] += 1
    file.write_text(json.dumps(audit))
    findings = audit_run(run_dir).findings
    assert "audit.json: has several phases 'warm-heads'" in findings
    assert any(finding.startswith("audit.json: says that phase 'warm-heads' has ") for finding in findings)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"ok": true}',
        '{"ok": true, "phases": {}}',
        '{"ok": true, "phases": [{"name": 3}]}',
    ],
)
def test_a_damaged_audit_is_one_line_and_exit_code_2(
    run_dir: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "audit.json").write_text(content)
    assert main(["audit", str(run_dir)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "audit.json: " in said.err


@pytest.mark.parametrize("content", ["", "[]", '{"digests": []}', '{"digests": {"model": 3}}', '{"phase": 3}'])
def test_a_damaged_state_is_found_and_named(run_dir: Path, content: str) -> None:
    file = run_dir / "checkpoints/step-00000010/state.json"
    file.write_text(content)
    (finding,) = audit_run(run_dir).findings
    assert finding.startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["audit.json", "checkpoints"])
def test_what_is_no_run_is_exit_code_2(run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / name
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert main(["audit", str(run_dir)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_two_checkpoints_of_a_run_are_compared_in_both_files(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (run_dir / f"checkpoints/step-{step:08d}" for step in (5, 12))
    assert main(["audit", str(one), str(other), "--freeze", "trunk.conv1"]) == 0
    flip(other / "frozen.safetensors", "trunk.conv1.0.weight")
    assert main(["audit", str(one), str(other), "--freeze", "trunk.conv1"]) == 3
    assert "  trunk.conv1.0.weight: changed by" in capsys.readouterr().out


def test_two_runs_are_not_two_checkpoints_and_a_checkpoint_is_no_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(run_dir), str(run_dir)]) == 2
    assert capsys.readouterr().err.endswith(
        f"; {run_dir} is a run: give one of its checkpoints, such as {run_dir}/checkpoints/last\n"
    )
    assert main(["audit", str(run_dir / "checkpoints/last")]) == 2
    assert "is not the directory of a finished run: it has no audit.json" in capsys.readouterr().err


def test_two_checkpoints_of_a_run_are_compared_with_their_optimizers(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, other = run_dir / "checkpoints/last", run_dir / "other"
    shutil.copytree(last, other)
    assert main(["audit", str(last), str(other)]) == 0
    name = next(name for name, each in load_file(other / "optimizer.safetensors").items() if each.numel())
    flip(other / "optimizer.safetensors", name)
    assert main(["audit", str(last), str(other), "--freeze", "trunk", "heads"]) == 0
    capsys.readouterr()
    assert main(["audit", str(last), str(other)]) == 3
    assert f"  optimizer.{name}: changed" in capsys.readouterr().out


# --- two checkpoints


BEFORE = {
    "trunk.conv.weight": torch.tensor([[1.0, -0.0], [float("nan"), 2.0]]),
    "trunk.steps": torch.tensor(3),
    "heads.out.bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
}


def test_differences_are_named_with_their_size_and_share() -> None:
    after = {name: tensor.clone() for name, tensor in BEFORE.items()}
    after["heads.out.bias"] += torch.tensor([0.0, 0.5, 0.0, 0.0])
    result = compare(BEFORE, after)
    (difference,) = result.differences
    assert (result.num_identical, difference.name, difference.kind) == (2, "heads.out.bias", "value")
    assert (difference.max_abs, difference.share) == (0.5, 0.25)
    assert compare(BEFORE, after, ["trunk"]).ok


@pytest.mark.parametrize(
    ("name", "value", "kind", "share"),
    [
        ("trunk.conv.weight", torch.tensor([[1.0, 0.0], [float("nan"), 2.0]]), "value", 0.25),  # the sign of zero
        ("trunk.conv.weight", torch.tensor([[-0.0, 1.0], [float("nan"), 2.0]]), "value", 0.5),  # a permutation
        ("trunk.steps", torch.tensor(4), "value", 1.0),
        ("trunk.steps", torch.tensor(3, dtype=torch.int32), "dtype", None),
        ("heads.out.bias", torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "shape", None),
        ("heads.out.bias", None, "missing", None),
        ("heads.new", torch.zeros(1), "new", None),
    ],
)
def test_whatever_is_not_the_same_to_the_bit_is_found(name: str, value: Tensor, kind: str, share: float | None) -> None:
    after = {key: tensor for key, tensor in {**BEFORE, name: value}.items() if tensor is not None}
    (difference,) = compare(BEFORE, after).differences
    assert (difference.name, difference.kind, difference.share) == (name, kind, share)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=9),
    place=st.integers(0, 8),
    bit=st.integers(0, 31),
)
def test_any_turned_bit_is_found_and_nothing_else_is(values: list[float], place: int, bit: int) -> None:
    before = torch.tensor(values)
    after = before.clone()
    assert compare({"w": before}, {"w": after}).ok
    after.view(torch.int32)[place % len(values)] ^= torch.tensor(
        1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32
    )
    (difference,) = compare({"w": before}, {"w": after}).differences
    assert difference.share == 1 / len(values)


def files(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Path]:
    """The same tensors as everyone saves them."""
    made = {name: folder / name for name in ("a.safetensors", "b.pth", "c.pt", "d.pth", "e.pth")}
    save_file(tensors, made["a.safetensors"])
    torch.save(tensors, made["b.pth"])
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in tensors.items()}}, made["c.pt"])
    torch.save({"model": {f"_orig_mod.{name}": t for name, t in tensors.items()}, "lr": 0.1}, made["d.pth"])
    torch.save({name.replace("trunk.", "trunk._fsdp_wrapped_module."): t for name, t in tensors.items()}, made["e.pth"])
    (folder / "run").mkdir()
    save_file(tensors, folder / "run/model.safetensors")
    return {**made, "folder": folder / "run"}


def test_every_usual_form_of_checkpoint_is_read_and_names_lose_the_prefixes_of_wrappers(tmp_path: Path) -> None:
    forms = files(tmp_path, BEFORE)
    for form, path in forms.items():
        assert compare(BEFORE, read_contents(path).tensors).ok, form
    assert main(["audit", str(forms["c.pt"]), str(forms["folder"])]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pth", None, "no such checkpoint"),
        ("bad.pth", b"nonsense", "cannot be read"),
        ("bad.safetensors", b"nonsense", "cannot be read"),
        (
            "code.pth",
            nn.Linear(1, 1),
            r"holds a whole module \(torch.nn.modules.linear.Linear\), whose class is code; not run; save its tensors",
        ),
        ("empty.pth", {"epoch": 3}, "holds no tensors"),
    ],
)
def test_a_file_that_is_none_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str
) -> None:
    good = files(tmp_path, BEFORE)["b.pth"]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UnreadableError, match=message):
        read_contents(path)
    assert main(["audit", str(good), str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda moved: {"student": BEFORE, "teacher": BEFORE | moved, "center": torch.zeros(1)}, "teacher."),
        (lambda moved: {"student": BEFORE | moved, "teacher": BEFORE, "center": torch.zeros(1)}, "student."),
        (lambda moved: {"net": {"w": torch.zeros(1)}, "acc": moved["heads.out.bias"]}, None),
        (lambda moved: {"model": BEFORE, "model_ema": BEFORE | moved}, "model_ema."),
        (lambda moved: {"model": {"trunk": {"w": torch.zeros(1)}, "heads": {"out": moved}}}, "heads.out."),
        (lambda moved: {"model": BEFORE, "optimizer": {"state": {0: moved}}}, "optimizer.state.0."),
        (lambda moved: {"model": BEFORE, "rest": [torch.zeros(1), (moved,)]}, "rest.1.0."),
    ],
)
def test_no_tensor_of_a_file_is_passed_over(
    tmp_path: Path, wrap: Callable[[Any], Any], name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    torch.save(wrap({"heads.out.bias": torch.zeros(4)}), one)
    torch.save(wrap({"heads.out.bias": torch.ones(4)}), other)
    assert main(["audit", str(one), str(one)]) == 0
    assert main(["audit", str(one), str(other)]) == 3
    wanted = "acc" if name is None else f"{name}heads.out.bias"
    assert (
        f"  {wanted}: changed by up to 1, in 100.0% of its elements\naudit: 1 not as frozen" in capsys.readouterr().out
    )


def test_patterns_mean_the_weights_and_what_else_they_name_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    for file, value in ((one, 0.0), (other, 1.0)):
        moments = {"trunk.conv.weight": torch.tensor([value])}
        torch.save({"model": BEFORE, "optimizer": moments, "model_ema": moments, "epoch": value}, file)
    for patterns in (["trunk"], ["~trunk"], ["trunk", "heads"], ["re:.*weight"]):
        assert main(["audit", str(one), str(other), "--freeze", *patterns]) == 0, patterns
    assert f"{one}: the weights are those under model, not those under model_ema\n" in capsys.readouterr().out
    assert main(["audit", str(one), str(other), "--freeze", "optimizer"]) == 3
    assert main(["audit", str(one), str(other), "--freeze", "**"]) == 3
    assert main(["audit", str(one), str(other)]) == 3
    assert "2 not as frozen; 3 tensors are the same to the bit; 1 plain value next" in capsys.readouterr().out


def test_what_was_not_compared_is_not_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.pth"
    torch.save({"model": BEFORE, "odd": {1, 2, torch.zeros(1)}}, file)
    assert main(["audit", str(file), str(file)]) == 1
    assert "  odd: not compared: a set\naudit: 1 not compared; 3 tensors are the" in capsys.readouterr().out
    assert main(["audit", str(file), str(file), "--json"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["ok"] is False and plain["left_out"] == [{"name": "odd", "reason": "a set"}]
    assert main(["audit", str(file), str(file), "--freeze", "trunk"]) == 0


def test_the_command_says_what_differs_and_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.pth"
    save_file(BEFORE, one)
    torch.save({**BEFORE, "heads.out.bias": torch.zeros(4)}, other)
    assert main(["audit", str(one), str(other), "--freeze", "trunk"]) == 0
    assert main(["audit", str(one), str(other), "--freeze", "trunk", "heads"]) == 3
    out = capsys.readouterr().out
    assert "  heads.out.bias: changed by up to 4, in 100.0% of its elements\naudit: 1 not as frozen; 2 tensors" in out
    assert main(["audit", str(one), str(other), "--json"]) == 3
    plain = json.loads(capsys.readouterr().out)
    assert (plain["ok"], plain["identical"], [entry["name"] for entry in plain["changed"]]) == (
        False,
        2,
        ["heads.out.bias"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "trnk"], "pattern 'trnk' matches nothing (nearest: trunk"),
        (["--freeze", "type:Conv2d"], "but no positions, depth groups or classes"),
        (["third.pth"], "expected a run directory alone, or two checkpoints"),
    ],
)
def test_a_mistake_of_the_command_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = tmp_path / "one.safetensors"
    save_file(BEFORE, file)
    assert main(["audit", str(file), str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_patterns_that_select_nothing_in_the_end_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("one.pt", 0.0), ("other.pt", 1.0)):
        torch.save({"a": torch.full((2,), value)}, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("one.pt", "other.pt")]
    assert main(["audit", *paths, "--freeze", "a", "!a"]) == 2
    assert "select nothing in the end" in capsys.readouterr().err
