"""Anyone's checkpoints, read: every tensor has a name, what is no tensor is said, and nothing in a file is run."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_model
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from mtl.audit.offline.compare import compare, compare_checkpoints
from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.tensor_file import Contents, LeftOut, UnreadableError, read_contents

W, V = torch.tensor([1.0, 2.0]), torch.tensor([3.0])


def saved(content: Any, file: Path) -> Contents:
    torch.save(content, file)
    return read_contents(file)


# --- properties: any nesting of dictionaries and lists

KEYS = st.one_of(
    st.sampled_from(["model", "state_dict", "module", "module.w", "_orig_mod.w", "w", "a.b", "a", "b", "0", "", "\n"]),
    st.text(max_size=3),
    st.integers(-1, 2),
    st.none(),
    st.booleans(),
    st.tuples(st.integers(0, 1), st.text(max_size=1)),
)
LEAVES = st.one_of(st.just("tensor"), st.just("tensor"), st.integers(), st.none(), st.text(max_size=2))
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(lambda own: argparse.Namespace(**own)),
    ),
    max_leaves=10,
)


def filled(shape: Any, made: list[Tensor]) -> Any:
    """The same nesting with tensors of their own, which are noted in the order in which they stand."""
    if isinstance(shape, str) and shape == "tensor":
        made.append(torch.tensor([float(len(made)), -0.0]))
        return made[-1]
    if isinstance(shape, argparse.Namespace):
        return argparse.Namespace(**{key: filled(value, made) for key, value in vars(shape).items()})
    if isinstance(shape, dict):
        return type(shape)((key, filled(value, made)) for key, value in shape.items())
    return type(shape)(filled(each, made) for each in shape) if isinstance(shape, list | tuple) else shape


@settings(max_examples=60, deadline=None)
@given(shape=NESTED, data=st.data())
def test_one_changed_tensor_anywhere_is_found_under_its_name_and_nothing_else_is(
    tmp_path_factory: pytest.TempPathFactory, shape: Any, data: st.DataObject
) -> None:
    one, other = (tmp_path_factory.getbasetemp() / name for name in ("one.pt", "other.pt"))
    tensors: list[Tensor] = []
    content = filled(shape, tensors)
    torch.save(content, one)
    torch.save(content, other)
    if not tensors:
        with pytest.raises(UnreadableError, match="holds no tensors"):
            read_contents(one)
        return
    everything = read_contents(one).everything
    assert len(everything) == len(tensors), "none is passed over"
    assert all(name.isprintable() and name for name in everything)
    same = compare_checkpoints(one, other)
    assert same.ok and same.num_identical == len(tensors)
    place = data.draw(st.integers(0, len(tensors) - 1))
    name = next(name for name, tensor in everything.items() if torch.equal(tensor, tensors[place]))
    tensors[place][1] = 0.0
    torch.save(content, other)
    changed = compare_checkpoints(one, other)
    assert not changed.ok and changed.num_identical == len(tensors) - 1
    assert [each.name for each in changed.differences] == [name]


@settings(max_examples=60, deadline=None)
@given(shape=NESTED)
def test_a_tensor_that_is_gone_is_never_clean(tmp_path_factory: pytest.TempPathFactory, shape: Any) -> None:
    one, other = (tmp_path_factory.getbasetemp() / name for name in ("one.pt", "other.pt"))
    torch.save({"w": W, "all": filled(shape, made := [])}, one)
    torch.save({"w": W}, other)
    assert compare_checkpoints(one, other).ok == (not made) == compare_checkpoints(other, one).ok


# --- names


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"student": {"w": W}, "teacher": {"w": W}, "center": V}, ["student.w", "teacher.w", "center"]),
        ({"net": {"w": W}, "acc": V}, ["net.w", "acc"]),
        ({"model": {"backbone": {"w": W}, "scale": V}}, ["backbone.w", "scale"]),
        ({"model": {"w": W}, "model_ema": {"w": V}}, ["w", "model_ema.w"]),
        ({"state_dict": {"w": W}, "optimizer": {"state": {0: {"step": V}}}}, ["w", "optimizer.state.0.step"]),
        ({"model_ema": {"w": V}, "epoch": 3}, ["w"]),
        ({"module": {"w": W}, "state_dict": None}, ["w"]),
        ({"model": "resnet18", "model_state_dict": {"w": W}}, ["w"]),
        ({"state_dict": {"model": {"w": W}}}, ["w"]),
        ({"app": {"model": {"w": W}, "optim": {"m": V}}}, ["w", "app.optim.m"]),
        ({"trunk": {"w": W}, "heads": {"w": V}}, ["trunk.w", "heads.w"]),
        ({"a.b": W, "a": {"b": V}}, ['["a.b"]', '["a"]["b"]']),
        ({"module.w": W, "w": V}, ['["module.w"]', '["w"]']),
        ([W, {"x": V}], ["0", "1.x"]),
        (W, ["tensor"]),
        ({"args": argparse.Namespace(mean=W), "w": V}, ["args.mean", "w"]),
        ({W: 1, "w": V}, ["<key 0>", "w"]),
    ],
)
def test_every_tensor_has_a_name(tmp_path: Path, content: Any, names: list[str]) -> None:
    assert list(saved(content, tmp_path / "a.pt").everything) == names


@pytest.mark.parametrize(
    "first", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("inner", ["trunk.w", "trunk._orig_mod.w", "trunk._fsdp_wrapped_module._orig_mod.w"])
def test_prefixes_of_wrappers_are_left_out_in_any_order(tmp_path: Path, first: str, inner: str) -> None:
    for key in ("", "state_dict", "student"):
        state = {f"{first}{inner}": W}
        read = saved({key: state} if key else state, tmp_path / "a.pt")
        assert list(read.everything) == ["student.trunk.w" if key == "student" else "trunk.w"]


def test_a_module_that_is_called_module_keeps_its_name_inside(tmp_path: Path) -> None:
    assert list(saved({"trunk.module.w": W, "my_orig_mod.w": V}, tmp_path / "a.pt").tensors) == [
        "trunk.module.w",
        "my_orig_mod.w",
    ]


def test_what_was_taken_as_the_weights_is_said(tmp_path: Path) -> None:
    read = saved({"state_dict_ema": {"w": V}, "state_dict": {"w": W}, "epoch": 3}, tmp_path / "a.pt")
    assert str(read) == "the weights are those under state_dict, not those under state_dict_ema"
    assert list(read.tensors) == ["w"] and read.num_plain == 1
    assert str(saved({"w": W}, tmp_path / "a.pt")) == ""


def test_attributes_of_tensors_and_dictionaries_are_read(tmp_path: Path) -> None:
    tensor, state = torch.tensor([1.0]), collections.OrderedDict(w=W)
    tensor.mean_of = V  # type: ignore[attr-defined]
    state.extra = {"v": V}  # type: ignore[attr-defined]
    assert list(saved({"a": tensor, "b": state}, tmp_path / "a.pt").everything) == [
        "a",
        "a.mean_of",
        "b.w",
        "b.extra.v",
    ]
    assert saved(nn.Linear(1, 1).state_dict(), tmp_path / "a.pt").num_plain == 0, "versions of modules are no content"


# --- kinds of tensors


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_compared(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    one, other, third = (tmp_path / name for name in ("one.pt", "other.pt", "third.pt"))
    for file, value in ((one, 1.0), (other, 1.0), (third, 2.0)):
        torch.save({"w": make(torch.tensor([[0.0, value], [3.0, 0.0]]))}, file)
    assert compare_checkpoints(one, other).ok
    assert [str(each) for each in compare_checkpoints(one, third).differences] == ["w: changed"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(2, device="meta"), "a meta tensor"),
        (lambda: torch.nested.nested_tensor([W, V]), "a nested tensor"),
        (lambda: {1, W}, "a set"),
        (lambda: np.array([None]), "a NumPy array of something else than numbers"),
        (lambda: torch.ones(2).untyped_storage(), "a torch.storage.TypedStorage"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_compared_is_said_and_is_not_clean(tmp_path: Path, make: Callable[[], Any], reason: str) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    for file in (one, other):
        torch.save({"model": {"trunk.w": W, "heads.odd": make()}}, file)
    assert read_contents(one).weights["heads.odd"] == LeftOut(reason)
    result = compare_checkpoints(one, other)
    assert not result.ok and not result.is_broken
    assert [str(each) for each in result.left_out] == [f"heads.odd: not compared: {reason}"]
    assert not compare_checkpoints(one, other, ["heads"]).ok
    assert compare_checkpoints(one, other, ["trunk"]).ok, "what was asked for is the same"


@pytest.mark.parametrize("dtype", [torch.bits8, torch.float4_e2m1fn_x2, torch.uint16, torch.bool, torch.complex64])
def test_every_type_of_elements_is_compared(dtype: torch.dtype) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    one, other = ({"w": torch.tensor([value] * size, dtype=torch.uint8).view(dtype)} for value in (0, 1))
    assert compare(one, one).ok
    assert [each.kind for each in compare(one, other).differences] == ["value"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|b1", "<c16", "|u1"])
def test_arrays_of_numpy_are_tensors_of_the_same_values(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.asarray([[0, 1, 1], [1, 0, 0]], dtype=dtype, order=order)  # type: ignore[call-overload]
    read = saved({"w": array, "one": array[0, 1], "none": array[:0]}, tmp_path / "a.pt")
    assert np.array_equal(read.tensors["w"].numpy(), array)
    assert list(read.tensors) == ["w", "none"] and read.num_plain == 1


# --- data in other classes, and code


def test_plain_data_of_known_classes_is_no_obstacle(tmp_path: Path) -> None:
    content = {
        "state_dict": {"w": W},
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("a/b"), names=("x",)),
        "best": np.float64(0.5),
        "space": types.SimpleNamespace(size=torch.Size([1]), kind=torch.float32),
        "dtype": np.dtype("f4"),
        "counts": collections.Counter("aab"),
        "where": torch.device("cpu"),
    }
    read = saved(content, tmp_path / "a.pt")
    assert list(read.everything) == ["w"] and read.num_plain == 10


class Planted:
    """Would make a file if it were unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Own:
    pass


class OwnModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(W.clone())


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: Own(), f"it holds a {__name__}.Own, which is code; not run"),
        (lambda _: OwnModule(), rf"it holds a whole module \({__name__}.OwnModule\), .* torch.save\(model.state_dict"),
        (lambda _: nn.Sequential(nn.Linear(1, 1)), "it holds a whole module .torch.nn.modules.container.Sequential.,"),
        (lambda file: Planted(exec, f"open({str(file)!r}, 'w')"), "it holds an exec, which is code; not run"),
        (lambda file: Planted(os.system, f"touch {file}"), "it holds a posix.system, which is code; not run"),
        (lambda _: collections.defaultdict(dict, {1: 2}), "it holds a collections.defaultdict, which is code; not run"),
        (lambda _: io.BytesIO(b"x"), "it holds a _io.BytesIO, which is code; not run"),
    ],
)
def test_an_object_of_another_class_is_named_and_not_run(
    tmp_path: Path, make: Callable[[Path], Any], reason: str, is_zip: bool
) -> None:
    file, ran = tmp_path / "a.pt", tmp_path / "ran"
    torch.save({"model": make(ran), "epoch": 3}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnreadableError, match=f"^{file}: cannot be read: {reason}") as caught:
        read_contents(file)
    assert not ran.exists() and len(str(caught.value).splitlines()) == 1


