"""Transforms of torchvision and of the user's own: made by name, seeded, and checked at every sample."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mtl.config import SettingError
from mtl.config.errors import OptionsError
from mtl.config.transform import TransformsConfig
from mtl.data import DataError
from mtl.data.transforms import Pipeline, build_transforms
from mtl.data.transforms.draws import drawing_from
from pages import code_block

SIZE = (12, 16)
KEY = "data.transform.train"


def pipeline(*entries: Any, size: tuple[int, int] = SIZE) -> Pipeline:
    return build_transforms(TransformsConfig.model_validate({"train": list(entries)}).train, size, KEY)


def v2_named(name: str, **options: Any) -> dict[str, Any]:
    return {"name": f"torchvision.transforms.v2:{name}", "options": options}


def image() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def labels() -> dict[str, Tensor]:
    normals = torch.zeros(3, *SIZE)
    normals[2] = -1
    return {
        "mask": torch.arange(SIZE[0] * SIZE[1]).view(SIZE) % 200,
        "depth": torch.full((1, *SIZE), 2.0),
        "normals": normals,
        "points": torch.tensor([[3.0, 4.0, 1.0]]),
        "age": torch.tensor(30.0),
    }


def changed(made: Pipeline, seed: int = 0, of: Tensor | None = None) -> dict[str, Tensor]:
    kinds: Any = {"mask": "mask", "depth": "depth", "normals": "normals", "points": "points", "age": "numbers"}
    result, found = made(image() if of is None else of, labels(), kinds, seed)
    return {"image": result, **found}


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Writes a module of its own for each test, next to where it runs."""
    name = f"own_{request.node.name.partition('[')[0]}"[:60]

    def write(text: str) -> str:
        head = "import random\nimport numpy as np\nimport torch\nfrom torchvision import tv_tensors\n"
        head += "from torchvision.transforms import v2\nfrom mtl.config import Strict\n"
        (tmp_path / f"{name}.py").write_text(head + text)
        return name

    return write


# Those of torchvision


def test_a_blur_of_torchvision_changes_the_image_and_no_label() -> None:
    found = changed(pipeline(v2_named("GaussianBlur", kernel_size=3, sigma=1.0)))
    expected = v2.functional.gaussian_blur(image(), [3, 3], [1.0, 1.0])
    assert torch.equal(found.pop("image"), expected)
    assert all(torch.equal(found[name], label) for name, label in labels().items())


DRAWING = ["GaussianNoise", "AutoAugment", "RandAugment", "RandomErasing", "RandomPhotometricDistort", "ColorJitter"]


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_decides_what_torchvision_draws(name: str) -> None:
    options: dict[str, Any] = {"ColorJitter": {"brightness": 0.5}, "RandomErasing": {"p": 1.0}}.get(name, {})
    only_image = pipeline(v2_named(name, **options))
    noise = image().float()
    results = [only_image(noise if name == "GaussianNoise" else image(), {}, {}, seed)[0] for seed in range(8)]
    assert len({result.numpy().tobytes() for result in results}) > 3
    for seed, result in enumerate(results):
        torch.rand(3)
        again = pipeline(v2_named(name, **options))(noise if name == "GaussianNoise" else image(), {}, {}, seed)[0]
        assert torch.equal(again, result)


def test_torchvision_draws_what_it_draws_by_itself_with_a_generator_of_that_state() -> None:
    generator = torch.Generator().manual_seed(11)
    with drawing_from(generator):
        found = v2.RandomResizedCrop([8, 8])(image())
    torch.manual_seed(11)
    torch.randint(2**32, ())
    assert torch.equal(found, v2.RandomResizedCrop([8, 8])(image()))


def test_floats_are_0_to_1_for_torchvision_and_0_to_255_for_us() -> None:
    found = changed(pipeline(v2_named("RandomSolarize", threshold=0.5, p=1.0)), of=image().float())
    expected = torch.where(image() >= 127.5, 255 - image().float(), image().float())
    assert torch.allclose(found["image"], expected, atol=1e-3)


def test_what_torchvision_rotates_has_no_class_and_no_depth_where_nothing_was() -> None:
    found = changed(pipeline(v2_named("RandomRotation", degrees=[45, 45], fill=127)))
    outside = found["mask"] == 255
    assert outside.sum() > 20
    assert torch.equal(found["depth"][0] == 0, outside)
    assert torch.equal((found["normals"] == 0).all(dim=0), outside)


