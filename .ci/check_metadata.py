"""Checks the contents of a built wheel and sdist: licences, links, versions that must agree.

python .ci/check_metadata.py WHEEL SDIST
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser

LICENCES = {"LICENSE", "native/third_party/README.md"} | {
    f"native/third_party/licenses/{name}.txt" for name in ("nanobind", "robin_map")
}
OUTSIDE = ("https://", "http://", "#", "mailto:")


def read_metadata(wheel: zipfile.ZipFile) -> tuple[str, Message]:
    """The name of the wheel's dist-info folder, and its METADATA."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return name.removesuffix("METADATA"), Parser().parsestr(wheel.read(name).decode())


def check(wheel: zipfile.ZipFile, sdist: tarfile.TarFile) -> list[str]:
    """Everything that is wrong."""
    folder, metadata = read_metadata(wheel)
    names = set(wheel.namelist())
    wrong = [
        f"the wheel lacks {path}"
        for path in sorted(LICENCES)
        if f"{folder}licenses/{path}" not in names or path not in metadata.get_all("License-File")
    ]
    text = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|srcset)=\"([^\"]+)", text)
    wrong += [
        f"the page on PyPI has a relative link: {target}"
        for target in map("".join, targets)
        if not target.startswith(OUTSIDE)
    ]
    if not targets:
        wrong.append("the page on PyPI has no links")
    wrong += [
        f"{kind} holds a compiled file: {name}"
        for kind, members in (("the sdist", sdist.getnames()),)
        for name in members
        if name.endswith((".so", ".pyd", ".dylib"))
    ]
    wrong += [
        f"the wheel lacks {field}" for field in ("Author", "Project-URL") if not metadata[field]
    ]
    return wrong


def main() -> int:
    """1 if something is wrong."""
    with zipfile.ZipFile(sys.argv[1]) as wheel, tarfile.open(sys.argv[2]) as sdist:
        wrong = check(wheel, sdist)
    for line in wrong:
        print(f"check-packages: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