def test_a_stand_in_calls_nothing_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("was called")

    torch.save({"w": W, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    monkeypatch.setattr(argparse.Namespace, "__init__", fail)
    monkeypatch.setattr(argparse.Namespace, "__setattr__", fail)
    assert read_contents(tmp_path / "a.pt").num_plain == 1


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_an_archive_of_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match="it is a TorchScript archive, which is code; not run"):
        read_contents(tmp_path / "a.pt")


def test_content_that_contains_itself_is_said(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": W}
    content["self"] = [content]
    read = saved(content, tmp_path / "a.pt")
    assert read.everything["self.0"] == LeftOut("it contains itself") and list(read.tensors) == ["w"]


# --- what others write


def test_a_checkpoint_of_timm_is_read_with_its_arguments(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    args = argparse.Namespace(model="test_resnet", lr=0.1, data_dir=pathlib.Path("data"))
    saver = CheckpointSaver(model, optimizer, args, ModelEmaV3(model), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=0.5)
    read = read_contents(tmp_path / "last.pth.tar")
    assert compare(model.state_dict(), read.tensors).ok
    assert str(read) == "the weights are those under state_dict, not those under state_dict_ema"
    assert "optimizer.state.0.exp_avg" in read.rest and "state_dict_ema.conv1.0.weight" in read.rest


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors_of_safetensors_have_all_their_names(tmp_path: Path) -> None:
    model, file = Tied(), tmp_path / "a.safetensors"
    save_model(model, str(file), {"note": "embed"})
    assert compare(model.state_dict(), read_contents(file).tensors).num_identical == 2
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert compare_checkpoints(file, tmp_path / "a.pt").ok


def test_tied_tensors_of_a_run_have_all_their_names_and_its_optimizers_are_read(tmp_path: Path) -> None:
    model = Tied()
    Checkpoints(tmp_path).save(model, [], {"adamw": {"embed.weight": {"exp_avg": V}}}, {"step": 1}, ["last"])
    for path in (tmp_path / "last", tmp_path / "last/model.safetensors"):
        read = read_contents(path)
        assert compare(model.state_dict(), read.tensors).num_identical == 2
        assert len(read.rest) == 1 and next(iter(read.rest)).startswith("optimizer.")


def test_files_next_to_the_weights_are_compared_as_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        save_model(nn.Linear(1, 1), str(folder / "model.safetensors"))
        (folder / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes())
        torch.save({"m": V}, folder / "optimizer.pt")
    assert compare_checkpoints(one, other).ok, "of the same bytes"
    torch.save({"m": W}, other / "optimizer.pt")
    result = compare_checkpoints(one, other)
    assert not result.ok
    assert [str(each) for each in result.left_out] == [
        "optimizer.pt: not compared: a file of the folder that is not read"
    ]
    assert compare_checkpoints(one, other, ["weight", "bias"]).ok
