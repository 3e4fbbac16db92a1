"""How memory, traffic and time go from 1 to 1,024 devices and from 10^4 to 10^9 images: the tables of docs/scaling.md.

    python scripts/bench/scaling.py                            # prints the tables
    python scripts/bench/scaling.py --link-gb-s 12.5           # with what your machines give; --help lists it all
    python scripts/bench/scaling.py --trunks resnet18          # for other trunks
    python scripts/bench/scaling.py --write docs/scaling.md    # puts them in their places there

Nothing is trained, downloaded or sent: models are rehearsed on the meta device, as `mtl plan` does it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from scaling_costs import (
    PHASES,
    Assumptions,
    Case,
    Measured,
    epoch_seconds,
    global_efficiency,
    per_device_efficiency,
    step,
    study,
)
from scaling_limits import bytes_of_an_image, checkpoint_bytes, in_bytes, in_seconds, limits, short_name, table

TRUNKS = ("resnet50", "vit_large_patch16_224", "vit_giant_patch14_dinov2")
IMAGE_SIZE = 224
_FEW, _MANY = (8, 64, 1024), 1024
_NUMBERS = " / ".join(f"{n:,}" for n in _FEW)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunks", nargs="+", default=TRUNKS, help="timm models")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--write", type=Path, help="a page with the marks of these tables")
    for field in fields(Assumptions):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default, help="%(default)s")
    options = parser.parse_args(arguments)
    assumed = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    tables = make_tables([case for trunk in options.trunks for case in study(trunk, options.image_size)], assumed)
    if options.write is None:
        sys.stdout.write("\n\n".join(tables.values()) + "\n")
    else:
        options.write.write_text(filled(options.write.read_text(encoding="utf-8"), tables), encoding="utf-8")


def make_tables(cases: Sequence[Case], a: Assumptions) -> dict[str, str]:
    """The tables by name, as markdown."""
    return {
        "assumptions": _assumptions(a),
        "memory": _memory(cases),
        "time": _time(cases, a),
        "images": _images(cases, a),
        "saving": _saving(cases, a),
        "limits": limits(cases, a),
    }


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks, `<!-- NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: The page lacks the marks of a table.
    """
    for name, content in tables.items():
        # The table may be whatever re takes for references to groups.
        content = content.replace("\\", r"\\")
        page, number = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", page, flags=re.DOTALL
        )
        if number != 1:
            raise ValueError(f"expected one place for the table, <!-- {name} --> to <!-- end -->, got {number}")
    return page


def _named(case: Case) -> str:
    return f"{short_name(case)}, {[*PHASES]['abc'.index(case.plan.name)]}"


def _assumptions(a: Assumptions) -> str:
    written = [f"--{field.name.replace('_', '-')} {getattr(a, field.name):g}" for field in fields(a)]
    rows = [written[at : at + 3] for at in range(0, len(written), 3)]
    return "\n".join("    " + "".join(f"{each:32}" for each in row).rstrip() for row in rows)


def _memory(cases: Sequence[Case]) -> str:
    header = ["per device [plan]", "weights", "gradients", "optimizer", "average", "DDP holds"]
    header += [f"FSDP2 holds, on {_NUMBERS}", f"DDP sends, on {_NUMBERS}", f"FSDP2 sends, on {_MANY:,}"]
    rows = []
    for case in cases:
        memory = case.plan.memory
        held = [memory.weights, memory.gradients, memory.optimizer_state or 0, memory.average, case.ddp_bytes()]
        spread, sent = (" / ".join(in_bytes(count(n)) for n in _FEW) for count in (case.fsdp_bytes, case.ddp_sent))
        rows.append([_named(case), *map(in_bytes, held), spread, sent, in_bytes(case.fsdp_sent(_MANY))])
    return table(header, rows)


def _time(cases: Sequence[Case], a: Assumptions) -> str:
    header = ["", "GFLOP an image [plan]", "kept, an image [plan]", "step on 1", f"step on {_MANY:,}"]
    header += ["of it for gradients", "for kept features", "for messages", f"efficiency on {_NUMBERS}"]
    header += [f"with one batch of {a.global_batch:,}", f"FSDP2 on {_MANY:,}"]
    rows = []
    for case in cases:
        for keeps in (False, True) if case.kept_bytes else (False,):
            forward = case.left_forward if keeps else case.plan.flops.forward
            alone, many = (step(case, n, a.batch_per_device, a, keeps=keeps) for n in (1, _MANY))
            times = [alone.seconds, many.seconds, many.gradients, many.kept, many.control]
            rows.append(
                [
                    _named(case) + (", kept" if keeps else ""),
                    f"{(forward + case.plan.flops.backward) / 1e9:,.1f}",
                    in_bytes(case.kept_bytes) if keeps else "-",
                    *[in_seconds(time) for time in times],
                    " / ".join(f"{per_device_efficiency(case, n, a, keeps=keeps):.0%}" for n in _FEW),
                    " / ".join(f"{global_efficiency(case, n, a, keeps=keeps):.0%}" for n in _FEW),
                    "-" if keeps else f"{per_device_efficiency(case, _MANY, a, fsdp=True):.0%}",
                ]
            )
    return table(header, rows)


def _images(cases: Sequence[Case], a: Assumptions) -> str:
    frozen = [case for case in cases if case.plan.name == "a"]
    last = [case for case in cases if case.plan.name == "c"][min(1, len(frozen) - 1)]
    each = bytes_of_an_image(last.image_size)
    header = ["images", "data set [plan]", "order, shares [measured]", "made in [measured]"]
    header += ["who keeps what [measured]"]
    header += [f"kept, {short_name(case)} [plan]" for case in frozen]
    header += [f"epoch of {short_name(last)} on {n:,}" for n in (1, 32, _MANY)]
    rows = []
    for power in (4, 5, 6, 7, 8, 9):
        num, shares = 10**power, 10**power / a.batch_per_device
        order, made = 8 * num + Measured.share_bytes * shares, Measured.permutation_ns * num / 1e9
        made += Measured.share_us * shares / 1e6
        row = [f"10^{power}", in_bytes(each * num), in_bytes(order), in_seconds(made)]
        row += [in_seconds(Measured.fill_ns * 1e-9 * num * _MANY)]
        row += [in_bytes(case.kept_bytes * num) for case in frozen]
        rows.append([*row, *[in_seconds(epoch_seconds(last, n, num, a)) for n in (1, 32, _MANY)]])
    return table(header, rows)


def _saving(cases: Sequence[Case], a: Assumptions) -> str:
    header = ["", "frozen file, once [plan]", "each checkpoint [plan]", "written in", f"all of {_MANY:,} read it in"]
    header += ["verify, bytes [plan]", "verify, time", "agree, bytes [plan]", "agree, time"]
    rows = []
    for case in cases:
        frozen, each = checkpoint_bytes(case)
        hashed = 1 / (1e9 * Measured.hash_gb_s) + 1 / (1e9 * a.host_link_gb_s)
        # What is written is fingerprinted before.
        write = each / (1e9 * a.write_gb_s) + (frozen + each) / (1e9 * Measured.hash_gb_s)
        read = _MANY * (frozen + each) / (1e9 * a.shared_read_gb_s)
        proven = [(frozen, frozen * hashed), (case.weights, case.weights * hashed)]
        row = [_named(case), in_bytes(frozen), in_bytes(each), in_seconds(write), in_seconds(read)]
        rows.append([*row, *[cell for size, time in proven for cell in (in_bytes(size), in_seconds(time))]])
    return table(header, rows)


if __name__ == "__main__":
    main()
