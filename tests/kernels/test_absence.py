"""The reason and the remedy of an installation without the compiled extension."""

from __future__ import annotations

import json
import shlex

import pytest

from batchnorm.kernels import absence

ERROR = ImportError("cannot import name '_cpu'")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of an installation's record, which a test fills."""
    records: dict[str, str] = {}
    monkeypatch.setattr(absence, "_record", lambda name: records.get(name, ""))
    return records


def test_a_wheel_without_kernels_says_what_left_them_out(installed: dict[str, str]) -> None:
    installed["WHEEL"] = "Root-Is-Purelib: true\nTag: py3-none-any\nBuild: 0without_kernels\n"
    assert "BATCHNORM_WITHOUT_KERNELS=1 left it out" in absence.describe_absence(ERROR)
    assert "unset BATCHNORM_WITHOUT_KERNELS" in absence.describe_remedy()


def test_a_wheel_with_kernels_says_why_they_do_not_load(installed: dict[str, str]) -> None:
    installed["WHEEL"] = "Root-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n"
    assert absence.describe_absence(ImportError("version `GLIBC_9' not found")) == (
        "the compiled extension is missing (version `GLIBC_9' not found)"
    )
    assert "BATCHNORM_WITHOUT_KERNELS" not in absence.describe_remedy()


@pytest.mark.parametrize(
    ("record", "arguments"),
    [
        (None, ["batchnorm"]),
        ({"url": "file:///tmp/a/batchnorm-1-py3-none-any.whl", "archive_info": {}}, ["batchnorm"]),
        ({"url": "file:///tmp/a%20b/batchnorm", "dir_info": {}}, ["/tmp/a b/batchnorm"]),
        (
            {"url": "file:///tmp/batchnorm", "dir_info": {"editable": True}},
            ["--editable", "/tmp/batchnorm"],
        ),
        (
            {"url": "https://a.example/b", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            ["git+https://a.example/b@12ab"],
        ),
        ({"url": "https://a.example/b-1.tar.gz"}, ["https://a.example/b-1.tar.gz"]),
    ],
)
def test_the_command_installs_from_where_the_installation_came(
    record: dict[str, object] | None, arguments: list[str], installed: dict[str, str]
) -> None:
    if record is not None:
        installed["direct_url.json"] = json.dumps(record)
    command = absence.describe_remedy().split("`")[1]
    words = shlex.split(command)
    assert words[-len(arguments) :] == arguments
    assert "--no-cache-dir" in words