def test_a_crop_with_a_margin_keeps_what_is_there() -> None:
    found = changed(pipeline(v2_named("RandomCrop", size=list(SIZE), padding=4)), seed=3)
    assert 0 < int((found["mask"] == 255).sum()) < 160
    assert set(found["depth"].unique().tolist()) == {0, 2}


def test_a_shorter_side_is_resized_as_torchvision_does() -> None:
    found = changed(pipeline(v2_named("Resize", size=6), size=(6, 8)))
    assert found["mask"].shape == (6, 8)
    assert torch.equal(found["mask"], labels()["mask"][1::2, 1::2])
    assert torch.equal(found["points"], torch.tensor([[1.5, 2.0, 1.0]]))


def test_a_perspective_moves_a_mask_with_the_image_and_is_refused_where_there_is_no_formula() -> None:
    kinds: Any = {"mask": "mask", "depth": "depth", "normals": "normals", "points": "points"}
    view = pipeline(v2_named("RandomPerspective", p=1.0))
    _, found = view(image(), {"mask": labels()["mask"]}, kinds, 0)
    assert 255 in found["mask"]
    for name in ("depth", "normals", "points"):
        with pytest.raises(DataError, match=rf"^{KEY}\.0: .*there is no formula for {name} after `perspective`"):
            view(image(), {name: labels()[name]}, kinds, 0)
    shear = pipeline(v2_named("RandomAffine", degrees=0, shear=[20, 20]))
    with pytest.raises(DataError, match="no formula for normals after `affine` with shear"):
        shear(image(), {"normals": labels()["normals"]}, kinds, 0)
    with pytest.raises(DataError, match="`five_crop` makes several images of one; depth can follow one only"):
        pipeline(v2_named("FiveCrop", size=4))(image(), {"depth": labels()["depth"]}, kinds, 0)


# The user's own


