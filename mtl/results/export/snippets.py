"""The lines of Python that load an exported file, as the model card shows them; run in the card's folder."""

from __future__ import annotations

from mtl.results.export.subject import ExportedForm, Format, Subject
from mtl.results.export.weights import WEIGHTS_FILE


def snippets(subject: Subject, written: ExportedForm, form: Format) -> list[str]:
    """A block of code each, which ends in a line feed."""
    if form == "timm":
        return [f"import timm\n\ntrunk = {written.call}.eval()\n"]
    if form == "safetensors":
        return [
            "from safetensors.torch import load_file\n\n"
            f'weights = load_file("{WEIGHTS_FILE}")  # "trunk.*" in timm\'s names, "heads.<task>.*"\n'
        ]
    return _torch(subject, written) if form == "torch" else _onnx(subject, written)


def _shape(subject: Subject) -> str:
    height, width = subject.size
    return f"1, {subject.network.channels}, {height}, {width}"


def _torch(subject: Subject, written: ExportedForm) -> list[str]:
    images = f"images = torch.zeros({_shape(subject)}, dtype=torch.{_dtype(subject)})\n"
    if not written.inputs:
        return [
            f'import torch\n\nmodel = torch.export.load("model.pt2").module()\n{images}'
            "outputs = model(images)  # by the task's name\n"
        ]
    task, read = next(iter(written.inputs.items()))
    return [
        f'import torch\n\ntrunk = torch.export.load("trunk.pt2").module()\n'
        f'head = torch.export.load("head_{subject.names[task]}.pt2").module()\n{images}features = trunk(images)\n'
        f"output = head({{name: features[name] for name in {read}}})\n"
    ]


def _onnx(subject: Subject, written: ExportedForm) -> list[str]:
    images = f"images = np.zeros(({_shape(subject)}), np.{_dtype(subject)})\n"
    begin = "import numpy as np\nimport onnxruntime\n\n"
    if not written.inputs:
        return [
            f'{begin}model = onnxruntime.InferenceSession("model.onnx")\n{images}'
            'outputs = dict(zip([each.name for each in model.get_outputs()], model.run(None, {"images": images})))\n'
        ]
    task, read = next(iter(written.inputs.items()))
    features = list(dict.fromkeys(name for own in written.inputs.values() for name in own))
    return [
        f'{begin}trunk = onnxruntime.InferenceSession("trunk.onnx")\n'
        f'head = onnxruntime.InferenceSession("head_{subject.names[task]}.onnx")\n{images}'
        f"names = [each.name for each in trunk.get_outputs()]  # {', '.join(features)}\n"
        'features = dict(zip(names, trunk.run(None, {"images": images})))\n'
        f"(output,) = head.run(None, {{name: features[name] for name in {read}}})\n"
    ]


def _dtype(subject: Subject) -> str:
    return "uint8" if subject.input == "uint8" else "float32"