def test_a_class_of_ones_own_takes_the_sample_and_its_options(module: Any) -> None:
    name = module("""
class Brighter:
    is_random = False

    class Options(Strict):
        by: int
        years: float = 1.0

    def __init__(self, by, years):
        self.by, self.years = by, years

    def __call__(self, sample):
        assert type(sample["image"]) is tv_tensors.Image
        assert isinstance(sample["mask"], tv_tensors.Mask) and isinstance(sample["points"], tv_tensors.KeyPoints)
        image = tv_tensors.wrap(sample["image"] // 2 + self.by, like=sample["image"])
        return {**sample, "image": image, "age": sample["age"] + self.years}
""")
    made = pipeline({"name": f"{name}:Brighter", "options": {"by": 3}})
    found = changed(made)
    assert torch.equal(found["image"], image() // 2 + 3)
    assert found["age"] == 31
    assert torch.equal(found["mask"], labels()["mask"])
    assert not made.is_random
    with pytest.raises(OptionsError, match=rf"{KEY}\.0\.options"):
        pipeline({"name": f"{name}:Brighter", "options": {"buy": 3}})


def test_the_class_in_the_documentation_works(module: Any) -> None:
    name = module(code_block("docs/transforms.md", "python"))
    near = changed(pipeline({"name": f"{name}:Haze", "options": {"strength": 0.5}}), seed=1)
    assert bool((near["image"] >= image()).all())
    assert not torch.equal(near["image"], image())
    assert torch.equal(near["depth"], labels()["depth"])


def test_other_code_is_another_description(module: Any) -> None:
    name = module("class Nothing:\n    def __call__(self, sample):\n        return sample\n")
    before = pipeline(f"{name}:Nothing").describe()
    assert pipeline(f"{name}:Nothing").describe() == before
    with Path(f"{name}.py").open("a") as file:
        file.write("# changed\n")
    assert pipeline(f"{name}:Nothing").describe() != before


def test_a_seed_decides_what_numpy_and_random_draw_too(module: Any) -> None:
    name = module("""
class Noise:
    def __call__(self, sample):
        draws = [random.random(), np.random.rand(), float(torch.rand(())), float(torch.empty(()).normal_())]
        draws += torch.randperm(9).tolist() + [float(torch.rand_like(torch.zeros(())))]
        return {**sample, "age": sample["age"] * 0 + sum(draw * 10**-place for place, draw in enumerate(draws))}
""")
    noise = pipeline(f"{name}:Noise")
    first = [float(changed(noise, seed)["age"]) for seed in range(6)]
    assert len(set(first)) == 6
    random.random(), np.random.rand(2), torch.rand(2)
    assert [float(changed(noise, seed)["age"]) for seed in range(6)] == first
    twice = pipeline(f"{name}:Noise", f"{name}:Noise")
    assert float(changed(twice, 0)["age"]) != first[0]


def test_what_is_drawn_in_one_thread_leaves_what_another_draws() -> None:
    """Batches are made in a thread while the main thread draws for dropout."""
    torch.manual_seed(5)
    expected = [float(torch.rand(())) for _ in range(300)]
    made = pipeline(v2_named("RandomResizedCrop", size=list(SIZE)), v2_named("ColorJitter", brightness=0.3))
    truth = [changed(made, seed)["image"] for seed in range(20)]
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(changed(made, seed)["image"] for seed in range(20)))
    torch.manual_seed(5)
    thread.start()
    drawn = [float(torch.rand(())) for _ in range(300)]
    thread.join()
    assert drawn == expected
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_numbers_that_no_seed_decides_are_refused(module: Any) -> None:
    name = module("""
class Dropped:
    def __call__(self, sample):
        torch.nn.functional.dropout(torch.ones(3), training=True)
        torch.native_dropout(torch.ones(3), 0.5, True)
        return sample
""")
    with pytest.raises(DataError, match="native_dropout draws random numbers and takes no generator"):
        changed(pipeline(f"{name}:Dropped"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "expected the dict that it was called with, got NoneType"),
        ("return {'image': sample['image']}", "expected a tensor under 'mask', got none"),
        ("return {**sample, 'Mask': 1}", "expected the names image, mask, .*, got 'Mask' too; nearest: mask"),
        ("return {**sample, 'age': 3.0}", "expected a tensor under 'age', got float"),
        ("return {**sample, 'age': torch.zeros(2)}", r"expected age as float32 of shape \(\), got float32 of .*2"),
        (
            "return {**sample, 'image': sample['image'].float()}",
            r"expected image as uint8 of shape \(3, 12, 16\), got float32 of shape \(3, 12, 16\)",
        ),
        (
            "return {**sample, 'image': tv_tensors.Image(sample['image'][:1])}",
            r"expected image as uint8 of shape \(3, 12, 16\), got uint8 of shape \(1, 12, 16\)",
        ),
        (
            "return {**sample, 'image': tv_tensors.Image(sample['image'][:, :6])}",
            r"expected mask as int64 of shape \(6, 16\), got int64 of shape \(12, 16\)",
        ),
        (
            "return {**sample, 'depth': sample['depth'] * 2}",
            r"expected depth as DepthMap \(tv_tensors.wrap\), got Tensor",
        ),
        ("raise KeyError('colour')", r"KeyError: 'colour' \(.*own_.*py:\d+\)"),
    ],
)
def test_what_a_class_returns_is_checked(module: Any, body: str, message: str) -> None:
    name = module(f"class Mine:\n    def __call__(self, sample):\n        {body}\n") + ":Mine"
    own = Path(f"{name.partition(':')[0]}.py").rename(f"own_{abs(hash(body))}.py").stem + ":Mine"
    with pytest.raises(DataError, match=rf"^{KEY}\.1: {own}: {message}"):
        changed(pipeline("resize", own))


def test_what_cannot_be_made_is_blamed_on_its_key(module: Any) -> None:
    name = module("class NotCalled:\n    pass\n")
    with pytest.raises(SettingError, match=rf"^{KEY}\.0\.name: .*NotCalled has no __call__"):
        pipeline(f"{name}:NotCalled")
    with pytest.raises(SettingError, match=rf"^{KEY}\.1\.name: .*has no 'GaussianBlurr'; nearest: GaussianBlur"):
        pipeline("flip", v2_named("GaussianBlurr"))
    with pytest.raises(SettingError, match=rf"^{KEY}\.0\.options: .*unexpected keyword argument 'kernel'"):
        pipeline(v2_named("GaussianBlur", kernel=3))


def test_a_transform_of_ones_own_may_call_ours_by_torchvisions_functions(module: Any) -> None:
    name = module("""
class Mirrored(v2.Transform):
    is_random = False

    def transform(self, inpt, params):
        return self._call_kernel(v2.functional.horizontal_flip, inpt)
""")
    found, truth = changed(pipeline(f"{name}:Mirrored")), changed(pipeline({"name": "flip", "options": {"p": 1.0}}))
    assert all(torch.equal(found[key], value) for key, value in truth.items())
    assert isinstance(tv_tensors.Image(found["image"]), Tensor)
